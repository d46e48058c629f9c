"""The attention problems of `urform doctor kernels`, and the two ways to the answer that it compares with.

Shapes: B batch, L queries, S keys, N packed tokens, H heads, G key/value heads, D head dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..modeling.kernels.attention_biases import ALiBi, Bias, DenseBias, RelativeBias, T5Bias
from ..modeling.kernels.attention_layouts import Layout, query_positions, visible
from ..modeling.kernels.attention_reference import dropout_keep, reference_attention
from ..modeling.kernels.attention_settings import AttentionSettings

_SEED = 2**40 + 3


@dataclass(frozen=True)
class KernelCase:
    """One attention problem. Lengths are real tokens per sequence; padding is added, or tokens are packed, by layout.

    Attributes:
        name: how the report calls it.
        q_sizes: queries of each sequence; 0 makes a fully padded row (or an empty packed sequence).
        k_sizes: keys of each sequence.
        layout: "full", "left" or "right" (side of the padding), "packed", or "mixed" (queries packed, keys padded).
        heads: (query heads, key/value heads).
        dims: (head dim, head dim of the values).
        bias: "alibi", "t5", "relative", "dense" or None.
    """

    name: str
    q_sizes: tuple[int, ...] = (33, 17, 40)
    k_sizes: tuple[int, ...] = (33, 17, 40)
    layout: str = "right"
    heads: tuple[int, int] = (4, 4)
    dims: tuple[int, int] = (32, 32)
    causal: bool = False
    window: tuple[int | None, int | None] | None = None
    bias: str | None = None
    softcap: float | None = None
    dropout_p: float = 0.0
    return_lse: bool = False

    @property
    def needs(self) -> set[str]:
        """The features of the capability table that the case asks for."""
        needed = {
            "causal": self.causal,
            "window": self.window is not None,
            "gqa": self.heads[0] != self.heads[1],
            "padded": self.layout in ("left", "right", "mixed"),
            "packed": self.layout == "packed",
            "mixed": self.layout == "mixed",
            "softcap": self.softcap is not None,
            "dropout": self.dropout_p > 0,
            "seed": self.dropout_p > 0,
            "lse": self.return_lse,
        }
        return {name for name, yes in needed.items() if yes} | ({self.bias} if self.bias else set())


_SHORT, _LONG = (5, 19, 1), (33, 7, 48)
CASES: tuple[KernelCase, ...] = (
    KernelCase("full", (37, 37), (37, 37), "full"),
    KernelCase("padded right"),
    KernelCase("padded left, L != S", _SHORT, _LONG, "left"),
    KernelCase("packed", layout="packed"),
    KernelCase("packed, L != S", _SHORT, _LONG, "packed"),
    KernelCase("mixed: packed q, padded k", _SHORT, _LONG, "mixed"),
    KernelCase("causal, padded left", layout="left", causal=True),
    KernelCase("causal, packed, L < S", _SHORT, (33, 20, 48), "packed", causal=True),
    KernelCase("causal, L > S: rows without keys", (40, 9), (8, 9), "right", causal=True),
    KernelCase("window (6, 3)", window=(6, 3)),
    KernelCase("causal window, packed", layout="packed", causal=True, window=(7, None)),
    KernelCase("GQA 8:2, causal, packed", layout="packed", heads=(8, 2), causal=True),
    KernelCase("a fully padded row", (0, 23, 9), (12, 0, 31), "right"),
    KernelCase("empty packed sequences", (0, 23, 9), (12, 0, 31), "packed"),
    KernelCase("head dims 40 and 24", dims=(40, 24), causal=True),
    KernelCase("one query, 65 keys", (1, 1), (65, 40), "right", causal=True),
    KernelCase("ALiBi, packed", layout="packed", bias="alibi"),
    KernelCase("T5 bias, packed, causal", layout="packed", bias="t5", causal=True),
    KernelCase("T5 bias, padded", _SHORT, _LONG, "left", bias="t5"),
    KernelCase("relative bias, window", layout="packed", bias="relative", window=(9, 9)),
    KernelCase("dense bias with -inf", _SHORT, _LONG, "right", bias="dense"),
    KernelCase("softcap, causal", causal=True, softcap=2.0),
    KernelCase("dropout by seed, packed", layout="packed", dropout_p=0.2),
    KernelCase("dropout by seed, padded", layout="left", causal=True, dropout_p=0.2),
    KernelCase("lse, padded", _SHORT, _LONG, "right", return_lse=True),
    KernelCase("many blocks, causal", (130, 1, 530), (130, 1, 530), "packed", causal=True),
    KernelCase("many blocks, L != S, window", (70, 150), (530, 150), "left", causal=True, window=(200, None)),
    KernelCase("many blocks, T5 bias, dropout", (300, 65), (129, 400), "packed", bias="t5", dropout_p=0.1),
    KernelCase("everything", layout="packed", heads=(4, 2), causal=True, window=(20, None), bias="alibi",
               softcap=3.0, dropout_p=0.1, return_lse=True),
)  # fmt: skip


@dataclass
class Problem:
    """The tensors of a case in `leaves`, rounded to `dtype`, and its layouts; `draw` seeds them."""

    case: KernelCase
    dtype: torch.dtype
    device: torch.device
    draw: int = 0

    def __post_init__(self) -> None:
        case, generator = self.case, torch.Generator().manual_seed(100 * len(self.case.name) + self.draw)

        def rand(*shape: int, dtype: torch.dtype = self.dtype) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(self.device, dtype)

        batch, (heads, groups), (dim, v_dim) = len(case.q_sizes), case.heads, case.dims
        self.q_layout = self._layout(case.q_sizes, "packed" if case.layout == "mixed" else case.layout)
        self.kv_layout = self._layout(case.k_sizes, "right" if case.layout == "mixed" else case.layout)
        q_shape, k_shape = (
            (sum(sizes),) if layout.is_packed else (batch, layout.length)
            for sizes, layout in ((case.q_sizes, self.q_layout), (case.k_sizes, self.kv_layout))
        )
        self.leaves = {
            "q": rand(*q_shape, heads, dim),
            "k": rand(*k_shape, groups, dim),
            "v": rand(*k_shape, groups, v_dim),
        }
        grid = (batch, heads, max(case.q_sizes), max(case.k_sizes))
        if case.bias == "dense":
            tensor = rand(*grid)
            hidden = torch.rand(grid, generator=generator) < 0.2
            self.leaves["bias"] = tensor.masked_fill(hidden.to(self.device), -torch.inf)
        elif case.bias is not None:  # tables stay in float32 under mixed precision
            shape = {"alibi": (heads,), "t5": (16, heads), "relative": (heads, 9)}[case.bias]
            self.leaves["bias"] = rand(*shape, dtype=torch.promote_types(self.dtype, torch.float32))

    def _layout(self, sizes: tuple[int, ...], kind: str) -> Layout:
        if kind == "full":
            return Layout.full(len(sizes), sizes[0], self.device)
        if kind == "packed":
            cu_seqlens = F.pad(torch.tensor(sizes).cumsum(0), (1, 0)).to(self.device, torch.int32)
            return Layout.packed(cu_seqlens, max(sizes))
        places, lengths = torch.arange(max(sizes)), torch.tensor(sizes)[:, None]
        mask = places < lengths if kind == "right" else places >= max(sizes) - lengths
        return Layout.padded(mask.to(self.device))

    def bias(self, weight: Tensor | None) -> Bias | None:
        """Make the bias object of the case around its weight."""
        if weight is None or self.case.bias is None:
            return None
        if self.case.bias == "t5":
            return T5Bias(weight, bidirectional=not self.case.causal, max_distance=32)
        return {"alibi": ALiBi, "relative": RelativeBias, "dense": DenseBias}[self.case.bias](weight)

    def solve(
        self, f: Callable[..., Any], dtype: torch.dtype | None = None, padding: float = math.nan
    ) -> dict[str, Tensor]:
        """Run forward and backward by `f(problem, q, k, v, bias)`, which gives out and lse; name every result.

        Inputs hold NaN at padding: nothing there may reach a result.
        """
        leaves = {name: x.to(dtype or x.dtype, copy=True) for name, x in self.leaves.items()}
        for name, layout in (("q", self.q_layout), ("k", self.kv_layout), ("v", self.kv_layout)):
            if layout.mask is not None:
                leaves[name][~layout.mask] = padding
        for x in leaves.values():
            x.requires_grad_()
        out, lse = f(self, leaves["q"], leaves["k"], leaves["v"], self.bias(leaves.get("bias")))
        probe = torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
        grads = torch.autograd.grad(out, list(leaves.values()), probe.to(out.device, self.dtype).to(out.dtype))
        results = {"out": out.detach(), **{f"d{name}": g for name, g in zip(leaves, grads, strict=True)}}
        return results if lse is None else {**results, "lse": lse.detach()}

    def options(self) -> dict[str, Any]:
        """Give the options that all of `attention()`'s backends share."""
        case = self.case
        return {
            "causal": case.causal,
            "window": case.window,
            "softcap": case.softcap,
            "dropout_p": case.dropout_p,
            "seed": _SEED if case.dropout_p > 0 else None,
            "return_lse": case.return_lse,
        }


def solve_exactly(problem: Problem, q: Tensor, k: Tensor, v: Tensor, bias: Bias | None) -> tuple[Tensor, Tensor | None]:
    """Run the reference backend, in the tensors' own dtype."""
    settings = AttentionSettings(bias=bias, scale=q.shape[-1] ** -0.5, **problem.options())
    return reference_attention(q, k, v, problem.q_layout, problem.kv_layout, settings)


def solve_plainly(problem: Problem, q: Tensor, k: Tensor, v: Tensor, bias: Bias | None) -> tuple[Tensor, Tensor | None]:
    """Compute the definition in q's own dtype, step by step: the precision that a user of plain PyTorch has.

    Padding must hold finite numbers.
    """
    case, groups = problem.case, q.shape[-2] // k.shape[-2]
    q_grid, kv_grid = problem.q_layout.as_padded(), problem.kv_layout.as_padded()
    q_BHLD = problem.q_layout.pad(q).transpose(1, 2)
    k_BHSD = problem.kv_layout.pad(k).transpose(1, 2).repeat_interleave(groups, dim=1)
    v_BHSD = problem.kv_layout.pad(v).transpose(1, 2).repeat_interleave(groups, dim=1)
    scores_BHLS = q_BHLD @ k_BHSD.mT * q.shape[-1] ** -0.5
    if case.softcap is not None:
        scores_BHLS = case.softcap * torch.tanh(scores_BHLS / case.softcap)
    if bias is not None:
        bias = bias.narrow(None, q_grid.length, kv_grid.length)
        scores_BHLS = scores_BHLS + bias.dense(
            query_positions(q_grid, kv_grid, case.causal), kv_grid.positions
        ).to(q.dtype)  # fmt: skip
    keep = visible(q_grid, kv_grid, case.causal, case.window)
    if keep is not None:
        scores_BHLS = scores_BHLS.masked_fill(~keep, -torch.inf)
    empty_BHL1 = ~(scores_BHLS > -torch.inf).any(-1, keepdim=True)
    if q_grid.mask is not None:
        empty_BHL1 = empty_BHL1 | ~q_grid.mask[:, None, :, None]
    scores_BHLS = scores_BHLS.masked_fill(empty_BHL1, 0)
    weights_BHLS = scores_BHLS.softmax(-1).masked_fill(empty_BHL1, 0)
    if case.dropout_p > 0:
        kept_BHLS = dropout_keep(_SEED, q_grid, kv_grid, q.shape[-2], case.dropout_p)
        weights_BHLS = weights_BHLS * kept_BHLS / (1 - case.dropout_p)
    out = problem.q_layout.unpad((weights_BHLS @ v_BHSD).transpose(1, 2))
    if not case.return_lse:
        return out, None
    lse_BHL = scores_BHLS.logsumexp(-1).masked_fill(empty_BHL1[..., 0], -torch.inf)
    return out, problem.q_layout.unpad(lse_BHL.transpose(1, 2)).transpose(-1, -2)
