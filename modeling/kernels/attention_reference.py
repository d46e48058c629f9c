"""The reference backend: attention as its definition reads, for any floating dtype. The other backends are held to it.

Also defines the counter-based dropout, which every backend that takes a seed must reproduce bit for bit.

Shapes: B batch, L queries, S keys, N packed tokens, H heads, G key/value heads, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .attention_layouts import Layout, query_positions, visible
from .attention_settings import AttentionSettings

GOLDEN = 0x9E3779B9 - (1 << 32)  # 2^32 / golden ratio, odd, as an int32


def reference_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_layout: Layout,
    kv_layout: Layout,
    settings: AttentionSettings,
) -> tuple[Tensor, Tensor | None]:
    """Compute `softmax(softcap(scale * q k^T) + bias) v` with every score in memory, in float32 or wider."""
    causal, softcap, dropout_p = settings.causal, settings.softcap, settings.dropout_p
    dtype = torch.promote_types(q.dtype, torch.float32)
    q_grid, kv_grid = q_layout.as_padded(), kv_layout.as_padded()
    groups = q.shape[-2] // k.shape[-2]
    with torch.autocast(q.device.type, enabled=False):
        q_BLHD = q_grid.clean(q_layout.pad(q)).to(dtype)
        k_BSHD = kv_grid.clean(kv_layout.pad(k)).to(dtype).repeat_interleave(groups, dim=2)
        v_BSHD = kv_grid.clean(kv_layout.pad(v)).to(dtype).repeat_interleave(groups, dim=2)

        scores_BHLS = torch.einsum("blhd,bshd->bhls", q_BLHD, k_BSHD) * settings.scale
        if softcap is not None:
            scores_BHLS = softcap * torch.tanh(scores_BHLS / softcap)
        if settings.bias is not None:
            bias = settings.bias.narrow(None, q_grid.length, kv_grid.length)
            q_positions_BL = query_positions(q_grid, kv_grid, causal)
            scores_BHLS = scores_BHLS + bias.dense(q_positions_BL, kv_grid.positions).to(dtype)
        keep = visible(q_grid, kv_grid, causal, settings.window)
        if keep is not None:
            scores_BHLS = scores_BHLS.masked_fill(~keep, -torch.inf)

        # Rows without a key (and padding) become rows of zeros here and have their results replaced below: softmax
        # never sees a row of -inf, whose gradient is NaN.
        empty_BHL1 = ~(scores_BHLS > -torch.inf).any(-1, keepdim=True)
        if q_grid.mask is not None:
            empty_BHL1 = empty_BHL1 | ~q_grid.mask[:, None, :, None]
        scores_BHLS = scores_BHLS.masked_fill(empty_BHL1, 0)
        weights_BHLS = torch.softmax(scores_BHLS, dim=-1)
        if dropout_p > 0 and settings.seed is not None:
            kept_BHLS = dropout_keep(settings.seed, q_grid, kv_grid, q.shape[-2], dropout_p)
            weights_BHLS = weights_BHLS * kept_BHLS / (1 - dropout_p)
        out_BLHD = torch.einsum("bhls,bshd->blhd", weights_BHLS.masked_fill(empty_BHL1, 0), v_BSHD)
        out = q_layout.unpad(out_BLHD).to(q.dtype)
        if not settings.return_lse:
            return out, None
        lse_BHL = torch.logsumexp(scores_BHLS, dim=-1).masked_fill(empty_BHL1[..., 0], -torch.inf)
        return out, q_layout.unpad(lse_BHL.transpose(1, 2)).transpose(-1, -2)


def dropout_keep(seed: int | Tensor, q_grid: Layout, kv_grid: Layout, heads: int, dropout_p: float) -> Tensor:
    """Decide which attention weights survive dropout, from (seed, sequence, head, row, column) alone.

    Rows and columns are ranks among the real tokens of a sequence, so packed and padded agree, and recomputation in a
    backward pass agrees with the forward pass. All arithmetic is on 32 bits, so a GPU kernel can repeat it:

        row_key = mix(mix(mix(mix(mix(seed & 0xffffffff) ^ seed >> 32) ^ sequence) ^ head) ^ row)
        keep    = mix(row_key ^ (column * 0x9e3779b9)) >> 8  >=  round(p * 2^24)

    with `mix` the finalizer of MurmurHash3 (`mix32`) and `>>` logical.

    Returns:
        bool `[B, H, L, S]`.
    """
    sequences_B = torch.arange(q_grid.batch, device=q_grid.positions.device)
    return keep_tile(seed, sequences_B, heads, q_grid.positions, kv_grid.positions, dropout_p)


def keep_tile(
    seed: int | Tensor, sequences_n: Tensor, heads: int, rows_nL: Tensor, columns_nS: Tensor, dropout_p: float
) -> Tensor:
    """Decide as `dropout_keep` for some sequences, rows and columns: `[n]`, `[n | 1, L]`, `[n | 1, S]`.

    Returns:
        bool `[n, H, L, S]`.
    """
    device = sequences_n.device
    if isinstance(seed, Tensor):
        seed64 = seed.to(device, torch.int64)
    else:
        seed64 = torch.full((), seed, dtype=torch.int64, device=device)
    key = mix32(mix32(_low32(seed64)) ^ _low32(seed64 >> 32))
    key_n111 = mix32(key ^ sequences_n.to(torch.int32)[:, None, None, None])
    key_nH11 = mix32(key_n111 ^ torch.arange(heads, dtype=torch.int32, device=device)[:, None, None])
    key_nHL1 = mix32(key_nH11 ^ rows_nL.to(torch.int32)[:, None, :, None])
    columns_n11S = columns_nS.to(torch.int32)[:, None, None, :] * GOLDEN
    hash_nHLS = mix32(key_nHL1 ^ columns_n11S)
    return ((hash_nHLS >> 8) & 0xFFFFFF) >= round(dropout_p * (1 << 24))


def mix32(x: Tensor) -> Tensor:
    """Scramble int32 (as unsigned 32 bits, multiplication modulo 2^32): MurmurHash3's finalizer, a bijection."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * (0x85EBCA6B - (1 << 32))
    x = (x ^ ((x >> 13) & 0x7FFFF)) * (0xC2B2AE35 - (1 << 32))
    return x ^ ((x >> 16) & 0xFFFF)


def _low32(x: Tensor) -> Tensor:
    """Low 32 bits of int64, reinterpreted as int32."""
    low = x & 0xFFFFFFFF
    return torch.where(low >= 1 << 31, low - (1 << 32), low).to(torch.int32)
