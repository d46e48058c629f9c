"""attn_implementation="urform" on stock models of transformers: the same outputs as eager, under every mask."""

from __future__ import annotations

import copy
import logging
import warnings
from typing import Any

import pytest
import torch
from numerics import assert_within, exact, finite_masks
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertModel,
    BloomConfig,
    BloomModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MarianConfig,
    MarianMTModel,
    MistralConfig,
    MistralForCausalLM,
    ModernBertConfig,
    ModernBertModel,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
    masking_utils,
)

from urform import UrformConfig, UrformForCausalLM
from urform.modeling.kernels.attention_biases import ALiBi
from urform.modeling.kernels.attention_dispatch import attention
from urform.modeling.kernels.attention_layouts import Layout
from urform.modeling.stock_models.attention_interface import register_attention, urform_attention_forward, urform_mask
from urform.modeling.stock_models.attention_masks import CompactMask

COMMON: dict[str, Any] = dict(
    vocab_size=50, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0
)
DECODER = COMMON | {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}
BART = dict(
    vocab_size=50, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
    encoder_ffn_dim=40, decoder_ffn_dim=40, max_position_embeddings=64, pad_token_id=0,
)  # fmt: skip
FAMILIES: dict[str, tuple[type[PreTrainedModel], Any]] = {
    "bert": (BertModel, BertConfig(**COMMON)),
    "modernbert": (ModernBertModel, ModernBertConfig(**COMMON, local_attention=4, global_attn_every_n_layers=2)),
    "llama": (LlamaForCausalLM, LlamaConfig(**DECODER)),
    "qwen3-sliding": (
        Qwen3ForCausalLM,
        Qwen3Config(**DECODER, use_sliding_window=True, sliding_window=4, max_window_layers=1),
    ),
    "mistral": (MistralForCausalLM, MistralConfig(**DECODER, sliding_window=4)),
    "gpt2": (GPT2LMHeadModel, GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=64)),
    "gemma2": (
        Gemma2ForCausalLM,
        Gemma2Config(**DECODER, sliding_window=4, attn_logit_softcapping=3.0, query_pre_attn_scalar=8),
    ),
    "t5": (
        T5ForConditionalGeneration,
        T5Config(vocab_size=50, d_model=32, d_kv=8, d_ff=40, num_layers=2, num_heads=4, decoder_start_token_id=0),
    ),
    "bart": (BartForConditionalGeneration, BartConfig(**BART)),
    "marian": (MarianMTModel, MarianConfig(**BART, decoder_start_token_id=0)),
}
ENCODER_DECODERS = ("t5", "bart", "marian")
DECODERS = ("llama", "qwen3-sliding", "mistral", "gpt2", "gemma2")
B, L = 3, 11


@pytest.fixture(autouse=True)
def _finite_masks() -> Any:
    with finite_masks():
        yield


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="attention.. runs on")
        yield


def build(family: str, implementation: str, dropout: float = 0.0, **changes: Any) -> PreTrainedModel:
    cls, config = FAMILIES[family]
    config = copy.deepcopy(config)
    config.update(changes)
    for name in ("attention_dropout", "attention_probs_dropout_prob", "dropout_rate", "attn_pdrop"):
        if name in config.to_dict():
            setattr(config, name, dropout)
    torch.manual_seed(0)
    model = cls._from_config(config, attn_implementation=implementation).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # away from the near-uniform attention of a fresh model
            if parameter.dim() > 1:
                parameter.mul_(4)
            elif name.endswith("bias"):
                parameter.normal_(std=0.2)
    return model


def mask_of(kind: str) -> Tensor:
    mask = torch.ones(B, L, dtype=torch.long)
    mask[1, 7:], mask[2, 2:] = 0, 0
    if kind == "both":
        mask = mask.roll(2, 1)
    return mask.flip(1) if kind == "left" else torch.ones_like(mask) if kind == "none" else mask


def inputs(family: str, kind: str | None) -> dict[str, Tensor]:
    torch.manual_seed(1)
    given = {"input_ids": torch.randint(3, 50, (B, L))}
    if kind is not None:
        given["attention_mask"] = mask_of(kind)
    if family in ENCODER_DECODERS:
        given["decoder_input_ids"] = torch.randint(3, 50, (B, 7))
        if kind is not None:
            # The other way round than the source, and of other lengths
            given["decoder_attention_mask"] = mask_of({"left": "right", "right": "left"}.get(kind, kind))[:, 2:-2]
    return given


def real(family: str, given: dict[str, Tensor]) -> Tensor:
    """Where the output is that of a real token."""
    name = "decoder_" if family in ENCODER_DECODERS else ""
    return given.get(f"{name}attention_mask", torch.ones_like(given[f"{name}input_ids"])).bool()


@pytest.mark.parametrize("kind", [None, "none", "left", "right", "both"])
@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_and_gradients_are_eager_s(family: str, kind: str | None) -> None:
    """Outputs and gradients: at most twice as far from eager in float64 as eager in float32 is."""
    given = inputs(family, kind)
    keep = real(family, given)
    results = []
    for implementation, dtype in (("urform", torch.float32), ("eager", torch.float32), ("eager", torch.float64)):
        model = build(family, implementation).to(dtype)
        out = model(**given)[0][keep]
        results.append((out, gradients(model, out)))
    assert_within(*results)


SIZES_PACKED = (6, 1, 7)
STARTS = torch.tensor([0, 6, 7, 14], dtype=torch.int32)
BY_LENGTHS: dict[str, Any] = dict(cu_seq_lens_q=STARTS, cu_seq_lens_k=STARTS, max_length_q=7, max_length_k=7)


def packed(rows: int = 1) -> tuple[Tensor, Tensor]:
    ids = torch.randint(3, 50, (rows, 14), generator=torch.Generator().manual_seed(2))
    return ids, torch.cat([torch.arange(n) for n in SIZES_PACKED])[None].expand(rows, -1)


def each_alone(family: str, ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
    """What eager gives for each document by itself, and the gradients of all together."""
    model = build(family, "eager").to(dtype)
    rows = [
        torch.cat([model(input_ids=part)[0] for part in row[None].split(SIZES_PACKED, dim=1)], dim=1) for row in ids
    ]
    return torch.cat(rows), gradients(model, torch.cat(rows))


def alone_in_both(family: str, ids: Tensor) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """`each_alone` in float32 and in float64."""
    return [each_alone(family, ids, dtype) for dtype in (torch.float32, torch.float64)]


def gradients(model: PreTrainedModel, out: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    out.square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize(
    ("family", "use_cache"), [("bert", False), *((name, cached) for name in DECODERS for cached in (False, True))]
)
def test_packing_by_position_ids(family: str, use_cache: bool, rows: int) -> None:
    """With a cache too, and in BERT, where eager and sdpa let documents see each other."""
    ids, positions = packed(rows)
    alone = alone_in_both(family, ids)
    options = {} if family == "bert" else {"use_cache": use_cache}
    model = build(family, "urform")
    out = model(input_ids=ids, position_ids=positions, **options)[0]
    assert_within((out, gradients(model, out)), *alone)
    if family != "bert" and not use_cache:
        eager = build(family, "eager")(input_ids=ids, position_ids=positions, use_cache=False)[0]
        assert_within(out, eager, alone[1][0])


@pytest.mark.parametrize("family", [*DECODERS, "bert", "modernbert"])
def test_packing_by_cu_seq_lens(family: str) -> None:
    ids, positions = packed()
    alone = alone_in_both(family, ids)
    model = build(family, "urform")
    for mask in (None, torch.ones_like(ids)):  # the ones hide the packing from the library's mask builders
        for use_cache in ({"use_cache": False}, {"use_cache": True}) if family in DECODERS else ({},):
            out = model(input_ids=ids, position_ids=positions, attention_mask=mask, **use_cache, **BY_LENGTHS)[0]
            assert_within((out, gradients(model, out)), *alone)


@pytest.mark.parametrize("family", [*DECODERS, "bert", "modernbert"])
def test_packing_with_padding_behind(family: str) -> None:
    ids, positions = packed()
    (alone, _), (truth, _) = alone_in_both(family, ids)
    ids = torch.nn.functional.pad(ids, (0, 2), value=3)
    positions = torch.cat([positions, torch.arange(2)[None]], dim=1)
    starts = torch.tensor([0, 6, 7, 14, 16])
    mask = (torch.arange(16) < 14).long()[None]
    lengths = dict(cu_seq_lens_q=starts, cu_seq_lens_k=starts.clone(), max_length_q=7, max_length_k=7)
    out = build(family, "urform")(input_ids=ids, position_ids=positions, attention_mask=mask, **lengths)[0]
    assert_within(out[:, :14], alone, truth)


@pytest.mark.parametrize("equal", [False, True])
def test_packed_t5(equal: bool) -> None:
    """Its bias comes for the whole row; cut by documents it is that of each alone. Lengths differ between the sides."""
    source_sizes, target_sizes = ((6, 1, 7), (2, 5, 7)) if equal else ((6, 1, 7), (2, 5, 4))
    gen = torch.Generator().manual_seed(3)
    source, target = (torch.randint(3, 50, (1, sum(n)), generator=gen) for n in (source_sizes, target_sizes))
    starts = [torch.tensor([0, *n]).cumsum(0).to(torch.int32) for n in (source_sizes, target_sizes)]
    alone = []
    for dtype in (torch.float32, torch.float64):
        eager = build("t5", "eager").to(dtype)
        pairs = zip(source.split(source_sizes, 1), target.split(target_sizes, 1), strict=True)
        states = torch.cat([eager(input_ids=a, decoder_input_ids=b)[0] for a, b in pairs], dim=1)
        alone.append((states, gradients(eager, states)))
    model = build("t5", "urform")
    out = model(
        input_ids=source, decoder_input_ids=target, cu_seq_lens_q=starts[1], cu_seq_lens_k=starts[0],
        max_length_q=max(target_sizes), max_length_k=max(source_sizes),
    )[0]  # fmt: skip
    assert_within((out, gradients(model, out)), *alone)


@pytest.mark.parametrize("family", ["bart", "marian"])
def test_packed_encoder_decoders_keep_documents_apart(family: str) -> None:
    """Positions count on through the row in these models, but nothing else crosses."""
    source, _ = packed()
    target = source.flip(1)[:, :11]
    lengths = dict(cu_seq_lens_q=torch.tensor([0, 2, 7, 11]), cu_seq_lens_k=torch.tensor([0, 6, 7, 14]))
    model = build(family, "urform")
    out = model(input_ids=source, decoder_input_ids=target, **lengths)[0]
    source[:, 6] = source[:, 6] % 40 + 5
    target[:, 2:7] = target[:, 2:7] % 40 + 5
    moved = model(input_ids=source, decoder_input_ids=target, **lengths)[0]
    same = (out == moved).all(-1)[0]
    assert same.tolist() == [True] * 2 + [False] * 5 + [True] * 4


@pytest.mark.parametrize("family", ["llama", "urform"])
@pytest.mark.parametrize(
    ("positions", "sizes"),
    [
        ([0, 1, 2, 5, 6], (3, 2)),
        ([0, 1, 2, 1, 2], (3, 2)),
        ([3, 4, 5, 0, 1], (3, 2)),
        ([2, 3, 4, 5, 6], (5,)),
        ([0, 0, 1, 1, 2], (1, 2, 2)),
    ],
)
def test_one_rule_for_documents(family: str, positions: list[int], sizes: tuple[int, ...]) -> None:
    """A document begins where a position is not the one before plus one, in stock models and in Urform's."""
    ids, places = packed()[0][:, :5], torch.tensor([positions])
    if family == "llama":
        model, eager, options = build("llama", "urform"), build("llama", "eager"), {"use_cache": True}
    else:
        config = UrformConfig(
            architecture="decoder", vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=24, max_position_embeddings=32,
        )  # fmt: skip
        model, options = UrformForCausalLM(config).eval(), {}
        eager = copy.deepcopy(model)
        eager.set_attn_implementation("eager")
    documents = list(zip(ids.split(sizes, 1), places.split(sizes, 1), strict=True))
    alone, truth = (
        torch.cat([m(input_ids=part, position_ids=place)[0] for part, place in documents], dim=1)
        for m in (eager, exact(eager))
    )
    assert_within(model(input_ids=ids, position_ids=places, **options)[0], alone, truth)


def test_positions_changed_in_place_are_read_again() -> None:
    ids, positions = packed()
    positions = positions.clone()
    model = build("bert", "urform")
    first = model(input_ids=ids, position_ids=positions)[0]
    positions.copy_(torch.arange(14))
    eager = build("bert", "eager")
    got, want, truth = (m(input_ids=ids, position_ids=positions)[0] for m in (model, eager, exact(eager)))
    assert_within(got, want, truth)
    assert not torch.allclose(first, got)


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("family", [*DECODERS, *ENCODER_DECODERS])
def test_generation_with_padding(family: str, cache: str | None) -> None:
    given = {k: v for k, v in inputs(family, "left").items() if not k.startswith("decoder_")}
    options = dict(max_new_tokens=9, min_new_tokens=9, do_sample=False, cache_implementation=cache)
    options |= {"disable_compile": True} if cache else {}
    want = build(family, "eager").generate(**given, **options)
    got = build(family, "urform").generate(**given, **options)
    assert torch.equal(got, want)


@pytest.mark.parametrize("family", DECODERS)
def test_static_cache_without_a_mask(family: str) -> None:
    """Keys behind the last query are not written yet, and no mask says so."""
    ids = inputs(family, None)["input_ids"]
    outs = []
    for implementation, dtype in (("urform", torch.float32), ("eager", torch.float32), ("eager", torch.float64)):
        model = build(family, implementation).to(dtype)
        cache = StaticCache(config=model.config, max_cache_len=20)
        steps = [model(input_ids=part, past_key_values=cache)[0] for part in ids.split((6, 1, 3, 1), dim=1)]
        outs.append(torch.cat(steps, dim=1))
    assert_within(*outs)


@pytest.mark.parametrize("family", ["bert", "llama", "t5", "gemma2"])
def test_dropout_in_training_only(family: str) -> None:
    given = inputs(family, "right")
    model = build(family, "urform", dropout=0.5)
    assert torch.equal(model(**given)[0], model(**given)[0])
    if family != "t5":  # T5 drops elsewhere too
        for module in model.modules():
            module.training = "Attention" in type(module).__name__
    else:
        model.train()
    first, second = model(**given)[0], model(**given)[0]
    assert first.isfinite().all() and not torch.equal(first, second)


class Module(nn.Module):
    is_causal = True


def heads(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(shape[-2]))


def double(tree: Any) -> Any:
    """The same with its floats in float64, biases that are objects included."""
    if isinstance(tree, dict):
        return {name: double(value) for name, value in tree.items()}
    if isinstance(tree, ALiBi):
        return ALiBi(tree.weight.double())
    return tree.double() if isinstance(tree, Tensor) and tree.is_floating_point() else tree


@pytest.mark.parametrize("additive", [False, True])
def test_rows_without_a_key_are_zero(additive: bool) -> None:
    q, k = heads(2, 4, 5, 8).requires_grad_(), heads(2, 2, 7, 8).requires_grad_()
    mask = torch.rand(2, 1, 5, 7) < 0.5
    mask[0, :, 2] = False
    given = torch.zeros(2, 1, 5, 7).masked_fill(~mask, torch.finfo(torch.float32).min) if additive else mask
    out, weights = urform_attention_forward(Module(), q, k, k, given)
    assert weights is None and out.shape == (2, 5, 4, 8) and out.is_contiguous()
    assert (out[0, 2] == 0).all() and (out[0, 1] != 0).any()
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), [q, k]))


def test_packed_cross_attention_and_bias_objects() -> None:
    q, k = heads(1, 4, 5, 8), heads(1, 2, 9, 8)
    cu_q, cu_k = torch.tensor([0, 2, 5]), torch.tensor([0, 6, 9])
    bias = ALiBi(torch.tensor([0.5, 0.2, 0.1, 0.7]))
    call: dict[str, Any] = dict(is_causal=False, position_bias=bias)
    packed, _ = urform_attention_forward(Module(), q, k, k, None, cu_seq_lens_q=cu_q, cu_seq_lens_k=cu_k, **call)
    for (a, b), (c, d) in zip(((0, 2), (2, 5)), ((0, 6), (6, 9)), strict=True):
        part = k[:, :, c:d]
        alone, truth = (
            urform_attention_forward(Module(), to(q[:, :, a:b]), to(part), to(part), None, **to(call))[0]
            for to in (lambda x: x, double)
        )
        assert_within(packed[:, a:b], alone, truth)


@pytest.mark.parametrize("causal", [False, True])
def test_layouts_from_a_model_that_knows(causal: bool) -> None:
    bias = ALiBi(torch.tensor([0.5, 0.2, 0.1, 0.7]))
    q, k = heads(1, 4, 5, 8), heads(1, 2, 9, 8)
    q_layout, kv_layout = Layout.packed(torch.tensor([0, 2, 5])), Layout.packed(torch.tensor([0, 6, 9]))
    call: dict[str, Any] = dict(causal=causal, window=(2, 2), softcap=4.0, scale=0.3, bias=bias)
    rows = [x[0].transpose(0, 1) for x in (q, k, k)]
    packed = attention(*rows, q_layout=q_layout, kv_layout=kv_layout, **call)[None]
    q_pad, k_pad = torch.zeros(2, 4, 3, 8), torch.zeros(2, 2, 6, 8)
    q_pad[0, :, :2], q_pad[1], k_pad[0], k_pad[1, :, :3] = q[0, :, :2], q[0, :, 2:], k[0, :, :6], k[0, :, 6:]
    layouts = dict(
        q_layout=Layout.padded(torch.tensor([[1, 1, 0], [1, 1, 1]])),
        kv_layout=Layout.padded(torch.tensor([[1] * 6, [1, 1, 1, 0, 0, 0]])),
    )
    padded = attention(*(x.transpose(1, 2) for x in (q_pad, k_pad, k_pad)), **layouts, **call)
    assert packed.shape == (1, 5, 4, 8)
    for (a, b), (c, d) in zip(((0, 2), (2, 5)), ((0, 6), (6, 9)), strict=True):
        keys = k[:, :, c:d].transpose(1, 2)
        options: dict[str, Any] = dict(causal=causal, window=(2, 2), softcap=4.0, scale=0.3, backend="reference")
        alone, truth = (
            attention(to(q[:, :, a:b].transpose(1, 2)), to(keys), to(keys), bias=to(bias), **options)
            for to in (lambda x: x, double)
        )
        assert_within(packed[:, a:b], alone, truth)
        assert_within(padded[:1, :2] if a == 0 else padded[1:], alone, truth)


@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_cu_seq_lens_beside_a_mask_or_a_bias_tensor(causal: bool, with_mask: bool) -> None:
    """Neither says where documents end; both stay in force."""
    q, k, bias = heads(1, 4, 7, 8), heads(1, 2, 9, 8), heads(1, 4, 7, 9)
    module = Module()
    module.is_causal = causal
    mask = torch.rand(1, 1, 7, 9, generator=torch.Generator().manual_seed(1)) < 0.7 if with_mask else None
    cu_q, cu_k = torch.tensor([0, 3, 7]), torch.tensor([0, 4, 9])
    call: dict[str, Any] = dict(cu_seq_lens_q=cu_q, cu_seq_lens_k=cu_k, position_bias=bias)
    packed, _ = urform_attention_forward(module, q, k, k, mask, **call)
    for rows, columns in ((slice(0, 3), slice(0, 4)), (slice(3, 7), slice(4, 9))):
        part, own = k[:, :, columns], mask if mask is None else mask[..., rows, columns]
        alone, truth = (
            urform_attention_forward(
                module, to(q[:, :, rows]), to(part), to(part), own, position_bias=to(bias[..., rows, columns])
            )[0]
            for to in (lambda x: x, double)
        )
        assert_within(packed[:, rows], alone, truth)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"s_aux": torch.zeros(4)}, ["s_aux", "eager"]),
        ({"cache": object()}, ["cache"]),
        ({"cu_seq_lens_q": torch.tensor([0, 5])}, ["cu_seq_lens_q", "batch is 2"]),
        ({"attention_mask": torch.ones(1, 1, 5, 5) > 0, "position_bias": ALiBi(torch.ones(4))}, ["ALiBi", "dense"]),
        ({"module": nn.Linear(1, 1)}, ["Linear", "is_causal"]),
        ({"attention_mask": torch.ones(1, 1, 5, 9) > 0}, ["5, 9", "[2, 4, 5, 5]"]),
    ],
)
def test_refuses_by_name(options: dict[str, Any], words: list[str]) -> None:
    x = heads(2, 4, 5, 8)
    with pytest.raises(ValueError) as error:
        given = {"module": Module(), "query": x, "key": x, "value": x, "attention_mask": None}
        urform_attention_forward(**(given | options))
    for word in words:
        assert word in str(error.value)


def eager_attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, bias: Tensor | None) -> Tensor:
    """Attention `[B, H, L, D]` as the definition reads; rows that see nothing are 0."""
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    scores = scores + (0 if bias is None else bias)
    weights = torch.nan_to_num(scores.masked_fill(~seen, -torch.inf).softmax(-1), 0.0)
    return (weights @ v).transpose(1, 2)


def both(x: Tensor, seen: Tensor) -> list[Tensor]:
    """`eager_attention` of x with itself in float32 and in float64."""
    return [eager_attention(y, y, y, seen, None) for y in (x, x.double())]


PADDINGS: dict[str, Any] = {
    "none": None,
    "ones": lambda mask: mask,
    "left": lambda mask: mask.index_fill(1, torch.tensor([0, 1]), 0),
    "ragged": lambda mask: mask.tril(mask.shape[1] - 4),
    "both": lambda mask: mask.tril(mask.shape[1] - 2).triu(-1),
    "empty row": lambda mask: mask.index_fill(0, torch.tensor([1]), 0),
    "holes": lambda mask: mask.index_fill(1, torch.tensor([2, 4]), 0),
}
FUNCTIONS: dict[str, Any] = {
    "causal": masking_utils.causal_mask_function,
    "bidirectional": masking_utils.bidirectional_mask_function,
    "sliding": masking_utils.sliding_window_causal_mask_function(3),
    "sliding both": masking_utils.sliding_window_bidirectional_mask_function(2),
    "wide": masking_utils.sliding_window_causal_mask_function(50),
    "unknown": masking_utils.and_masks(
        masking_utils.causal_mask_function, lambda batch, head, query, key: (query + key) % 3 != 0
    ),
}
SIZES = {  # queries, keys, index of the first query, index of the first key
    "no past": (8, 8, 0, 0),
    "past": (3, 8, 5, 0),
    "one query": (1, 8, 7, 0),
    "static": (3, 8, 2, 0),
    "static, tensor": (3, 8, torch.tensor(2), 0),
    "static, one query": (1, 8, torch.tensor(4), 0),
    "sliding cache": (4, 6, 6, 4),
    "cross": (3, 8, 0, 0),
}


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_masks_say_what_the_library_s_say(function: str, sizes: str, padding: str) -> None:
    length, kv_length, q_offset, kv_offset = SIZES[sizes]
    causal = function not in ("bidirectional", "sliding both")
    total = kv_offset + kv_length
    mask_2d = PADDINGS[padding] and PADDINGS[padding](torch.ones(B, total, dtype=torch.bool))
    given: dict[str, Any] = dict(
        batch_size=B, q_length=length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset,
        mask_function=FUNCTIONS[function], attention_mask=mask_2d,
    )  # fmt: skip
    given["local_size"] = {"sliding": 3, "sliding both": 2, "wide": 50}.get(function)
    mask = urform_mask(**given)
    seen = masking_utils.sdpa_mask(**given, allow_is_causal_skip=False)
    known = function != "unknown" and not (length == 1 and isinstance(q_offset, Tensor))
    if function == "sliding both" and length != kv_length:
        known = False
    if "sliding" in function and padding == "holes" and kv_offset == 0 and sizes != "cross":
        known = False
    assert isinstance(mask, CompactMask) == known

    module = Module()
    module.is_causal = causal
    gen = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(B, h, n, 8, generator=gen) for h, n in ((4, length), (2, kv_length), (2, kv_length)))
    bias = torch.randn(1, 4, length, kv_length, generator=gen)
    # Rows of padding may be anything, and are nothing in the reference.
    real = torch.ones(B, length, dtype=torch.bool)
    if causal and mask_2d is not None:
        real = mask_2d[:, int(q_offset) : int(q_offset) + length]
    elif function == "sliding both" and mask_2d is not None and length == kv_length:
        real = mask_2d
    for add in (None, bias):
        given_heads = [q, k, v] if add is None else [q, k, v, add]
        weight = torch.randn(q.transpose(1, 2)[real].shape, generator=gen)
        results = []
        for dtype in (None, torch.float32, torch.float64):  # ours, and twice the definition
            x = [tensor.to(dtype or torch.float32, copy=True).requires_grad_() for tensor in given_heads]
            more = None if add is None else x[3]
            if dtype is None:
                out, _ = urform_attention_forward(module, *x[:3], mask, position_bias=more)
            else:
                out = eager_attention(*x[:3], seen, more)
            grads = torch.autograd.grad((out[real] * weight.to(out.dtype)).sum(), x)
            results.append((out[real], grads))
        assert_within(*results)


def test_causality_does_not_hang_on_the_module() -> None:
    """Some decoders' modules do not say that they are causal (NLLB-MoE), and some that are used as encoders do."""
    x = heads(2, 4, 5, 8)
    module = Module()
    sizes = dict(batch_size=2, q_length=5, kv_length=5)
    for function in (masking_utils.causal_mask_function, masking_utils.bidirectional_mask_function):
        mask = urform_mask(**sizes, mask_function=function, allow_is_bidirectional_skip=True)
        full = masking_utils.sdpa_mask(**sizes, mask_function=function, allow_is_causal_skip=False)
        for module.is_causal in (False, True):
            out, _ = urform_attention_forward(module, x, x, x, mask)
            assert_within(out, *both(x, full))


@pytest.mark.parametrize("numbers", [[0, 0, 1, 1, 1, 3], [1, 1, 0, 0, 2, 2], [0, 1, 1, 0, 0, 2]])
@pytest.mark.parametrize("window", [None, 2])
def test_documents_by_number(numbers: list[int], window: int | None) -> None:
    """As the library's own function reads them: pieces of one document see each other."""
    parts = [masking_utils.causal_mask_function if window is None else FUNCTIONS["sliding"]]
    parts.append(masking_utils.packed_sequence_mask_function(torch.tensor([numbers, sorted(numbers)])))
    given: dict[str, Any] = dict(batch_size=2, q_length=6, kv_length=6, mask_function=masking_utils.and_masks(*parts))
    padding = torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]]).bool()
    for mask_2d in (None, padding):
        mask = urform_mask(**given, attention_mask=mask_2d)
        assert isinstance(mask, CompactMask) == (numbers == sorted(numbers))
        full = masking_utils.sdpa_mask(**given, attention_mask=mask_2d, allow_is_causal_skip=False)
        x = heads(2, 4, 6, 8)
        out, _ = urform_attention_forward(Module(), x, x, x, mask)
        real = slice(None) if mask_2d is None else mask_2d
        assert_within(out[real], *(want[real] for want in both(x, full)))


def test_a_batch_of_padding_alone() -> None:
    x = heads(2, 4, 6, 8).requires_grad_()
    nothing = torch.zeros(2, 6, dtype=torch.bool)
    for function in ("causal", "bidirectional", "sliding", "sliding both"):
        mask = urform_mask(
            batch_size=2, q_length=6, kv_length=6, mask_function=FUNCTIONS[function], attention_mask=nothing
        )
        out, _ = urform_attention_forward(Module(), x, x, x, mask)
        assert (out == 0).all()
        (grad,) = torch.autograd.grad(out.sum(), [x])
        assert (grad == 0).all()


@pytest.mark.parametrize("padded", [False, True])
def test_models_that_compute_attention_themselves_are_refused(padded: bool) -> None:
    config = BloomConfig(vocab_size=50, hidden_size=32, n_layer=1, n_head=4)
    model = BloomModel._from_config(config, attn_implementation="urform")
    with pytest.raises(ValueError, match="eager"):
        model(**inputs("llama", "left" if padded else None))


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements, self.by = 0, ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and not isinstance(x, CompactMask) and x.numel() > self.elements:
                self.elements, self.by = x.numel(), str(func)
        return out


@pytest.mark.parametrize("case", ["padded", "position_ids", "cu_seq_lens"])
@pytest.mark.parametrize("family", ["llama", "bert", "qwen3-sliding", "modernbert", "bart"])
def test_nothing_is_as_large_as_the_length_squared(family: str, case: str) -> None:
    if family in ("modernbert", "bart") and case == "position_ids":
        return  # they do not hand them to their attention
    length = 2048
    model = build(family, "urform", max_position_embeddings=length)
    ids = torch.randint(3, 50, (2 if case == "padded" else 1, length), generator=torch.Generator().manual_seed(0))
    given: dict[str, Any] = {"input_ids": ids}
    if case == "padded":
        given["attention_mask"] = torch.ones_like(ids)
        given["attention_mask"][1, length // 3 :] = 0
    else:
        given["position_ids"] = torch.arange(length)[None] % (length // 4)
    if case == "cu_seq_lens":
        starts = torch.arange(0, length + 1, length // 4, dtype=torch.int32)
        given |= dict(cu_seq_lens_q=starts, cu_seq_lens_k=starts, max_length_q=length // 4, max_length_k=length // 4)
    if family == "bart":
        given.pop("position_ids", None)
        given["decoder_input_ids"] = ids[:, :512]
        if case == "cu_seq_lens":
            given |= dict(cu_seq_lens_q=starts // 4, max_length_q=length // 16)
    with Largest() as largest:
        model(**given)[0].square().mean().backward()
        with torch.no_grad():
            model(**given)
    assert largest.elements < length * length, largest.by


def test_a_layout_serves_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []

    def record(*args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs)
        return attention(*args, **kwargs)

    monkeypatch.setattr("urform.modeling.stock_models.attention_interface.attention", record)
    ids, positions = packed()
    for family in ("llama", "gemma2", "bert", "bart"):
        calls: list[dict[str, Any]] = [inputs(family, "left")]
        if family != "bart":
            calls += [
                dict(input_ids=ids, position_ids=positions),
                dict(input_ids=ids, position_ids=positions, **BY_LENGTHS),
            ]
        for given in calls:
            seen.clear()
            build(family, "urform")(**given)
            assert all(call["bias"] is None and call["q_layout"] is not None for call in seen)
            kinds = {"gemma2": 2, "bart": 3}.get(family, 1)  # full and sliding; encoder, decoder and across
            assert len(seen) == (6 if family == "bart" else 2)
            assert len({id(call["kv_layout"].memo) for call in seen}) <= kinds


def a_mask(**kwargs: Any) -> Any:
    padding = torch.ones(2, 6, dtype=torch.bool)
    padding[0, :2] = False
    return urform_mask(batch_size=2, q_length=6, kv_length=6, attention_mask=padding, **kwargs)


def test_a_mask_looked_into_is_the_full_mask() -> None:
    full = a_mask().to_full()
    assert full.shape == (2, 1, 6, 6) and full.dtype == torch.bool and full.sum() == 10 + 21
    sliced = a_mask()[:, :, :, :4]
    assert not isinstance(sliced, CompactMask) and torch.equal(sliced, full[..., :4])
    assert torch.equal(a_mask().float(), full.float())
    assert torch.equal(torch.cat([a_mask(), a_mask()], dim=-1), torch.cat([full, full], dim=-1))
    assert torch.equal(a_mask().expand(-1, 4, -1, -1), full.expand(-1, 4, -1, -1))
    assert a_mask().bool().shape == a_mask().to(torch.device("cpu")).shape == full.shape
    assert isinstance(a_mask().detach(), CompactMask) and "causal" in repr(a_mask())
    moved = a_mask().to("meta")
    assert isinstance(moved, CompactMask) and moved.known.padding is not None and moved.known.padding.is_meta


def test_a_mask_written_to_is_obeyed() -> None:
    x = heads(2, 4, 6, 8)
    mask = a_mask()
    before, _ = urform_attention_forward(Module(), x, x, x, mask)
    mask[:, :, 4, 3] = False
    after, _ = urform_attention_forward(Module(), x, x, x, mask)
    full = a_mask().to_full().clone()
    full[:, :, 4, 3] = False
    assert_within(after, *both(x, full))
    assert not torch.allclose(before[:, 4], after[:, 4])


def test_a_mask_of_another_size_is_refused() -> None:
    x = heads(2, 4, 5, 8)
    with pytest.raises(ValueError, match=r"6, 6.*\[2, 4, 5, 5\]"):
        urform_attention_forward(Module(), x, x, x, a_mask())


def test_unknown_masks_are_built_and_named(caplog: pytest.LogCaptureFixture) -> None:
    def odd(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return (query + key) % 2 == 0

    transformers_logger = logging.getLogger("transformers")
    transformers_logger.addHandler(caplog.handler)
    try:
        mask = a_mask(mask_function=masking_utils.or_masks(masking_utils.causal_mask_function, odd))
    finally:
        transformers_logger.removeHandler(caplog.handler)
    assert not isinstance(mask, CompactMask) and mask.dtype == torch.bool
    assert "or_mask" in caplog.text


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_gradient_checkpointing(family: str, reentrant: bool) -> None:
    given, results = inputs(family, "left"), []
    for checkpointing, dtype in ((True, torch.float32), (False, torch.float32), (False, torch.float64)):
        model = build(family, "urform").to(dtype).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        results.append(gradients(model, model(**given)[0]))
    assert_within(*results)


@pytest.mark.parametrize("family", ["llama", "bert", pytest.param("gemma2", marks=pytest.mark.slow)])
def test_compile_and_export(family: str) -> None:
    torch.compiler.reset()
    given = inputs(family, "left")
    keep = real(family, given)
    eager = build(family, "eager")
    want = [m(**given)[0][keep] for m in (eager, exact(eager))]
    model = build(family, "urform")
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert_within(compiled(**given)[0][keep], *want)
    if family != "bert":
        for length in (16, 24) if family == "llama" else (16,):  # the second time sizes are symbols
            cache = StaticCache(config=model.config, max_cache_len=length)
            got = compiled(**given, past_key_values=cache)[0][keep]
            assert_within(got, *want)
        model.config.use_cache = False
    with torch.no_grad():  # the blockwise backend's own backward is not exported
        exported = torch.export.export(model, (), given, strict=False).module()
        assert_within(exported(**given)[0][keep], *want)


@pytest.mark.slow
def test_generation_in_compiled_graphs() -> None:
    """The library makes the mask outside of the graph, and the graph takes it."""
    torch.compiler.reset()
    model, eager = build("llama", "urform"), build("llama", "eager")
    model.forward = torch.compile(model.forward, fullgraph=True, backend="eager")  # type: ignore[method-assign]
    options: dict[str, Any] = dict(max_new_tokens=4, min_new_tokens=4, do_sample=False)
    for kind in ("left", "none"):
        given = inputs("llama", kind)
        got = model.generate(**given, **options, cache_implementation="static")
        assert torch.equal(got, eager.generate(**given, **options))


@pytest.mark.parametrize("family", ["llama", "gemma2", "t5", "bart"])
def test_beam_search(family: str) -> None:
    given = {k: v for k, v in inputs(family, "left").items() if not k.startswith("decoder_")}
    options: dict[str, Any] = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False, num_beams=3)
    assert torch.equal(
        build(family, "urform").generate(**given, **options), build(family, "eager").generate(**given, **options)
    )


def test_registering_again_changes_nothing() -> None:
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    register_attention()
    assert ALL_ATTENTION_FUNCTIONS["urform"] is urform_attention_forward
    assert ALL_MASK_ATTENTION_FUNCTIONS["urform"] is urform_mask
