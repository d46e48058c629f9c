"""`urform doctor`: broken kernels and leaking models are found, sound ones are not accused."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    BartConfig,
    BartModel,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    BloomConfig,
    BloomModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    ModernBertConfig,
    ModernBertModel,
    PreTrainedModel,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
    XLNetConfig,
    XLNetModel,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.models.llama.modeling_llama import eager_attention_forward
from typer.testing import CliRunner

from urform import UrformConfig, UrformForConditionalGeneration, UrformModel, check_isolation, check_kernels
from urform.cli.main import app
from urform.diagnostics import kernels_check
from urform.diagnostics.isolation_probe import CHECKS
from urform.diagnostics.kernels_cases import CASES, KernelCase, Problem, solve_exactly, solve_plainly
from urform.diagnostics.kernels_check import LOSS, LOSS_CASES
from urform.modeling.kernels import attention_dispatch, attention_proof
from urform.modeling.kernels.attention_dispatch import FEATURES, Backend, attention_backends
from urform.modeling.kernels.attention_reference import reference_attention

SIZES: dict[str, Any] = dict(
    vocab_size=50, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0
)
BART: dict[str, Any] = dict(
    vocab_size=50, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
    encoder_ffn_dim=40, decoder_ffn_dim=40, max_position_embeddings=64, pad_token_id=0,
)  # fmt: skip
T5 = dict(vocab_size=50, d_model=32, d_kv=8, d_ff=40, num_layers=2, num_heads=4, decoder_start_token_id=0)
PACKING = [name for name in CHECKS if name.startswith("packing")]
F32 = (torch.float32,)


def statuses(model: PreTrainedModel, attn: str | None = None, checks: Any = None) -> dict[str, str]:
    report = check_isolation(model, attn_implementation=attn, checks=checks)
    assert report.to_text() and json.loads(json.dumps(report.to_dict(), allow_nan=False))
    return {check.name: check.status for check in report.checks}


@pytest.fixture
def registered() -> Iterator[Callable[..., str]]:
    """Register an attention function (and a mask function) under a name that goes away after the test."""
    names: list[str] = []

    def register(function: Callable[..., Any], mask: Callable[..., Any] | None = None) -> str:
        names.append(f"doctor_test_{len(names)}")
        AttentionInterface.register(names[-1], function)
        if mask is not None:
            AttentionMaskInterface.register(names[-1], mask)
        return names[-1]

    yield register
    for name in names:
        AttentionInterface._global_mapping.pop(name)
        AttentionMaskInterface._global_mapping.pop(name, None)


# ---- isolation: what leaks is found ----


@pytest.mark.parametrize(
    "model",
    [
        lambda: BertModel(BertConfig(**SIZES)),
        lambda: ModernBertModel(ModernBertConfig(**SIZES, local_attention=4, global_attn_every_n_layers=2)),
    ],
    ids=["bert", "modernbert"],
)
def test_stock_encoders_leak_between_packed_documents(model: Callable[[], PreTrainedModel]) -> None:
    report = check_isolation(model(), attn_implementation="sdpa")
    assert report.kind == "encoder" and not report.ok
    assert {c.name for c in report.leaks} == {"packing-position-ids", "packing-ones-mask", "packing-cu-seqlens"}
    for check in report.leaks:
        assert check.movement > 100 * check.tolerance and "document" in check.where and "urform" in check.advice
    assert report["padding-right"].status == report["padding-left"].status == "isolated"
    assert report["causality"].status == "not applicable"
    apart = statuses(model(), "urform", ["packing-cu-seqlens", "padding-right", "padding-left"])
    assert set(apart.values()) == {"isolated"}


@pytest.mark.parametrize("model", [LlamaModel, LlamaForCausalLM])
def test_stock_llama_leaks_with_a_cache_only(model: Any) -> None:
    found = statuses(model(LlamaConfig(**SIZES)), "sdpa")
    leaks = {name for name, status in found.items() if status == "LEAKS"}
    assert leaks == {"packing-cache", "packing-given-cache", "packing-ones-mask"}
    assert {name for name, status in found.items() if status != "isolated"} - leaks == {"cross-attention"}
    assert found["cross-attention"] == "not applicable"


def test_attention_without_its_mask_function(registered: Callable[..., str]) -> None:
    name = registered(lambda *args, **kwargs: sdpa_attention_forward(*args, **kwargs))
    for model in (LlamaModel(LlamaConfig(**SIZES)), BertModel(BertConfig(**SIZES))):
        report = check_isolation(model, attn_implementation=name)
        assert report["mask-function"].status == "LEAKS" and repr(name) in report["mask-function"].where
        assert report["packing-position-ids"].status == report["padding-left"].status == "LEAKS"
        assert all("AttentionMaskInterface.register" in check.advice for check in report.leaks)
    found = statuses(model, name, ["mask-function"])
    assert found == {"mask-function": "inconclusive"}  # nothing was asked that could show it
    name = registered(eager_attention_forward)  # this one does not even know causality without a mask
    assert statuses(LlamaModel(LlamaConfig(**SIZES)), name)["causality"] == "LEAKS"
    name = registered(sdpa_attention_forward, sdpa_mask)
    assert statuses(BertModel(BertConfig(**SIZES)), name, ["mask-function", "padding-right"]) == {
        "mask-function": "isolated", "padding-right": "isolated"
    }  # fmt: skip


def test_cross_attention_that_drops_its_mask(registered: Callable[..., str]) -> None:
    def careless(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any) -> Any:
        return sdpa_attention_forward(module, q, k, v, mask if q.shape[2] == k.shape[2] else None, **kwargs)

    name = registered(careless, sdpa_mask)
    for model in (BartModel(BartConfig(**BART)), UrformModel(urform_config("encoder-decoder"))):
        report = check_isolation(model, attn_implementation=name)
        assert report["mask-function"].status == report["causality"].status == "isolated"
        assert report["cross-attention"].status == report["padding-right"].status == "LEAKS"
        assert "source" in report["cross-attention"].where


def test_padding_that_takes_part_whatever_its_content(registered: Callable[..., str]) -> None:
    """Masked keys with a score of 0 instead of -inf and values of 0: only the row alone tells."""

    def diluted(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any) -> Any:
        if mask is None:
            return sdpa_attention_forward(module, q, k, v, None, **kwargs)
        keep = mask[:, :, -1, :, None]  # of an encoder: the same keys for every query
        return sdpa_attention_forward(module, q, k * keep, v * keep, None, is_causal=False, scaling=kwargs["scaling"])

    name = registered(diluted, sdpa_mask)
    report = check_isolation(BertModel(BertConfig(**SIZES)), attn_implementation=name, checks=["padding-right"])
    assert not report.ok and "not those of the row alone" in report.leaks[0].where


# ---- isolation: what is sound is not accused ----


def urform_config(architecture: str, **changes: Any) -> UrformConfig:
    sizes = SIZES | {"architecture": architecture, "max_position_embeddings": 64}
    return UrformConfig(**sizes | changes)


@pytest.mark.parametrize("attn", ["urform", "sdpa", "eager"])
@pytest.mark.parametrize("architecture", ["encoder", "decoder", "encoder-decoder"])
def test_urform_keeps_everything_apart(architecture: str, attn: str) -> None:
    report = check_isolation(UrformModel(urform_config(architecture)), attn_implementation=attn)
    assert report.kind == architecture and report.attn_implementation == attn and report.ok
    assert {c.status for c in report.checks} <= {"isolated", "not applicable"}
    idle = {c.name for c in report.checks if c.status == "not applicable"}
    assert (
        idle
        == {
            "encoder": {"cross-attention", "causality", "packing-cache", "packing-given-cache"},
            "decoder": {"cross-attention"},
            "encoder-decoder": set(),
        }[architecture]
    )
    for check in report.checks:
        if check.movement is not None:
            assert check.movement <= check.tolerance < check.power


@pytest.mark.parametrize("positions", ["learned", "alibi", "t5"])
def test_urform_with_other_positions_and_a_head(positions: str) -> None:
    config = urform_config("encoder-decoder", position_encoding=positions, decoder_start_token_id=1)
    found = statuses(UrformForConditionalGeneration(config), "sdpa")
    assert set(found.values()) == {"isolated"}


def test_models_without_position_ids() -> None:
    bart = statuses(BartModel(BartConfig(**BART)), "sdpa")
    assert bart["padding-right"] == bart["cross-attention"] == bart["causality"] == "isolated"
    assert bart["padding-left"] == "shifted" and bart["packing-position-ids"] == "not applicable"
    t5 = statuses(T5ForConditionalGeneration(T5Config(**T5)), "eager", [n for n in CHECKS if "cu-seq" not in n])
    assert set(t5.values()) == {"isolated", "not applicable"}
    encoder = statuses(T5EncoderModel(T5Config(**T5)), None, ["padding-left", "causality", "packing-cu-seqlens"])
    assert encoder == {"padding-left": "isolated", "causality": "not applicable", "packing-cu-seqlens": "LEAKS"}


def test_roberta_and_a_classifier_by_its_backbone() -> None:
    """RoBERTa counts positions by the id of padding; a classifier gives no output per token."""
    padding = ["padding-right", "padding-left"]
    roberta = RobertaModel(RobertaConfig(**SIZES | {"pad_token_id": 1}))
    assert set(statuses(roberta, "sdpa", padding).values()) == {"isolated"}
    classifier = BertForSequenceClassification(BertConfig(**SIZES))
    assert set(statuses(classifier, "sdpa", padding).values()) == {"isolated"}


def test_a_model_that_does_nothing_is_not_called_isolated() -> None:
    model = LlamaModel(LlamaConfig(**SIZES))
    for value in (0.0, math.nan):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(value)
        report = check_isolation(model)
        assert {c.status for c in report.checks if c.movement is not None} == {"inconclusive"}


def test_attention_that_sees_nothing_is_not_called_isolated(registered: Callable[..., str]) -> None:
    """The embeddings move, but no token sees another."""

    def own_value(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any) -> Any:
        return v.transpose(1, 2).contiguous(), None

    report = check_isolation(
        BertModel(BertConfig(**SIZES)), attn_implementation=registered(own_value, sdpa_mask), checks=["padding-right"]
    )
    assert report["padding-right"].status == "inconclusive" and report["padding-right"].power == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype) -> None:
    llama = statuses(LlamaModel(LlamaConfig(**SIZES)).to(dtype), "sdpa")
    assert llama["packing-cache"] == "LEAKS"
    assert {llama[name] for name in ("padding-right", "padding-left", "causality", "packing-position-ids")} == {
        "isolated"
    }
    bert = statuses(BertModel(BertConfig(**SIZES)).to(dtype), "sdpa")  # moves about as much as rounding does
    assert "isolated" not in [bert[name] for name in PACKING]
    assert "LEAKS" not in (bert["padding-right"], bert["padding-left"])


def test_noise_is_not_taken_for_a_leak() -> None:
    model = LlamaModel(LlamaConfig(**SIZES))
    model.norm.register_forward_hook(lambda module, args, out: out + 1e-3 * torch.rand_like(out))
    report = check_isolation(model, checks=["padding-right", "causality", "packing-cache"])
    assert report["padding-right"].tolerance > 1e-3 and report["padding-right"].status == "isolated"
    assert report["causality"].status == "isolated" and report["packing-cache"].status == "LEAKS"


def test_what_the_model_refuses_is_reported() -> None:
    class Picky(LlamaModel):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            if "cu_seq_lens_q" in kwargs:
                raise TypeError("no packing by cu_seq_lens_q here\nat all")
            return super().forward(*args, **kwargs)

    Picky.forward.__signature__ = __import__("inspect").signature(LlamaModel.forward)  # type: ignore[attr-defined]
    report = check_isolation(Picky(LlamaConfig(**SIZES)), checks=["packing-cu-seqlens", "causality"])
    assert report["packing-cu-seqlens"].status == "refused" and report.ok
    assert report["packing-cu-seqlens"].detail == "TypeError: no packing by cu_seq_lens_q here"
    assert report["causality"].status == "isolated"


def test_the_model_comes_back_as_it_was() -> None:
    model = UrformModel(urform_config("encoder-decoder", attn_implementation="sdpa", hidden_dropout_prob=0.5)).train()
    model.decoder.eval()
    before = {name: p.clone() for name, p in model.named_parameters()}
    assert check_isolation(model, attn_implementation="eager", checks=["padding-right"]).ok  # dropout off
    assert model.config._attn_implementation == model.encoder.config._attn_implementation == "sdpa"
    assert model.training and model.encoder.training and not model.decoder.training
    with pytest.raises(ValueError, match="attn_implementation='flash_attention_2'"):
        check_isolation(model, attn_implementation="flash_attention_2")
    assert model.config._attn_implementation == "sdpa" and model.encoder.training
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(model="no/such folder"), r"model='no/such folder' could not be loaded .*config.json"),
        (dict(attn_implementation="sdpaa"), r"attn_implementation='sdpaa' .*use one of .*'eager'.*'urform'"),
        (dict(checks=["paddling"]), r"check 'paddling' is unknown.*padding-left"),
        (dict(model=nn.Linear(2, 2)), r"model is a Linear, not a PreTrainedModel"),
        (dict(dtype="float32"), r"dtype and device are for a folder"),
        (dict(model="x", dtype="int8"), r"dtype='int8' .*'bfloat16'"),
        (dict(model="x", device="gpu"), r"device='gpu' .*'cpu'"),
    ],
)
def test_wrong_arguments_are_refused_by_name(arguments: dict[str, Any], message: str) -> None:
    arguments = {"model": LlamaModel(LlamaConfig(**SIZES)), **arguments}
    with pytest.raises(ValueError, match=message):
        check_isolation(**arguments)


def test_models_that_ignore_the_attention_interface(tmp_path: Path) -> None:
    """Bloom's and XLNet's attention is their own; XLNet does not say that it is bidirectional."""
    bloom = BloomModel(BloomConfig(vocab_size=50, hidden_size=32, n_layer=2, n_head=4))
    bloom.save_pretrained(tmp_path)
    for model in (bloom, str(tmp_path)):
        with pytest.raises(ValueError, match="attn_implementation='urform' has no effect on BloomModel"):
            check_isolation(model, attn_implementation="urform")
    report = check_isolation(bloom, checks=["padding-left", "causality"])
    assert report.kind == "decoder" and {c.status for c in report.checks} == {"isolated"}
    xlnet = XLNetModel(XLNetConfig(vocab_size=50, d_model=32, n_layer=2, n_head=4, d_inner=40))
    assert statuses(xlnet, None, ["padding-left", "causality"]) == {
        "padding-left": "isolated", "causality": "not applicable"
    }  # fmt: skip


def test_models_that_read_no_tokens_are_refused() -> None:
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=16)
    with pytest.raises(ValueError, match="ViTModel has no input_ids"):
        check_isolation(ViTModel(ViTConfig(**sizes)))


# ---- kernels ----


def test_every_backend_passes_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it, as the command runs it (Triton's interpreter, which takes minutes, has its own tests)."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    report = check_kernels("cpu", timing=False)
    assert report.ok, report.to_text()
    backends = attention_backends()
    found = {(r.backend, r.case, r.dtype): r for r in report.results}
    assert len(found) == len(report.results) == 3 * (len(backends) * len(CASES) + len(LOSS_CASES))
    for (backend, case, _), result in found.items():
        if result.status == "ok":
            assert result.ratio <= 1 and result.error <= result.tolerance and result.worst
        else:
            assert result.reason, (backend, case)
    assert {result.status for result in report.results if result.backend in ("reference", LOSS)} == {"ok"}
    lacking = {r.case for r in report.results if r.backend == "sdpa" and r.status == "not served"}
    assert lacking == {case.name for case in CASES if not all(backends["sdpa"][need] for need in case.needs)}
    asked = {need for case in CASES for need in case.needs}
    assert asked <= set(FEATURES) and set(FEATURES) - asked <= {"wide", "float64"}  # of shape and dtype


def broken(**changes: Any) -> Callable[..., Any]:
    """The reference backend, with some options not as they were asked for."""

    def run(*tensors: Any) -> Any:
        return reference_attention(*tensors[:-1], tensors[-1]._replace(**changes))

    return run


def use(monkeypatch: pytest.MonkeyPatch, run: Callable[..., Any]) -> None:
    monkeypatch.setitem(attention_dispatch.BACKENDS, "broken", Backend(run, frozenset(FEATURES)))


def failed(cases: tuple[KernelCase, ...] = CASES, dtypes: tuple[torch.dtype, ...] = F32) -> set[str]:
    report = check_kernels("cpu", dtypes, cases, backends=["broken"], timing=False)
    assert {result.backend for result in report.results} == {"broken"}
    assert report.ok != bool(report.failures)
    for result in report.failures:
        assert f"FAIL broken / {result.case}" in report.to_text()
    return {result.case for result in report.failures}


@pytest.mark.parametrize("dtype", kernels_check.DTYPES, ids=str)
def test_a_backend_that_ignores_the_window_fails(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    use(monkeypatch, broken(window=None))
    assert failed(dtypes=(dtype,)) == {case.name for case in CASES if case.window is not None}


@pytest.mark.parametrize(
    ("changes", "concerned"),
    [
        (dict(causal=False), lambda case: case.causal and case.name != "one query, 65 keys"),
        (dict(bias=None), lambda case: case.bias is not None),
        (dict(softcap=None), lambda case: case.softcap is not None),
        (dict(dropout_p=0.0), lambda case: case.dropout_p > 0),
        (dict(seed=1), lambda case: case.dropout_p > 0),
        (dict(return_lse=False), lambda case: case.return_lse),
        (dict(scale=0.17), lambda case: True),
    ],
    ids=["causal", "bias", "softcap", "dropout", "seed", "lse", "scale"],
)
def test_a_backend_that_ignores_an_option_fails(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], concerned: Callable[[KernelCase], bool]
) -> None:
    use(monkeypatch, broken(**changes))
    assert failed() == {case.name for case in CASES if concerned(case)}


@pytest.mark.parametrize("which", ["dq", "dk", "dv", "dbias", "padding", "nan", "poison", "raises"])
def test_wrong_gradients_padding_and_errors_fail(monkeypatch: pytest.MonkeyPatch, which: str) -> None:
    class Scale(torch.autograd.Function):
        """Nothing forward, one percent too much backward."""

        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.view_as(x)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad * 1.01

    def run(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> Any:
        *layouts, settings = others
        tensors = {"dq": q, "dk": k, "dv": v}
        if which in tensors:
            tensors[which] = Scale.apply(tensors[which])
        bias = settings.bias
        if which == "dbias" and bias is not None:
            settings = settings.with_bias(type(bias)(Scale.apply(bias.weight)))
        out, lse = reference_attention(*tensors.values(), *layouts, settings)
        if which == "padding":
            out = out + 1e-6 * (out == 0)
        if which == "nan":
            out = torch.where(out == out.max(), math.nan, out)
        if which == "poison":  # 0 * NaN
            out = out + 0 * v.sum()
        if which == "raises":
            raise RuntimeError("launch failed\nmore")
        return out, lse

    use(monkeypatch, run)
    cases = (CASES[0], KernelCase("padded", layout="left"), KernelCase("alibi", layout="packed", bias="alibi"))
    expected = {"dbias": {"alibi"}, "padding": {"padded"}, "poison": {"padded"}}.get(
        which, {case.name for case in cases}
    )
    assert failed(cases) == expected
    report = check_kernels("cpu", F32, cases, backends=["broken"], timing=False)
    reasons = {"nan": "NaN", "poison": "NaN", "raises": "RuntimeError: launch failed", "padding": "not exactly 0"}
    assert all(reasons.get(which, f"{which} is off by") in result.reason for result in report.failures)


def test_what_cannot_run_here_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*tensors: Any) -> Any:
        raise ImportError("Triton is not installed: pip install 'triton>=3.6'")

    def choosy(q: Tensor, *tensors: Any) -> Any:
        if q.shape[-1] > 32:
            raise ValueError(f"backend='broken' does not serve head dim {q.shape[-1]}; use 'auto'")
        return reference_attention(q, *tensors)

    use(monkeypatch, missing)
    report = check_kernels("cpu", F32, CASES[:2], backends=["broken", "reference"], timing=False)
    assert report.ok and "broken: unavailable: Triton is not installed" in report.to_text()
    use(monkeypatch, choosy)
    report = check_kernels("cpu", F32, (CASES[0], KernelCase("wide", dims=(40, 40))), backends=["broken", "sdpa"])
    found = {r.case: r for r in report.results if r.backend == "broken"}
    assert report.ok and [found[name].status for name in ("full", "wide")] == ["ok", "not served"]
    assert "head dim 40" in found["wide"].reason and "head dim 40" in report.to_text()
    assert {t.backend for t in report.timings} == {"sdpa"} and "8 heads of 64, ms" in report.to_text()


def test_a_failed_proof_fails_the_report_and_the_cases_still_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend that `attention()` has left is measured all the same, and its proof's outcome stands in the report."""
    monkeypatch.setattr(attention_proof, "OUTCOMES", {})
    for run, outcome in ((broken(causal=False), "FAILED, so attention() does not use it here: "), (broken(), "passed")):
        attention_proof.OUTCOMES.clear()
        proving = Backend(run, frozenset(FEATURES), proofs=attention_proof.TRITON_CASES)
        monkeypatch.setitem(attention_dispatch.BACKENDS, "broken", proving)
        report = check_kernels("cpu", F32, CASES[:1], backends=["broken"], timing=False)
        assert [result.status for result in report.results] == ["ok"]  # a case that is not causal
        assert f"broken: proof {outcome}" in report.to_text()
        assert report.ok == (outcome == "passed") and report.ok != ("1 proof failed" in report.to_text())
        assert report.to_dict()["proofs"].keys() == {"broken"}


def test_a_wrong_loss_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    right = kernels_check.linear_cross_entropy

    def wrong(*tensors: Any, **options: Any) -> Tensor:
        return right(*tensors, **options | {"z_loss": 0.0})

    monkeypatch.setattr(kernels_check, "linear_cross_entropy", wrong)
    report = check_kernels("cpu", cases=CASES[:1], backends=["reference", LOSS], timing=False)
    assert {(r.backend, r.case) for r in report.failures} == {(LOSS, "loss, smoothing, z-loss")}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_yardstick_is_the_definition(case: KernelCase) -> None:
    """In float64 plain PyTorch and the reference agree: the tolerance measures rounding and nothing else."""
    problem = Problem(case, torch.float64, torch.device("cpu"))
    truth, plain = problem.solve(solve_exactly), problem.solve(solve_plainly, padding=0.0)
    assert truth.keys() == plain.keys()
    for name, want in truth.items():
        torch.testing.assert_close(plain[name], want, atol=1e-11, rtol=1e-9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(device="gpu"), "device='gpu' is not a device"),
        (dict(device="meta"), "device='meta' is not on this machine; use 'cpu'"),
        (dict(dtypes=(torch.int32,)), "dtypes holds torch.int32"),
        (dict(cases=()), "cases .0 given. must each hold"),
        (dict(backends=["tritton"]), "backend 'tritton' is unknown.*'reference'"),
    ],
)
def test_wrong_arguments_of_check_kernels(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_kernels(**arguments)


# ---- the command ----


@pytest.fixture
def bert(tmp_path: Path) -> str:
    BertModel(BertConfig(**SIZES)).save_pretrained(tmp_path / "bert")
    return str(tmp_path / "bert")


def test_isolation_command(bert: str) -> None:
    run = CliRunner().invoke
    leaking = run(app, ["doctor", "isolation", bert, "--attn", "sdpa"])
    assert leaking.exit_code == 1 and "3 LEAKS" in leaking.stdout and "  -> " in leaking.stdout
    asked = run(app, ["doctor", "isolation", bert, "--check", "padding-right", "--check", "padding-left"])
    assert asked.exit_code == 0 and asked.stdout.endswith("2 isolated\n")
    as_json = run(app, ["doctor", "isolation", bert, "--attn", "urform", "--json", "--check", "packing-cu-seqlens"])
    report = json.loads(as_json.stdout)
    assert as_json.exit_code == 0 and report["ok"] and report["attn_implementation"] == "urform"
    assert report["checks"][0]["status"] == "isolated" and report["checks"][0]["power"] > 1e-4


def test_isolation_command_of_a_saved_urform_model(tmp_path: Path) -> None:
    UrformModel(urform_config("encoder-decoder")).save_pretrained(tmp_path)
    done = CliRunner().invoke(app, ["doctor", "isolation", str(tmp_path), "--dtype", "bfloat16", "--attn", "urform"])
    assert done.exit_code == 0 and "bfloat16 on cpu" in done.stdout and "10 isolated" in done.stdout, done.stdout


def test_kernels_command(monkeypatch: pytest.MonkeyPatch) -> None:
    run = CliRunner().invoke
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    clean = run(app, ["doctor", "kernels", "--device", "cpu", "--backend", LOSS])
    assert clean.exit_code == 0 and "loss, ignored labels" in clean.stdout
    assert f"torch {torch.__version__.partition('+')[0]}" in clean.stdout
    use(monkeypatch, broken(window=None))
    monkeypatch.setattr(kernels_check, "_time", lambda *arguments: None)
    wrong = run(app, ["doctor", "kernels", "--device", "cpu", "--backend", "broken", "--json"])
    report = json.loads(wrong.stdout)
    assert wrong.exit_code == 1 and not report["ok"] and report["environment"]["device"] == "cpu"
    windows = {case.name for case in CASES if case.window is not None}
    assert {r["case"] for r in report["results"] if r["status"] == "FAIL"} == windows


def test_command_refusals(bert: str, tmp_path: Path) -> None:
    for arguments, message in (
        (["isolation", str(tmp_path / "none")], "could not be loaded"),
        (["isolation", bert, "--attn", "sdpaa"], "attn_implementation='sdpaa' is not known"),
        (["isolation", bert, "--check", "x"], "check 'x' is unknown"),
        (["isolation", bert, "--dtype", "x"], "dtype='x'"),
        (["kernels", "--device", "x"], "device='x'"),
    ):
        done = CliRunner().invoke(app, ["doctor", *arguments])
        assert done.exit_code == 2 and message in done.stderr and "Traceback" not in done.stderr, done.stderr
        assert done.stdout == "" and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("verb", [[], ["kernels"], ["isolation"]])
def test_help_imports_no_torch(verb: list[str]) -> None:
    code = (
        "import sys; from urform.cli.main import app; sys.argv = ['urform'] + sys.argv[1:]\n"
        "try: app()\nexcept SystemExit as end: assert not end.code\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    command = [sys.executable, "-c", code, "doctor", *verb, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "Usage" in done.stdout, done.stderr
