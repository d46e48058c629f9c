"""`attn_implementation="urform"` for every transformers model: our attention through the library's own interface.

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
from ..kernels.packed_documents import find_documents, number_documents
from .attention_masks import CompactMask, KnownMask, urform_mask

NAME = "urform"

logger = logging.get_logger(__name__)
T = TypeVar("T")
Starts = tuple[Tensor, "int | None"]  # starts of packed documents, and an upper bound on their lengths
BothStarts = tuple[Starts, Starts]  # the queries' and the keys'


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
            Read only with packed documents and no mask, as everywhere else the mask says it.
        softcap: bound of the scores.
        position_bias: `[B | 1, H, L, S]`, or a bias object where there is no full `attention_mask`.
        is_causal: overrides `module.is_causal`.
        position_ids: `[B | 1, L]`, of self-attention without a past or padding; packed documents are found in them by
            `find_documents`, as in Urform's own models.
        cu_seq_lens_q: starts of the packed queries and their total, with batch 1 (flash attention's convention). In an
            encoder-decoder: of the decoder's documents.
        cu_seq_lens_k: the same for the keys; None: as the queries. In an encoder-decoder: of the encoder's documents.
        max_length_q: upper bound on the packed queries' lengths.
        max_length_k: the same for the keys.
        kwargs: what other implementations read; ignored, but for what cannot be ignored with a right result.

    Returns:
        `([B, L, H, D], None)`: no weights, as in every fused implementation. Rows that may attend nothing are 0.

    Raises:
        ValueError: attention sinks (`s_aux`), a paged `cache`, or an argument that `attention()` refuses.
    """
    _refuse_unserved(kwargs)
    causal = _causality(module, is_causal, attention_mask)
    if cu_seq_lens_q is not None and key.shape[0] != 1:
        raise ValueError(f"cu_seq_lens_q packs all sequences in one row, but the batch is {key.shape[0]}")
    query = query.expand(key.shape[0], -1, -1, -1)  # some models' learned queries come with batch 1
    cross, starts = _is_cross(module, causal), None
    if cu_seq_lens_q is not None:
        given = (cu_seq_lens_q, max_length_q), (cu_seq_lens_q if cu_seq_lens_k is None else cu_seq_lens_k, max_length_k)
        starts = _both_starts(module, causal, query.shape[2] == key.shape[2], *given)
    if position_ids is not None and not _are_own_positions(position_ids, query, key, cross):
        position_ids = None
    options = dict(softcap=softcap, scale=scaling, dropout_p=dropout)
    rows = None
    if attention_mask is None:
        rows = _rows_without_mask(causal, sliding_window, starts, position_ids, key.shape[0])
    elif isinstance(attention_mask, CompactMask):
        rows = _rows_of_mask(attention_mask.known, query, key, starts, position_ids, cross)
    if rows is not None:
        return _attend(rows, query, key, value, position_bias, **options), None
    bias = _join(position_bias, _full_masks(attention_mask, starts, query.shape[2], key.shape[2]), query.dtype)
    return _attend(Rows(False, None), query, key, value, bias, **options), None


cast(Any, urform_attention_forward).takes_layouts = True  # Urform's stacks ask for this, not for a name


def register_attention() -> None:
    """Register function and mask function as `attn_implementation="urform"`; calling it again changes nothing."""
    AttentionInterface.register(NAME, urform_attention_forward)
    AttentionMaskInterface.register(NAME, urform_mask)


@dataclass(frozen=True, eq=False)
class Rows:
    """What the rows of a batch hold, as `attention()` is told: once for all layers of a forward pass that say the same.

    Attributes:
        causal: the last query of a sequence meets its last key.
        window: keys seen to the left and right of a query; None: all.
        q_layout: where the queries' sequences are; None: nothing is padded.
        kv_layout: where the keys' sequences are.
        keys: how many keys to look at; None: all.
        tokens: int64 `[N]`, the packed tokens' places in the flattened rows; None: all, in order.
    """

    causal: bool
    window: tuple[int | None, int | None] | None
    q_layout: Layout | None = None
    kv_layout: Layout | None = None
    keys: int | None = None
    tokens: Tensor | None = None


# ------------------------------------------------------------------------------------------------- reading the call


def _refuse_unserved(keywords: dict[str, Any]) -> None:
    """Raise ValueError for keywords that cannot be ignored with a right result; warn where weights are asked for."""
    for name, remedy in (("s_aux", "attention sinks need 'eager'"), ("cache", "paged caches need 'paged|sdpa'")):
        if keywords.get(name) is not None:
            raise ValueError(f"attn_implementation={NAME!r} does not serve {name}: {remedy}")
    if keywords.get("output_attentions"):
        logger.warning_once(f"attn_implementation={NAME!r} returns no attention weights; set 'eager' to see them")


def _causality(module: nn.Module, is_causal: bool | None, attention_mask: Tensor | None) -> bool:
    """Return whether a module is causal, or raise ValueError where nothing says so and no mask does."""
    is_causal = getattr(module, "is_causal", None) if is_causal is None else is_causal
    if is_causal is None and attention_mask is None:
        raise ValueError(
            f"{type(module).__name__} has no is_causal and no attention_mask came: causality is unknown; "
            "set the attribute on the module or pass is_causal"
        )
    return bool(is_causal)


def _is_cross(module: nn.Module, causal: bool) -> bool:
    """Return whether keys come from elsewhere, going by what the library's modules say of themselves."""
    said = getattr(module, "is_cross_attention", False) or "Cross" in type(module).__name__
    return said or (not causal and getattr(module, "is_decoder", False) is True)


def _both_starts(module: nn.Module, causal: bool, square: bool, q_starts: Starts, k_starts: Starts) -> BothStarts:
    """Return which documents are the queries' and which the keys'.

    An encoder-decoder hands the decoder's starts and the encoder's to every attention alike. The encoder's own has the
    latter on both sides, the decoder's own the former.
    """
    if square and causal:
        return q_starts, q_starts
    if square and getattr(module, "is_decoder", None) is False:
        return k_starts, k_starts
    return q_starts, k_starts


def _are_own_positions(position_ids: Tensor, query: Tensor, key: Tensor, cross: bool) -> bool:
    """Return whether positions are those of self-attention without a past, and may be read."""
    length = query.shape[2]
    shapes = ((1, length), (key.shape[0], length))
    return length == key.shape[2] and not cross and tuple(position_ids.shape) in shapes and not is_tracing(query)


def _rows_without_mask(
    causal: bool, sliding_window: int | None, starts: BothStarts | None, position_ids: Tensor | None, batch: int
) -> Rows:
    """Return the rows where nothing is padded: documents are all there may be to tell."""
    window = None if sliding_window is None else (sliding_window - 1, sliding_window - 1)  # transformers counts itself
    if starts is not None:
        return Rows(causal, window, _packed(*starts[0]), _packed(*starts[1]))
    layout = None if position_ids is None else _documents_layout(position_ids, batch)
    return Rows(causal, None) if layout is None else Rows(causal, window, layout, layout)


def _rows_of_mask(
    known: KnownMask,
    query: Tensor,
    key: Tensor,
    starts: BothStarts | None,
    position_ids: Tensor | None,
    cross: bool,
) -> Rows | None:
    """Return what a mask says of rows, once for all layers; None where only the full mask will do."""
    shape = (key.shape[0], 1, query.shape[2], key.shape[2])
    if known.full is not None or is_tracing(query) or known.shape != shape:
        return None
    if starts is not None:
        return known.once((starts[0][0], starts[1][0], None, cross), lambda: _rows_of_starts(known, starts, cross))
    return known.once((None, None, position_ids, cross), lambda: _rows_of_known(known, known.documents, position_ids))


def _rows_of_starts(known: KnownMask, starts: BothStarts, cross: bool) -> Rows | None:
    """Return the rows of a mask over a row whose documents are given by their starts."""
    (q_starts, _), (k_starts, _) = starts
    if known.padding is None and known.documents is None and known.keys == known.shape[3]:
        return Rows(known.causal, known.window, _packed(*starts[0]), _packed(*starts[1]))
    if cross or not known.is_square or not (q_starts is k_starts or torch.equal(q_starts, k_starts)):
        return None
    documents = number_documents(q_starts, known.keys)
    if known.documents is not None:
        documents = documents + known.documents  # both go up, so their sum changes where one does
    return _rows_of_known(known, documents, None)


def _rows_of_known(known: KnownMask, documents: Tensor | None, position_ids: Tensor | None) -> Rows:
    """Return the rows of a mask with these documents `[B | 1, keys]`, or with those that positions tell."""
    if documents is None and position_ids is not None and known.is_square and known.padding is None:
        layout = _documents_layout(position_ids, known.shape[0])
        if layout is not None:
            return Rows(known.causal, known.window, layout, layout)
    narrows = known.causal or known.window is not None
    if documents is not None or (known.padding is not None and known.is_square and narrows):
        # Self-attention over rows with padding is packed too: with padding left out there is no mask left to build.
        one_each = torch.zeros(known.shape[0], known.keys, dtype=torch.int64, device=known.device)
        numbers = one_each if documents is None else documents.expand(known.shape[0], -1)
        layout, tokens = _packed_rows(numbers, known.padding)
        return Rows(known.causal, known.window, layout, layout, known.keys, tokens)
    return _padded_rows(known)


def _padded_rows(known: KnownMask) -> Rows:
    """Return the rows of a mask without documents, as they lie."""
    batch, _, length, _ = known.shape
    causal = known.causal and (length > 1 or known.window is not None)  # a single query sees every key
    q_layout = Layout.full(batch, length, known.device)
    if known.padding is None:
        kv_layout = q_layout if known.is_square else Layout.full(batch, known.keys, known.device)
        return Rows(causal, known.window, q_layout, kv_layout, known.keys)
    if causal:  # else it may be cross-attention, and nothing is known of the queries
        q_layout = Layout.padded(known.padding[:, known.q_start :], finite=True)
    kv_layout = Layout.padded(known.padding, finite=True)  # a model's padding is finite where its weights are
    return Rows(causal, known.window, q_layout, kv_layout, known.keys)


def _full_masks(attention_mask: Tensor | None, starts: BothStarts | None, length: int, kv_length: int) -> list[Tensor]:
    """Return the masks `[B | 1, H | 1, L, S]` that all have to allow a key."""
    full = attention_mask.to_full() if isinstance(attention_mask, CompactMask) else attention_mask
    masks = [] if full is None else [full]
    if starts is not None:  # the mask may hold more than we know (chunks, prefixes): it stays
        queries, keys = number_documents(starts[0][0], length), number_documents(starts[1][0], kv_length)
        masks.append((queries[0][:, None] == keys[0][None])[None, None])
    return masks


# --------------------------------------------------------------------------------------------- calling `attention()`


def _attend(
    rows: Rows, query: Tensor, key: Tensor, value: Tensor, position_bias: Tensor | Bias | None, **options: Any
) -> Tensor:
    """Call `attention()` on `[B, H, L, D]` as the rows say; return `[B, L, H, D]`."""
    batch, heads, length, _ = query.shape
    if rows.keys is not None:
        key, value = key[:, :, : rows.keys], value[:, :, : rows.keys]
    bias = position_bias
    if isinstance(bias, Tensor):
        bias = DenseBias(_cut(bias, rows, batch, length, key.shape[2]))
    q_packed = rows.q_layout is not None and rows.q_layout.is_packed
    kv_packed = rows.kv_layout is not None and rows.kv_layout.is_packed
    q, k, v = (
        _tokens(x, packed, rows.tokens) for x, packed in ((query, q_packed), (key, kv_packed), (value, kv_packed))
    )
    options |= dict(q_layout=rows.q_layout, kv_layout=rows.kv_layout, causal=rows.causal, window=rows.window)
    out = cast(Tensor, attention(q, k, v, bias=bias, **options))
    if rows.tokens is not None:
        out = out.new_zeros(batch * length, *out.shape[1:]).index_copy(0, rows.tokens, out)
    return out.reshape(batch, length, heads, -1).contiguous()


def _tokens(x: Tensor, packed: bool, tokens: Tensor | None) -> Tensor:
    """Return `[B, H, L, D]` as `[B, L, H, D]`, or packed as `[N, H, D]`."""
    if not packed:
        return x.transpose(1, 2)
    x_NHD = x[0].transpose(0, 1) if x.shape[0] == 1 else x.transpose(1, 2).flatten(0, 1)
    return x_NHD if tokens is None else x_NHD[tokens]


def _cut(bias: Tensor, rows: Rows, batch: int, length: int, kv_length: int) -> Tensor:
    """Cut the bias `[B | 1, H | 1, L, S]` of rows to the keys that are seen; packed: to one block for each document."""
    if rows.keys is not None and bias.shape[-1] != 1:
        bias = bias[..., : rows.keys]
    if rows.q_layout is None or rows.kv_layout is None or not (rows.q_layout.is_packed and rows.kv_layout.is_packed):
        return bias
    q_places = _places(rows.q_layout, batch * length, rows.tokens)
    k_places = _places(rows.kv_layout, batch * kv_length, rows.tokens)
    bias = bias[(None,) * (4 - bias.dim())].expand(-1, -1, length, kv_length)
    row = q_places[:, :1, None] // length if bias.shape[0] > 1 else torch.zeros_like(q_places[:, :1, None])
    blocks = bias.permute(0, 2, 3, 1)[row, q_places[:, :, None] % length, k_places[:, None, :] % kv_length]
    return blocks.permute(0, 3, 1, 2)


def _places(layout: Layout, total: int, tokens: Tensor | None) -> Tensor:
    """Return the places in the flattened rows of each packed document's tokens, `[documents, length]`.

    Those beyond a document's end are any.
    """
    starts = cast(Tensor, layout.cu_seqlens)[:-1, None]
    packed = starts + torch.arange(layout.length, device=starts.device)
    packed = packed.clamp(max=(total if tokens is None else len(tokens)) - 1)
    return packed if tokens is None else tokens[packed]


# ----------------------------------------------------------------------------------------------- documents as layouts


def _documents_layout(position_ids: Tensor, batch: int) -> Layout | None:
    """Return the layout of the documents that positions `[B | 1, L]` tell; None where every row is one document."""

    def build() -> Layout | None:
        documents = find_documents(position_ids, None, position_ids.shape[1])
        return None if documents is None else _packed_rows(documents.expand(batch, -1), None)[0]

    return _once(position_ids, batch, build)


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


def _join(position_bias: Tensor | Bias | None, masks: list[Tensor], dtype: torch.dtype) -> Bias | None:
    """Add everything up in one bias; what a mask forbids becomes -inf, so that rows without a key are known."""
    if isinstance(position_bias, Bias):
        if masks:
            raise ValueError(
                f"position_bias is a {type(position_bias).__name__} with an attention_mask; pass "
                "bias.dense(q_positions, k_positions), or call attention() with layouts"
            )
        return position_bias
    total = position_bias
    for mask in masks:
        if mask.dtype == torch.bool:
            base = torch.zeros((), dtype=dtype, device=mask.device) if total is None else total
            total = torch.where(mask, base, -torch.inf)
        else:
            additive = mask.masked_fill(mask <= torch.finfo(mask.dtype).min, -torch.inf)
            total = additive if total is None else total + additive
    return None if total is None else DenseBias(total)


register_attention()
