"""The varlen backend against a float64 `varlen_attn` with PyTorch's documented meaning, and on a GPU if there is one.

No CPU runs PyTorch's kernel, so here it is replaced: what is tested is what the backend hands over and gives back.
"""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from urform.modeling.kernels import attention_dispatch, attention_proof, attention_varlen
from urform.modeling.kernels.attention_biases import ALiBi
from urform.modeling.kernels.attention_dispatch import BACKENDS, attention
from urform.modeling.kernels.attention_layouts import Layout
from urform.modeling.kernels.attention_reference import reference_attention
from urform.modeling.kernels.attention_settings import AttentionSettings
from urform.modeling.kernels.attention_varlen import varlen_attention

CALLS: list[dict[str, Any]] = []


def documented_varlen_attn(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int, *,
    return_aux: Any = None, scale: float | None = None, window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """Row by row: (-1, 0) is causal, (W, 0) causal with W keys before, the last query meeting the last key."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32 and cu_seq_q.shape == cu_seq_k.shape
    assert query.dim() == key.dim() == value.dim() == 3 and query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
    assert int(cu_seq_q[-1]) == len(query) and int(cu_seq_k[-1]) == len(key) == len(value)
    assert int(cu_seq_q.diff().max()) <= max_q and int(cu_seq_k.diff().max()) <= max_k
    assert enable_gqa or query.shape[1] == key.shape[1]
    CALLS.append({"window_size": window_size, "enable_gqa": enable_gqa, "tokens": len(query)})
    group, outs = query.shape[1] // key.shape[1], []
    for i in range(len(cu_seq_q) - 1):
        q = query[cu_seq_q[i] : cu_seq_q[i + 1]].double()
        k, v = (x[cu_seq_k[i] : cu_seq_k[i + 1]].double().repeat_interleave(group, 1) for x in (key, value))
        for row in range(len(q)):
            position = row + len(k) - len(q)
            first = 0 if window_size[0] < 0 else max(0, position - window_size[0])
            last = len(k) if window_size[1] < 0 else min(len(k), position + window_size[1] + 1)
            if last <= first:
                outs.append(torch.zeros_like(q[0]) + 0 * q[row])
                continue
            scores = torch.einsum("hd,shd->hs", q[row], k[first:last]) * (scale or q.shape[-1] ** -0.5)
            outs.append(torch.einsum("hs,shd->hd", scores.softmax(-1), v[first:last]))
    return torch.stack(outs).to(query.dtype)


def older_varlen_attn(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int, *,
    return_aux: Any = None, scale: float | None = None, window_size: tuple[int, int] = (-1, -1),
) -> Tensor:  # fmt: skip
    """PyTorch 2.11's signature, without grouped heads."""
    return documented_varlen_attn(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window_size
    )


def put(monkeypatch: pytest.MonkeyPatch, function: Any) -> None:
    """Let the backend find another function than PyTorch's."""
    takes_groups = "enable_gqa" in inspect.signature(function).parameters
    monkeypatch.setitem(attention_varlen._LOADED, "kernel", attention_varlen._Kernel(function, takes_groups))


@pytest.fixture(autouse=True)
def documented(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if "gpu" in request.keywords:
        return
    CALLS.clear()
    put(monkeypatch, documented_varlen_attn)
    monkeypatch.setattr(attention_proof, "OUTCOMES", {})


@pytest.fixture
def as_if_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let CPU tensors pass for a GPU's."""
    monkeypatch.setitem(BACKENDS, "varlen", replace(BACKENDS["varlen"], why_not=lambda device: None))
    monkeypatch.setattr(attention_dispatch, "_preference", lambda *_: ["varlen", "reference"])


def packed(*sizes: int) -> Layout:
    return Layout.packed(F.pad(torch.tensor(sizes).cumsum(0), (1, 0)))


def padded(*sizes: int, side: str) -> Layout:
    length, places = max(sizes) + 1, torch.arange(max(sizes) + 1)
    lengths = torch.tensor(sizes)[:, None]
    return Layout.padded({
        "left": places >= length - lengths,
        "right": places < lengths,
        "holes": (places % 2 == 0) & (places < 2 * lengths) | (places >= length - lengths),
    }[side])  # fmt: skip


LAYOUTS = {
    "packed": (packed(3, 7, 1), packed(3, 7, 1)),
    "packed, fewer queries": (packed(3, 2, 1), packed(5, 7, 4)),
    "packed, more queries": (packed(6, 5, 2), packed(3, 5, 1)),
    "empty sequences": (packed(0, 4, 2), packed(3, 0, 2)),
    "full": (Layout.full(2, 5), Layout.full(2, 8)),
    "left": (padded(3, 7, side="left"), padded(4, 6, side="left")),
    "right": (padded(3, 7, side="right"), padded(4, 0, side="right")),
    "holes": (padded(2, 3, side="holes"), padded(2, 3, side="holes")),
    "mixed": (packed(3, 2), padded(4, 6, side="right")),
    "mixed the other way": (padded(4, 6, side="left"), packed(3, 2)),
}
SETTINGS = {
    "full": AttentionSettings(scale=0.4),
    "causal": AttentionSettings(causal=True, scale=0.4),
    "causal window": AttentionSettings(causal=True, window=(2, None), scale=0.4),
}


def tensors(q_layout: Layout, kv_layout: Layout, heads: int = 4, groups: int = 2) -> list[Tensor]:
    """q, k, v in float64 that require gradients, with NaN at padding."""
    made = []
    for layout, count in ((q_layout, heads), (kv_layout, groups), (kv_layout, groups)):
        rows = (sum(layout.sizes),) if layout.is_packed else (layout.batch, layout.length)
        x = torch.randn(*rows, count, 8, dtype=torch.float64)
        if layout.mask is not None:
            x[~layout.mask] = torch.nan
        made.append(x.requires_grad_())
    return made


def agree(q_layout: Layout, kv_layout: Layout, settings: AttentionSettings, groups: int = 2) -> None:
    """Output and gradients of backend and reference."""
    leaves = tensors(q_layout, kv_layout, groups=groups)
    results = []
    for run in (varlen_attention, reference_attention):
        out, lse = run(*leaves, q_layout, kv_layout, settings)
        assert lse is None and out.shape == leaves[0].shape
        probe = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
        results.append([out, *torch.autograd.grad(out, leaves, probe)])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-10)
        assert (got[want == 0] == 0).all()


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("layouts", LAYOUTS)
def test_layouts(layouts: str, settings: str) -> None:
    agree(*LAYOUTS[layouts], SETTINGS[settings])
    window = {"full": (-1, -1), "causal": (-1, 0), "causal window": (2, 0)}[settings]
    assert [call["window_size"] for call in CALLS] == [window]
    assert CALLS[0]["tokens"] == sum(LAYOUTS[layouts][0].sizes)  # padding is never computed


@pytest.mark.parametrize("window", [(2, 1), (None, 3), (0, None), (0, 0)])
@pytest.mark.parametrize("layouts", ["packed", "holes"])
def test_windows_without_causality(layouts: str, window: Any) -> None:
    q_layout, _ = LAYOUTS[layouts]
    agree(q_layout, q_layout, AttentionSettings(window=window, scale=0.3))


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_grouped_heads_of_new_and_old_torch(monkeypatch: pytest.MonkeyPatch, groups: int) -> None:
    agree(*LAYOUTS["packed"], SETTINGS["causal"], groups)
    assert CALLS[0]["enable_gqa"] == (groups < 4)
    put(monkeypatch, older_varlen_attn)
    agree(*LAYOUTS["packed"], SETTINGS["causal"], groups)


def test_nothing_to_compute() -> None:
    layout = packed(0, 0)
    out, _ = varlen_attention(*tensors(layout, layout), layout, layout, AttentionSettings())
    assert out.shape == (0, 4, 8) and not CALLS


def test_padding_is_found_once_for_all_layers() -> None:
    q_layout, kv_layout = padded(3, 7, side="left"), padded(4, 6, side="left")
    for _ in range(2):
        varlen_attention(*tensors(q_layout, kv_layout), q_layout, kv_layout, AttentionSettings())
    found = q_layout.memo["varlen"]
    varlen_attention(*tensors(q_layout, kv_layout), q_layout, kv_layout, AttentionSettings())
    assert q_layout.memo["varlen"] is found


def test_the_dispatcher_proves_and_uses_it(as_if_on_a_gpu: None) -> None:
    q_layout, kv_layout = LAYOUTS["left"]
    q, k, v = (x.to(torch.float16) for x in tensors(q_layout, kv_layout))
    out = attention(q, k, v, q_layout=q_layout, kv_layout=kv_layout, causal=True)
    want = attention(q, k, v, q_layout=q_layout, kv_layout=kv_layout, causal=True, backend="reference")
    torch.testing.assert_close(out, want, atol=2e-3, rtol=2e-3)
    assert attention_proof.OUTCOMES == {("varlen", "cpu", None): ""} and len(CALLS) == 1 + 2 * 3


def test_a_kernel_that_aligns_causality_elsewhere_fails_its_proof(
    as_if_on_a_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Queries and keys that meet at the first token, as in PyTorch's `is_causal`: the proof sees the difference."""

    def top_left(
        query: Tensor, key: Tensor, value: Tensor, cu_q: Tensor, cu_k: Tensor, *sizes: int, **options: Any
    ) -> Tensor:
        layouts = Layout.packed(cu_q), Layout.packed(cu_k)
        settings = AttentionSettings(window=(None, 0), scale=options["scale"])  # positions from 0 on both sides
        return reference_attention(query, key, value, *layouts, settings)[0]

    put(monkeypatch, top_left)
    q_layout, kv_layout = LAYOUTS["packed, fewer queries"]
    q, k, v = (x.to(torch.float16) for x in tensors(q_layout, kv_layout))
    options: Any = dict(q_layout=q_layout, kv_layout=kv_layout, causal=True)
    with pytest.warns(UserWarning, match=r"leaves backend 'varlen' on cpu: .*packed, causal.*out is off by"):
        out = attention(q, k, v, **options)
    assert torch.equal(out, attention(q, k, v, **options, backend="reference"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="backend='varlen' cannot run here: it failed its proof"):
        attention(q, k, v, **options, backend="varlen")


X = torch.randn(2, 5, 2, 8, dtype=torch.float16)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"bias": ALiBi(torch.ones(2))}, "does not serve an ALiBi bias"),
        ({"softcap": 2.0}, "does not serve softcap"),
        ({"dropout_p": 0.1}, "does not serve dropout_p"),
        ({"return_lse": True}, "does not serve return_lse"),
        ({"q": X.float(), "k": X.float(), "v": X.float()}, "float16 and bfloat16, not torch.float32"),
        ({"v": X[..., :4]}, "one head dim that is a multiple of 8, not 8 of q and k and 4 of v"),
        ({"q": X[..., :4], "k": X[..., :4], "v": X[..., :4]}, "a multiple of 8, not 4"),
        ({"q": X[:, :3], "window": (2, 2)}, "window without causality only where queries and keys have the same"),
    ],
)
def test_what_it_does_not_serve(as_if_on_a_gpu: None, arguments: dict[str, Any], words: str) -> None:
    given: dict[str, Any] = {"q": X, "k": X, "v": X} | arguments
    with pytest.raises(ValueError, match=rf"backend='varlen' does not serve.*{words}|{words}"):
        attention(**given, backend="varlen")
    attention(**given)  # falls to the reference, which needs no warning: varlen is for plain cases
    assert not CALLS


def test_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="backend='varlen' cannot run here: it needs a GPU and the tensors are on cpu"):
        attention(X, X, X, backend="varlen")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "8.0" in str(attention_varlen.varlen_why_not(torch.device("cuda")))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert attention_varlen.varlen_why_not(torch.device("cuda")) is None
    monkeypatch.setitem(attention_varlen._LOADED, "kernel", None)
    assert "no torch.nn.attention.varlen" in str(attention_varlen.varlen_why_not(torch.device("cuda")))


def test_torch_has_the_signature_that_the_backend_calls() -> None:
    varlen = pytest.importorskip("torch.nn.attention.varlen", reason="torch before 2.10")
    parameters = inspect.signature(varlen.varlen_attn).parameters
    assert list(parameters)[:7] == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
    assert {"scale", "window_size"} <= set(parameters)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("layouts", LAYOUTS)
def test_on_a_gpu_against_the_reference(layouts: str, settings: str, dtype: torch.dtype) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    if attention_varlen.varlen_why_not(device) is not None:
        pytest.skip(str(attention_varlen.varlen_why_not(device)))
    on_cpu = LAYOUTS[layouts]
    on_gpu = [
        Layout.padded(x.mask.to(device)) if x.mask is not None
        else Layout.packed(x.cu_seqlens.to(device)) if x.cu_seqlens is not None
        else Layout.full(x.batch, x.length, device)
        for x in on_cpu
    ]  # fmt: skip
    leaves = [x.detach().to(dtype) for x in tensors(*on_cpu)]
    exact = [x.double().requires_grad_() for x in leaves]
    halves = [x.to(device).requires_grad_() for x in leaves]
    want, _ = reference_attention(*exact, *on_cpu, SETTINGS[settings])
    got, _ = varlen_attention(*halves, *on_gpu, SETTINGS[settings])
    probe = torch.randn(want.shape, dtype=torch.float64)
    wants = [want, *torch.autograd.grad(want, exact, probe)]
    gots = [got, *torch.autograd.grad(got, halves, probe.to(device, dtype))]
    for a, b in zip(gots, wants, strict=True):
        assert (a.cpu().double() - b).abs().max() <= 16 * torch.finfo(dtype).eps * b.abs().max()
