"""The sdpa backend: `torch.nn.functional.scaled_dot_product_attention`, fed so that it is right.

Padded tensors make one call. Packed ones make a few: sequences of similar lengths are gathered into small padded
batches (at most a quarter of padding), so nothing of the size of the whole packed tensor squared is ever built.

Shapes: B batch, L queries, S keys, N packed tokens, H heads, G key/value heads, D head dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention_biases import Bias
from .attention_layouts import Layout, query_positions, visible
from .attention_reference import reference_attention

ALONE = 256  #: packed sequences of about this mean length are worth a call each


def sdpa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_layout: Layout,
    kv_layout: Layout,
    *,
    causal: bool,
    window: tuple[int | None, int | None] | None,
    bias: Bias | None,
    softcap: float | None,
    scale: float,
    dropout_p: float,
    seed: int | Tensor | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """Compute attention by PyTorch's kernels; softcap, seed and return_lse are refused by the capability table."""
    if 0 in q.shape or 0 in k.shape:  # PyTorch's kernels do not all take empty tensors, and there is nothing to compute
        return reference_attention(
            q, k, v, q_layout, kv_layout, causal=causal, window=window, bias=bias, softcap=softcap, scale=scale,
            dropout_p=0.0, seed=None, return_lse=return_lse,
        )  # fmt: skip
    if q_layout.is_packed and kv_layout.is_packed:
        return _bucketed(q, k, v, q_layout, kv_layout, causal, window, bias, scale, dropout_p), None
    q_grid, kv_grid = q_layout.as_padded(), kv_layout.as_padded()
    if bias is not None:
        bias = bias.narrow(None, q_grid.length, kv_grid.length)
    q_BLHD, k_BSGD, v_BSGD = q_layout.pad(q), kv_layout.pad(k), kv_layout.pad(v)
    out_BLHD = _padded(q_BLHD, k_BSGD, v_BSGD, q_grid, kv_grid, causal, window, bias, scale, dropout_p)
    return q_layout.unpad(out_BLHD), None


def _padded(
    q_BLHD: Tensor,
    k_BSGD: Tensor,
    v_BSGD: Tensor,
    q_grid: Layout,
    kv_grid: Layout,
    causal: bool,
    window: tuple[int | None, int | None] | None,
    bias: Bias | None,
    scale: float,
    dropout_p: float,
) -> Tensor:
    """One call of PyTorch's kernel, with as little mask as the case allows."""
    q_BHLD = q_grid.clean(q_BLHD).transpose(1, 2)
    k_BGSD = kv_grid.clean(k_BSGD).transpose(1, 2)
    v_BGSD = kv_grid.clean(v_BSGD).transpose(1, 2)
    # When queries and keys start together and padding is at the end, PyTorch's own causal flag hides the padding too.
    aligned = q_grid.length == kv_grid.length and (
        q_grid.known_sizes == kv_grid.known_sizes
        if q_grid.known_sizes and kv_grid.known_sizes
        else q_grid.mask is kv_grid.mask is None
    )
    by_flag = causal and aligned and bias is None and (window is None or window[0] is None)
    mask = None if by_flag else visible(q_grid, kv_grid, causal, window)
    empty = None
    if bias is not None:
        dense = bias.dense(query_positions(q_grid, kv_grid, causal), kv_grid.positions).to(q_BLHD.dtype)
        mask = dense if mask is None else dense.masked_fill(~mask, -torch.inf)
        empty = ~(mask > -torch.inf).any(-1, keepdim=True)
        mask = mask.masked_fill(empty, 0)
    elif mask is not None:
        # A row without a key attends to everything instead, and its output is dropped: no kernel sees a row of -inf.
        empty = ~mask.any(-1, keepdim=True)
        mask = mask | empty
    if q_BHLD.shape[1] != k_BGSD.shape[1] and mask is not None:
        # With a mask, enable_gqa leaves PyTorch's fused kernels.
        groups = q_BHLD.shape[1] // k_BGSD.shape[1]
        k_BGSD, v_BGSD = k_BGSD.repeat_interleave(groups, dim=1), v_BGSD.repeat_interleave(groups, dim=1)
    out_BHLD = F.scaled_dot_product_attention(
        q_BHLD, k_BGSD, v_BGSD, attn_mask=mask, dropout_p=dropout_p, is_causal=by_flag, scale=scale,
        enable_gqa=q_BHLD.shape[1] != k_BGSD.shape[1],
    )  # fmt: skip
    if empty is not None:
        out_BHLD = out_BHLD.masked_fill(empty, 0)
    if q_grid.mask is not None:
        out_BHLD = out_BHLD.masked_fill(~q_grid.mask[:, None, :, None], 0)
    return out_BHLD.transpose(1, 2)


def _bucketed(
    q_NHD: Tensor,
    k_NGD: Tensor,
    v_NGD: Tensor,
    q_layout: Layout,
    kv_layout: Layout,
    causal: bool,
    window: tuple[int | None, int | None] | None,
    bias: Bias | None,
    scale: float,
    dropout_p: float,
) -> Tensor:
    """One padded call for each bucket of sequences with similar lengths."""
    q_sizes, kv_sizes = q_layout.sizes, kv_layout.sizes
    if len({*q_sizes}) == len({*kv_sizes}) == 1:  # sequences of one length are a batch already
        q_grid, kv_grid = (Layout.full(x.batch, x.length, q_NHD.device) for x in (q_layout, kv_layout))
        q_BLHD = q_NHD.unflatten(0, (q_grid.batch, q_grid.length))
        k_BSGD, v_BSGD = (x.unflatten(0, (kv_grid.batch, kv_grid.length)) for x in (k_NGD, v_NGD))
        out_BLHD = _padded(q_BLHD, k_BSGD, v_BSGD, q_grid, kv_grid, causal, window, bias, scale, dropout_p)
        return out_BLHD.flatten(0, 1)
    if sum(kv_sizes) >= ALONE * len(kv_sizes) and 0 not in q_sizes and 0 not in kv_sizes:
        outs = []
        parts = (q_NHD.split(q_sizes), k_NGD.split(kv_sizes), v_NGD.split(kv_sizes))  # type: ignore[arg-type]
        for i, (q_LHD, k_SGD, v_SGD) in enumerate(zip(*parts, strict=True)):
            q_grid, kv_grid = (Layout.full(1, len(x), q_NHD.device) for x in (q_LHD, k_SGD))
            cut = None if bias is None else bias.narrow([i], len(q_LHD), len(k_SGD))
            sides = (q_LHD[None], k_SGD[None], v_SGD[None], q_grid, kv_grid)
            outs.append(_padded(*sides, causal, window, cut, scale, dropout_p)[0])
        return torch.cat(outs)
    buckets: dict[tuple[int, int], list[int]] = {}
    for sequence, (q_size, kv_size) in enumerate(zip(q_sizes, kv_sizes, strict=True)):
        if q_size > 0:
            buckets.setdefault((_round_up(q_size), _round_up(kv_size)), []).append(sequence)

    outs, first_rows, row = [], [0] * len(q_sizes), 0
    for members in buckets.values():
        q_grid = Layout.ragged([q_sizes[i] for i in members], q_NHD.device)
        kv_grid = Layout.ragged([kv_sizes[i] for i in members], q_NHD.device, min_length=1)  # kernels want a key
        q_BLHD = q_layout.take(q_NHD, members, q_grid)
        k_BSGD, v_BSGD = kv_layout.take(k_NGD, members, kv_grid), kv_layout.take(v_NGD, members, kv_grid)
        cut = None if bias is None else bias.narrow(members, q_grid.length, kv_grid.length)
        out_BLHD = _padded(q_BLHD, k_BSGD, v_BSGD, q_grid, kv_grid, causal, window, cut, scale, dropout_p)
        outs.append(out_BLHD.flatten(0, 1))
        for sequence in members:
            first_rows[sequence] = row
            row += q_grid.length
    # Back to the packed order in one gather
    first_rows_B = torch.tensor(first_rows, device=q_NHD.device)
    return torch.cat(outs).index_select(0, first_rows_B[q_layout.sequences] + q_layout.positions)


def _round_up(size: int) -> int:
    """Round up to a multiple of about a quarter of the size (at least 8), so that a bucket's padding stays small."""
    step = max(8, 1 << max(size.bit_length() - 3, 0))
    return -(-size // step) * step
