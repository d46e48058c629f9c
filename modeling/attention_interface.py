"""`attn_implementation="urform"` for every transformers model: our attention behind the library's own interface.

The function and the mask function are registered under one name. With the function alone every mask builder of the
library returns None, and padding and causality are dropped without a word.

Shapes: B batch, L queries, S keys, N packed tokens, H heads, G key/value heads, D head dim.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask
from transformers.utils import logging

from .kernels.attention_biases import Bias, DenseBias
from .kernels.attention_dispatch import attention
from .kernels.attention_layouts import Layout

NAME = "urform"

logger = logging.get_logger(__name__)


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
        attention_mask: `[B | 1, H | 1, L, S]`, bool (True attends) or additive; complete: it holds causality, window
            and padding. None: nothing is padded, and if the module is causal the last query meets the last key.
        dropout: probability of dropping an attention weight; the models pass 0 in evaluation.
        scaling: factor of the scores; None: `D ** -0.5`.
        sliding_window: keys seen on the left, the query's own included (and as many on the right when not causal).
            Read on the packed path only, as everywhere else the mask says it.
        softcap: bound of the scores.
        position_bias: `[B | 1, H, L, S]`, or a bias object where there is no `attention_mask`.
        is_causal: overrides `module.is_causal`.
        cu_seq_lens_q: starts of the packed queries and their total, with batch 1 (flash attention's convention).
        cu_seq_lens_k: the same for the keys; None: as the queries.
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
    causal = attention_mask is None and bool(is_causal)
    if q_layout is not None:
        if attention_mask is not None or cu_seq_lens_q is not None:
            raise ValueError("q_layout says where all tokens are; drop attention_mask and cu_seq_lens_q")
        out = _with_layouts(
            query, key, value, q_layout, q_layout if kv_layout is None else kv_layout, causal=causal,
            window=_window(sliding_window), position_bias=position_bias, softcap=softcap, scale=scaling,
            dropout_p=dropout,
        )  # fmt: skip
        return out, None
    if kv_layout is not None:
        raise ValueError("kv_layout came without q_layout; pass both, or q_layout alone for self-attention")
    if cu_seq_lens_q is not None:
        if key.shape[0] != 1:
            raise ValueError(f"cu_seq_lens_q packs all sequences in one row, but the batch is {key.shape[0]}")
        q_layout = kv_layout = Layout.packed(cu_seq_lens_q, max_length_q)
        if cu_seq_lens_k is not None and cu_seq_lens_k is not cu_seq_lens_q:
            kv_layout = Layout.packed(cu_seq_lens_k, max_length_k)
    q_BLHD = query.expand(key.shape[0], -1, -1, -1).transpose(1, 2)  # some models' learned queries come with batch 1
    k_BSGD, v_BSGD = key.transpose(1, 2), value.transpose(1, 2)

    if q_layout is not None and attention_mask is None and not isinstance(position_bias, Tensor):
        window = None if sliding_window is None else (sliding_window - 1, sliding_window - 1)
        out_NHD = attention(
            q_BLHD[0], k_BSGD[0], v_BSGD[0], q_layout=q_layout, kv_layout=kv_layout, causal=causal, window=window,
            bias=position_bias, softcap=softcap, scale=scaling, dropout_p=dropout,
        )  # fmt: skip
        return cast(Tensor, out_NHD)[None].contiguous(), None
    masks = [attention_mask]
    if q_layout is not None and kv_layout is not None:
        # A mask over the packed row may hold more than we know (chunks, prefixes): it stays, and documents are kept
        # apart besides.
        masks.append(_same_document(q_layout, kv_layout, causal))
        causal = False
    out_BLHD = attention(
        q_BLHD, k_BSGD, v_BSGD, causal=causal, bias=_join(position_bias, masks, query.dtype),
        softcap=softcap, scale=scaling, dropout_p=dropout,
    )  # fmt: skip
    return cast(Tensor, out_BLHD).contiguous(), None


def urform_mask(
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> Tensor | None:
    """Build the library's bool mask `[B, 1, L, S]`, or None only where causality (or nothing) is all there is to say.

    The library also returns None for static caches, whose keys behind the last query are not written yet; here the
    last query always is at the last key when the mask is None.
    """
    at_the_end = not isinstance(q_offset, Tensor) and q_offset + q_length == kv_offset + kv_length
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        allow_is_causal_skip=allow_is_causal_skip and at_the_end,
        **kwargs,
    )


def register_attention() -> None:
    """Register function and mask function as `attn_implementation="urform"`; calling it again changes nothing."""
    AttentionInterface.register(NAME, urform_attention_forward)
    AttentionMaskInterface.register(NAME, urform_mask)


def _window(sliding_window: int | None) -> tuple[int, int] | None:
    """Read transformers' count of keys, the query's own included, as distances."""
    return None if sliding_window is None else (sliding_window - 1, sliding_window - 1)


def _with_layouts(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    q_layout: Layout,
    kv_layout: Layout,
    *,
    position_bias: Tensor | Bias | None,
    **options: Any,
) -> Tensor:
    """Call `attention()` on `[B, H, L, D]`, of which a packed layout takes the only row; give `[B, L, H, D]`."""
    q, k, v = (
        x.transpose(1, 2) if not layout.is_packed else x[0].transpose(0, 1)
        for x, layout in ((query, q_layout), (key, kv_layout), (value, kv_layout))
    )
    bias = DenseBias(position_bias) if isinstance(position_bias, Tensor) else position_bias
    out = cast(Tensor, attention(q, k, v, q_layout=q_layout, kv_layout=kv_layout, bias=bias, seed=None, **options))
    return (out[None] if q_layout.is_packed else out).contiguous()


def _same_document(q_layout: Layout, kv_layout: Layout, causal: bool) -> Tensor:
    """Bool `[1, 1, N, M]`: key and query are of one packed document (and the key is not ahead)."""
    q_sequences_N, k_sequences_M = cast(Tensor, q_layout.sequences), cast(Tensor, kv_layout.sequences)
    together_NM = q_sequences_N[:, None] == k_sequences_M
    if causal:
        shift_N = (kv_layout.lengths - q_layout.lengths)[q_sequences_N]
        together_NM &= kv_layout.positions <= (q_layout.positions + shift_N)[:, None]
    return together_NM[None, None]


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
