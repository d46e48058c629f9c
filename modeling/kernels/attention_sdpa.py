"""The sdpa backend: `torch.nn.functional.scaled_dot_product_attention`, fed so that it is right.

Padded tensors make one call. Packed ones make a few: sequences of similar lengths are gathered into small padded
batches (at most a quarter of padding), so nothing of the size of the whole packed tensor squared is ever built.

Shapes: B batch, L queries, S keys, N packed tokens, H heads, G key/value heads, D head dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention_layouts import Layout, query_positions, visible
from .attention_reference import reference_attention
from .attention_settings import AttentionSettings

LONG_SEQUENCES = 256  #: packed sequences of about this mean length are worth a call each


def sdpa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_layout: Layout,
    kv_layout: Layout,
    settings: AttentionSettings,
) -> tuple[Tensor, Tensor | None]:
    """Compute attention by PyTorch's kernels; softcap, seed and return_lse are refused by the capability table."""
    if 0 in q.shape or 0 in k.shape:  # PyTorch's kernels do not all take empty tensors, and there is nothing to compute
        causal, window, bias, softcap, scale, *_ = settings
        settings = AttentionSettings(causal, window, bias, softcap, scale, return_lse=settings.return_lse)
        return reference_attention(q, k, v, q_layout, kv_layout, settings)
    if q_layout.is_packed and kv_layout.is_packed:
        return _packed(q, k, v, q_layout, kv_layout, settings), None
    q_grid, kv_grid = q_layout.as_padded(), kv_layout.as_padded()
    if settings.bias is not None:
        settings = settings.with_bias(settings.bias.narrow(None, q_grid.length, kv_grid.length))
    q_BLHD, k_BSGD, v_BSGD = q_layout.pad(q), kv_layout.pad(k), kv_layout.pad(v)
    return q_layout.unpad(_padded(q_BLHD, k_BSGD, v_BSGD, q_grid, kv_grid, settings)), None


def _padded(
    q_BLHD: Tensor, k_BSGD: Tensor, v_BSGD: Tensor, q_grid: Layout, kv_grid: Layout, settings: AttentionSettings
) -> Tensor:
    """Make one call of PyTorch's kernel, with as little mask as the case allows."""
    q_BHLD = q_grid.clean(q_BLHD).transpose(1, 2)
    k_BGSD = kv_grid.clean(k_BSGD).transpose(1, 2)
    v_BGSD = kv_grid.clean(v_BSGD).transpose(1, 2)
    by_flag = settings.causal and _causal_flag_serves(q_grid, kv_grid, settings)
    mask, empty = (None, None) if by_flag else _mask(q_grid, kv_grid, settings, q_BHLD.dtype)
    if q_BHLD.shape[1] != k_BGSD.shape[1] and mask is not None:
        # With a mask, enable_gqa leaves PyTorch's fused kernels.
        groups = q_BHLD.shape[1] // k_BGSD.shape[1]
        k_BGSD, v_BGSD = k_BGSD.repeat_interleave(groups, dim=1), v_BGSD.repeat_interleave(groups, dim=1)
    out_BHLD = F.scaled_dot_product_attention(
        q_BHLD, k_BGSD, v_BGSD, attn_mask=mask, dropout_p=settings.dropout_p, is_causal=by_flag, scale=settings.scale,
        enable_gqa=q_BHLD.shape[1] != k_BGSD.shape[1],
    )  # fmt: skip
    if empty is not None:
        out_BHLD = out_BHLD.masked_fill(empty, 0)
    if q_grid.mask is not None:
        out_BHLD = out_BHLD.masked_fill(~q_grid.mask[:, None, :, None], 0)
    return out_BHLD.transpose(1, 2)


def _causal_flag_serves(q_grid: Layout, kv_grid: Layout, settings: AttentionSettings) -> bool:
    """Return whether PyTorch's own causal flag says all there is to mask.

    It does where queries and keys start together and padding, if any, is at the end, where the flag hides it too.
    """
    if settings.bias is not None or (settings.window is not None and settings.window[0] is not None):
        return False
    if q_grid.length != kv_grid.length:
        return False
    if q_grid.known_sizes and kv_grid.known_sizes:
        return q_grid.known_sizes == kv_grid.known_sizes
    return q_grid.mask is kv_grid.mask is None


def _mask(
    q_grid: Layout, kv_grid: Layout, settings: AttentionSettings, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """Build the mask for PyTorch's kernel, bool or additive, and say which rows see no key; None where nothing does.

    A row without a key attends to everything instead, and its output is dropped: no kernel sees a row of -inf.
    """
    mask = visible(q_grid, kv_grid, settings.causal, settings.window)
    if settings.bias is not None:
        positions = query_positions(q_grid, kv_grid, settings.causal)
        dense = settings.bias.dense(positions, kv_grid.positions).to(dtype)
        mask = dense if mask is None else dense.masked_fill(~mask, -torch.inf)
        empty = ~(mask > -torch.inf).any(-1, keepdim=True)
        return mask.masked_fill(empty, 0), empty
    if mask is None:
        return None, None
    empty = ~mask.any(-1, keepdim=True)
    return mask | empty, empty


def _packed(
    q_NHD: Tensor, k_NGD: Tensor, v_NGD: Tensor, q_layout: Layout, kv_layout: Layout, settings: AttentionSettings
) -> Tensor:
    """Make a few padded calls: one for a batch of equal lengths, else one for each long sequence or each bucket."""
    q_sizes, kv_sizes = q_layout.sizes, kv_layout.sizes
    if len({*q_sizes}) == len({*kv_sizes}) == 1:  # sequences of one length are a batch already
        q_grid, kv_grid = (Layout.full(x.batch, x.length, q_NHD.device) for x in (q_layout, kv_layout))
        q_BLHD = q_NHD.unflatten(0, (q_grid.batch, q_grid.length))
        k_BSGD, v_BSGD = (x.unflatten(0, (kv_grid.batch, kv_grid.length)) for x in (k_NGD, v_NGD))
        return _padded(q_BLHD, k_BSGD, v_BSGD, q_grid, kv_grid, settings).flatten(0, 1)
    if sum(kv_sizes) >= LONG_SEQUENCES * len(kv_sizes) and 0 not in q_sizes and 0 not in kv_sizes:
        return _one_by_one(q_NHD, k_NGD, v_NGD, q_sizes, kv_sizes, settings)
    return _in_buckets(q_NHD, k_NGD, v_NGD, q_layout, kv_layout, settings)


def _one_by_one(
    q_NHD: Tensor,
    k_NGD: Tensor,
    v_NGD: Tensor,
    q_sizes: tuple[int, ...],
    kv_sizes: tuple[int, ...],
    settings: AttentionSettings,
) -> Tensor:
    """Make one call for each sequence."""
    outs = []
    parts = (q_NHD.split(q_sizes), k_NGD.split(kv_sizes), v_NGD.split(kv_sizes))
    for i, (q_LHD, k_SGD, v_SGD) in enumerate(zip(*parts, strict=True)):
        q_grid, kv_grid = (Layout.full(1, len(x), q_NHD.device) for x in (q_LHD, k_SGD))
        own = _narrowed(settings, [i], q_grid, kv_grid)
        outs.append(_padded(q_LHD[None], k_SGD[None], v_SGD[None], q_grid, kv_grid, own)[0])
    return torch.cat(outs)


def _in_buckets(
    q_NHD: Tensor, k_NGD: Tensor, v_NGD: Tensor, q_layout: Layout, kv_layout: Layout, settings: AttentionSettings
) -> Tensor:
    """Make one call for each bucket of sequences with similar lengths."""
    q_sizes, kv_sizes = q_layout.sizes, kv_layout.sizes
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
        out_BLHD = _padded(q_BLHD, k_BSGD, v_BSGD, q_grid, kv_grid, _narrowed(settings, members, q_grid, kv_grid))
        outs.append(out_BLHD.flatten(0, 1))
        for sequence in members:
            first_rows[sequence] = row
            row += q_grid.length
    # Back to the packed order in one gather
    first_rows_B = torch.tensor(first_rows, device=q_NHD.device)
    return torch.cat(outs).index_select(0, first_rows_B[q_layout.sequences] + q_layout.positions)


def _narrowed(settings: AttentionSettings, members: list[int], q_grid: Layout, kv_grid: Layout) -> AttentionSettings:
    """Return the settings with the bias of some sequences, cut to their lengths."""
    if settings.bias is None:
        return settings
    return settings.with_bias(settings.bias.narrow(members, q_grid.length, kv_grid.length))


def _round_up(size: int) -> int:
    """Round up to a multiple of about a quarter of the size (at least 8), so that a bucket's padding stays small."""
    step = max(8, 1 << max(size.bit_length() - 3, 0))
    return -(-size // step) * step
