# Copyright 2026 The Urform authors. Licensed under the Apache License, Version 2.0.
"""The one rule for where a packed document begins, for Urform's models and for stock models under "urform".

A document begins where the position of a real token is not the position of the real token before it plus one.

Shapes: B batch, L length.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def find_documents(position_ids: Tensor, mask: Tensor | None, length: int, readable: bool = True) -> Tensor | None:
    """Number the documents of packed rows from 0, int64 `[B | 1, L]`; return None where every row is one document.

    A document begins where the position of a real token is not the position of the real token before it plus one.
    Padding between two tokens may count in their positions or not: neither begins a document.

    Args:
        position_ids: `[B | 1, L]`; any other shape tells nothing.
        mask: `[B, L]`, nonzero at real tokens; None, or another length: all are real.
        length: L.
        readable: whether values may be read on the host; in a graph that is being traced they may not, and documents
            are numbered even where there is one.
    """
    if position_ids.ndim != 2 or position_ids.shape[1] != length:
        return None
    begins = position_ids.diff(dim=-1) != 1
    if mask is not None and mask.shape[1] == length:
        begins = _begins_after_padding(position_ids, mask.to(position_ids.device) != 0)
    if readable and not begins.any():
        return None
    return nn.functional.pad(begins.long().cumsum(-1), (1, 0))


def number_documents(cu_seqlens: Tensor, length: int) -> Tensor:
    """Number the documents of one row of `length` tokens from their starts: int64 `[1, L]`."""
    places = torch.arange(length, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens[1:].to(places), places, right=True)[None]


def _begins_after_padding(position_ids: Tensor, real: Tensor) -> Tensor:
    """Return where documents begin, bool `[B, L - 1]`: each real token is compared with the real one before it."""
    places = torch.arange(real.shape[1], device=real.device).expand(real.shape)
    before = torch.where(real, places, -1).cummax(-1).values[:, :-1]  # -1: no real token has come yet
    positions = position_ids.expand(real.shape)
    step = positions[:, 1:] - positions.gather(1, before.clamp(min=0))
    goes_on = (step == 1) | (step == places[:, 1:] - before)
    return real[:, 1:] & (before >= 0) & ~goes_on
