"""`attn_implementation="urform"` for every transformers model: our attention behind the library's own interface.

The function and the mask function are registered under one name. With the function alone every mask builder of the
library returns None, and padding and causality are dropped without a word.

Packed documents are kept apart wherever the model tells its attention about them:

=============================  ============================================  ==========================================
stock model                    `position_ids` that restart                   `cu_seq_lens_q`, `cu_seq_lens_k`
=============================  ============================================  ==========================================
Llama, Qwen3, Gemma2, Mistral  yes, with a cache too (eager leaks there)     yes
GPT-2                          yes, with a cache too                         yes
BERT                           yes (eager and sdpa leak)                     yes
ModernBERT                     no: its attention is not told them            yes; `position_ids` for the rotations
T5                             no: it takes none                             yes, exactly as each document alone
BART, Marian                   no: they take none                            yes, but positions count on through the row
=============================  ============================================  ==========================================

An `attention_mask` with zeros turns `position_ids` off, as it does in the library.

Shapes: B batch, L queries, S keys, N packed tokens, H heads, G key/value heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.utils import logging
from transformers.utils.import_utils import is_tracing

from ..kernels.attention_biases import Bias, DenseBias
from ..kernels.attention_dispatch import attention
from ..kernels.attention_layouts import Layout
from .attention_masks import CompactMask, KnownMask, urform_mask

NAME = "urform"

logger = logging.get_logger(__name__)
T = TypeVar("T")
_Side = tuple[Tensor | None, int | None]  # starts of packed documents and an upper bound on their lengths
_Sides = tuple[tuple[Tensor, int | None], tuple[Tensor, int | None]]  # the queries' and the keys'


def urform_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    position_bias: Tensor | Bias | None = None,
    is_causal: bool | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    q_layout: Layout | None = None,
    kv_layout: Layout | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Serve transformers' attention interface.

    Args:
        module: the model's attention module; `is_causal` is read from it unless given.
        query: `[B, H, L, D]`.
        key: `[B, G, S, D]`.
        value: `[B, G, S, D]`.
        attention_mask: a `CompactMask`, or `[B | 1, H | 1, L, S]`, bool (True attends) or additive; complete: it holds
            causality, window and padding. None: nothing is padded, and if the module is causal the last query meets
            the last key.
        dropout: probability of dropping an attention weight; the models pass 0 in evaluation.
        scaling: factor of the scores; None: `D ** -0.5`.
        sliding_window: keys seen on the left, the query's own included (and as many on the right when not causal).
            Read only with documents or layouts and no mask, as everywhere else the mask says it.
        softcap: bound of the scores.
        position_bias: `[B | 1, H, L, S]`, or a bias object where there is no full `attention_mask`.
        is_causal: overrides `module.is_causal`.
        position_ids: `[B | 1, L]`, of self-attention without a past or padding; where they go back to their first
            value, a packed document begins.
        cu_seq_lens_q: starts of the packed queries and their total, with batch 1 (flash attention's convention). In an
            encoder-decoder: of the decoder's documents.
        cu_seq_lens_k: the same for the keys; None: as the queries. In an encoder-decoder: of the encoder's documents.
        max_length_q: upper bound on the packed queries' lengths.
        max_length_k: the same for the keys.
        q_layout: where the queries' sequences are, from a model that knows (Urform's own); packed ones sit in one row,
            `[1, H, N, D]`. Then causality is the module's, the window and a bias object the arguments', and neither
            `attention_mask` nor `cu_seq_lens_*` may come.
        kv_layout: where the keys' sequences are; None: as the queries.
        kwargs: what other implementations read; ignored, but for what cannot be ignored with a right result.

    Returns:
        `([B, L, H, D], None)`: no weights, as in every fused implementation. Rows that may attend nothing are 0.

    Raises:
        ValueError: attention sinks (`s_aux`), a paged `cache`, or an argument that `attention()` refuses.
    """
    for name, remedy in (("s_aux", "attention sinks need 'eager'"), ("cache", "paged caches need 'paged|sdpa'")):
        if kwargs.get(name) is not None:
            raise ValueError(f"attn_implementation={NAME!r} does not serve {name}: {remedy}")
    if kwargs.get("output_attentions"):
        logger.warning_once(f"attn_implementation={NAME!r} returns no attention weights; set 'eager' to see them")
    if is_causal is None:
        is_causal = getattr(module, "is_causal", None)
    if is_causal is None and attention_mask is None:
        raise ValueError(
            f"{type(module).__name__} has no is_causal and no attention_mask came: causality is unknown; "
            "set the attribute on the module or pass is_causal"
        )
    options = dict(position_bias=position_bias, softcap=softcap, scale=scaling, dropout_p=dropout)
    if q_layout is not None:
        if attention_mask is not None or cu_seq_lens_q is not None:
            raise ValueError("q_layout says where all tokens are; drop attention_mask and cu_seq_lens_q")
        given = _Plan(bool(is_causal), _window(sliding_window), q_layout, q_layout if kv_layout is None else kv_layout)
        return _attend(given, query, key, value, **options), None
    if kv_layout is not None:
        raise ValueError("kv_layout came without q_layout; pass both, or q_layout alone for self-attention")
    if cu_seq_lens_q is not None and key.shape[0] != 1:
        raise ValueError(f"cu_seq_lens_q packs all sequences in one row, but the batch is {key.shape[0]}")
    query = query.expand(key.shape[0], -1, -1, -1)  # some models' learned queries come with batch 1

    length, kv_length = query.shape[2], key.shape[2]
    causal, cross = bool(is_causal), _is_cross(module, bool(is_causal))
    cu_seq_lens = None
    if cu_seq_lens_q is not None:
        starts = (cu_seq_lens_q, max_length_q), (cu_seq_lens_k, max_length_k)
        cu_seq_lens = _sides(module, causal, length == kv_length, *starts)
    if position_ids is not None and (
        length != kv_length
        or cross
        or tuple(position_ids.shape) not in ((1, length), (key.shape[0], length))
        or is_tracing(query)
    ):
        position_ids = None  # they are the queries' alone, or of another kind, or may not be read
    plan: _Plan | None = None
    if attention_mask is None:
        plan = _plan_without_mask(causal, sliding_window, cu_seq_lens, position_ids, key.shape[0])
    elif isinstance(attention_mask, CompactMask):
        known = attention_mask.known
        readable = known.full is None and not is_tracing(query)
        if readable and known.shape == (key.shape[0], 1, length, kv_length):
            plan = known.once(
                (cu_seq_lens_q, cu_seq_lens_k, position_ids, cross),
                lambda: _plan_of_mask(known, cu_seq_lens, position_ids, cross),
            )
        if plan is None:
            attention_mask = attention_mask.to_full()
    if plan is not None:
        return _attend(plan, query, key, value, **options), None

    masks: list[Tensor | None] = [attention_mask]
    if cu_seq_lens is not None:
        # A mask over the packed row may hold more than we know (chunks, prefixes): it stays, and documents are kept
        # apart besides.
        (q_starts, _), (k_starts, _) = cu_seq_lens
        masks.append((_documents(q_starts, length)[:, None] == _documents(k_starts, kv_length))[None, None])
    options["position_bias"] = _join(position_bias, masks, query.dtype)
    return _attend(_Plan(False, None), query, key, value, **options), None


cast(Any, urform_attention_forward).takes_layouts = True  # Urform's stacks ask for this, not for a name


def register_attention() -> None:
    """Register function and mask function as `attn_implementation="urform"`; calling it again changes nothing."""
    AttentionInterface.register(NAME, urform_attention_forward)
    AttentionMaskInterface.register(NAME, urform_mask)


@dataclass(frozen=True, eq=False)
class _Plan:
    """How to call `attention()`: once for all layers of a forward pass that say the same.

    Attributes:
        keys: how many keys to look at; None: all.
        tokens: int64 `[N]`, the packed tokens' places in the flattened rows; None: all, in order.
    """

    causal: bool
    window: tuple[int | None, int | None] | None
    q_layout: Layout | None = None
    kv_layout: Layout | None = None
    keys: int | None = None
    tokens: Tensor | None = None


def _attend(
    plan: _Plan, query: Tensor, key: Tensor, value: Tensor, *, position_bias: Tensor | Bias | None, **options: Any
) -> Tensor:
    """Call `attention()` on `[B, H, L, D]` as planned; give `[B, L, H, D]`."""
    batch, heads, length, _ = query.shape
    if plan.keys is not None:
        key, value = key[:, :, : plan.keys], value[:, :, : plan.keys]
    bias = position_bias
    if isinstance(bias, Tensor):
        bias = DenseBias(_cut(bias, plan, batch, length, key.shape[2]))
    q_packed = plan.q_layout is not None and plan.q_layout.is_packed
    kv_packed = plan.kv_layout is not None and plan.kv_layout.is_packed
    k, v = (_rows(x, kv_packed, plan.tokens) for x in (key, value))
    out = cast(Tensor, attention(
        _rows(query, q_packed, plan.tokens), k, v, q_layout=plan.q_layout, kv_layout=plan.kv_layout,
        causal=plan.causal, window=plan.window, bias=bias, seed=None, **options,
    ))  # fmt: skip
    if plan.tokens is not None:
        out = out.new_zeros(batch * length, *out.shape[1:]).index_copy(0, plan.tokens, out)
    return out.reshape(batch, length, heads, -1).contiguous()


def _rows(x: Tensor, packed: bool, tokens: Tensor | None) -> Tensor:
    """Give `[B, H, L, D]` as `[B, L, H, D]`, or packed as `[N, H, D]`."""
    if not packed:
        return x.transpose(1, 2)
    x_NHD = x[0].transpose(0, 1) if x.shape[0] == 1 else x.transpose(1, 2).flatten(0, 1)
    return x_NHD if tokens is None else x_NHD[tokens]


def _cut(bias: Tensor, plan: _Plan, batch: int, length: int, kv_length: int) -> Tensor:
    """Cut the bias `[B | 1, H | 1, L, S]` of rows to what is planned; packed: to one block for each document."""
    if plan.keys is not None and bias.shape[-1] != 1:
        bias = bias[..., : plan.keys]
    if plan.q_layout is None or plan.kv_layout is None or not (plan.q_layout.is_packed and plan.kv_layout.is_packed):
        return bias
    q_places, k_places = (
        _places(layout, rows_tokens, plan.tokens)
        for layout, rows_tokens in ((plan.q_layout, batch * length), (plan.kv_layout, batch * kv_length))
    )
    bias = bias[(None,) * (4 - bias.dim())].expand(-1, -1, length, kv_length)
    rows = q_places[:, :1, None] // length if bias.shape[0] > 1 else torch.zeros_like(q_places[:, :1, None])
    blocks = bias.permute(0, 2, 3, 1)[rows, q_places[:, :, None] % length, k_places[:, None, :] % kv_length]
    return blocks.permute(0, 3, 1, 2)


def _places(layout: Layout, total: int, tokens: Tensor | None) -> Tensor:
    """Places in the flattened rows of each packed document's tokens, `[documents, length]`; beyond its end: any."""
    starts = cast(Tensor, layout.cu_seqlens)[:-1, None]
    packed = starts + torch.arange(layout.length, device=starts.device)
    packed = packed.clamp(max=(total if tokens is None else len(tokens)) - 1)
    return packed if tokens is None else tokens[packed]


def _plan_without_mask(
    causal: bool, sliding_window: int | None, cu_seq_lens: _Sides | None, position_ids: Tensor | None, batch: int
) -> _Plan:
    """Nothing is padded: documents are all there may be to tell."""
    if cu_seq_lens is not None:
        return _Plan(causal, _window(sliding_window), _packed(*cu_seq_lens[0]), _packed(*cu_seq_lens[1]))
    if position_ids is not None:
        layout = _once(position_ids, batch, lambda: _restarted(position_ids, batch))
        if layout is not None:
            return _Plan(causal, _window(sliding_window), layout, layout)
    return _Plan(causal, None)


def _plan_of_mask(
    known: KnownMask, cu_seq_lens: _Sides | None, position_ids: Tensor | None, cross: bool
) -> _Plan | None:
    """Make layouts of what a mask says, or None where only the full mask will do."""
    padding, documents = known.padding, known.documents
    square = known.q_start == 0 and known.shape[2] == known.keys
    causal = known.causal and (known.shape[2] > 1 or known.window is not None)  # a single query sees every key
    if cu_seq_lens is not None:
        (starts, _), (k_starts, _) = cu_seq_lens
        if padding is None and documents is None and known.keys == known.shape[3]:
            return _Plan(known.causal, known.window, _packed(*cu_seq_lens[0]), _packed(*cu_seq_lens[1]))
        if cross or not square or not (starts is k_starts or torch.equal(starts, k_starts)):
            return None
        told = _documents(starts, known.keys)[None]
        documents = told if documents is None else documents + told  # both go up, so their sum changes where one does
    elif position_ids is not None and square and padding is None and documents is None:
        layout = _restarted(position_ids, known.shape[0])
        if layout is not None:
            return _Plan(known.causal, known.window, layout, layout)
    if documents is not None or (padding is not None and square and (known.causal or known.window is not None)):
        # Self-attention over rows with padding is packed too: with padding left out there is no mask left to build.
        one_each = torch.zeros(known.shape[0], known.keys, dtype=torch.int64, device=known.device)
        layout, tokens = _packed_rows(one_each if documents is None else documents, padding)
        return _Plan(known.causal, known.window, layout, layout, known.keys, tokens)
    q_layout = Layout.full(known.shape[0], known.shape[2], known.device)
    if padding is None:
        kv_layout = q_layout if square else Layout.full(known.shape[0], known.keys, known.device)
    else:
        kv_layout = Layout.padded(padding, finite=True)  # a model's padding is finite where its weights are
        if causal:  # else it may be cross-attention, and nothing is known of the queries
            q_layout = Layout.padded(padding[:, known.q_start :], finite=True)
    return _Plan(causal, known.window, q_layout, kv_layout, known.keys)


def _restarted(position_ids: Tensor, batch: int) -> Layout | None:
    """Lay out the documents of rows whose positions go back to their first value; None where they just go on.

    Positions that do anything else (stand still, jump ahead) tell nothing about documents.
    """
    goes_on = position_ids.diff(dim=-1) == 1
    back = position_ids[:, 1:] == position_ids[:, :1]
    some, all_back, none_goes_on = torch.stack([(~goes_on).any(), (goes_on | back).all(), ~goes_on.any()]).tolist()
    if not some or not all_back or none_goes_on:
        return None
    documents = torch.nn.functional.pad((~goes_on).cumsum(-1), (1, 0))
    return _packed_rows(documents.expand(batch, -1), None)[0]


def _packed_rows(documents: Tensor, padding: Tensor | None) -> tuple[Layout, Tensor | None]:
    """Lay the documents `[B, L]` of all rows end to end; with padding, give the places of the real tokens too."""
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents.diff(dim=-1) != 0
    tokens = None
    if padding is not None:
        tokens = padding.flatten().nonzero()[:, 0]
        numbers = begins.flatten().cumsum(0)[tokens]
        begins = torch.ones_like(numbers, dtype=torch.bool)
        begins[1:] = numbers.diff() != 0
    starts = begins.flatten().nonzero()[:, 0]
    return Layout.packed(torch.cat([starts, starts.new_tensor([begins.numel()])])), tokens


def _packed(cu_seq_lens: Tensor, max_length: int | None) -> Layout:
    """Make the layout that all layers share."""
    # Of a view: a layout that held the tensor itself would keep it, and be kept, for ever.
    return _once(cu_seq_lens, max_length, lambda: Layout.packed(cu_seq_lens.detach(), max_length))


def _once(tensor: Tensor, name: Any, build: Callable[[], T]) -> T:
    """Remember what was built from a tensor for as long as the tensor lives unchanged."""
    if is_tracing(tensor) or tensor.is_inference():  # nothing says when those change
        return build()
    if tensor not in _BUILT or _BUILT[tensor][0] != tensor._version:
        _BUILT[tensor] = (tensor._version, {})
    built = _BUILT[tensor][1]
    if name not in built:
        built[name] = build()
    return cast(T, built[name])


_BUILT: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _sides(module: nn.Module, causal: bool, square: bool, q_side: _Side, k_side: _Side) -> _Sides:
    """Say which documents are the queries' and which the keys'.

    An encoder-decoder hands the decoder's starts and the encoder's to every attention alike; the encoder's own has
    the latter on both sides, the decoder's own the former.
    """
    if k_side[0] is None:
        k_side = q_side
    if square and causal:
        k_side = q_side
    elif square and getattr(module, "is_decoder", None) is False:
        q_side = k_side
    return cast(_Sides, (q_side, k_side))


def _is_cross(module: nn.Module, causal: bool) -> bool:
    """Whether keys come from elsewhere, going by what the library's modules say of themselves."""
    said = getattr(module, "is_cross_attention", False) or "Cross" in type(module).__name__
    return said or (not causal and getattr(module, "is_decoder", False) is True)


def _window(sliding_window: int | None) -> tuple[int, int] | None:
    """Read transformers' count of keys, the query's own included, as distances."""
    return None if sliding_window is None else (sliding_window - 1, sliding_window - 1)


def _documents(cu_seq_lens: Tensor, length: int) -> Tensor:
    """Number the documents of a packed row, `[length]`."""
    places = torch.arange(length, device=cu_seq_lens.device, dtype=cu_seq_lens.dtype)
    return torch.searchsorted(cu_seq_lens[1:].contiguous(), places, right=True)


def _join(position_bias: Tensor | Bias | None, masks: list[Tensor | None], dtype: torch.dtype) -> Bias | None:
    """Add everything up in one bias; what a mask forbids becomes -inf, so that rows without a key are known."""
    given = [mask for mask in masks if mask is not None]
    if isinstance(position_bias, Bias):
        if given:
            raise ValueError(
                f"position_bias is a {type(position_bias).__name__} beside an attention_mask; pass "
                "bias.dense(q_positions, k_positions), or call attention() with layouts"
            )
        return position_bias
    total = position_bias
    for mask in given:
        if mask.dtype == torch.bool:
            base = torch.zeros((), dtype=dtype, device=mask.device) if total is None else total
            total = torch.where(mask, base, -torch.inf)
        else:
            additive = mask.masked_fill(mask <= torch.finfo(mask.dtype).min, -torch.inf)
            total = additive if total is None else total + additive
    return None if total is None else DenseBias(total)


register_attention()
