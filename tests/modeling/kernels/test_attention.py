"""attention(): every layout, mask, bias and backend against a float64 implementation written here, row by row.

Shapes: B batch, L queries, S keys, N packed tokens, H heads, G key/value heads, D head dim.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import assert_within
from torch import Tensor

from urform.modeling.kernels import attention_dispatch, attention_sdpa
from urform.modeling.kernels.attention_biases import ALiBi, Bias, DenseBias, RelativeBias, T5Bias
from urform.modeling.kernels.attention_dispatch import attention, attention_backends
from urform.modeling.kernels.attention_layouts import Layout
from urform.modeling.kernels.blockwise.attention_buckets import Limits

BACKENDS = [name for name in attention_backends() if name not in ("triton", "varlen")]  # which have tests of their own
BIASES = [None, "alibi", "t5", "t5-causal", "relative", "dense", "dense-inf", "dense-2d"]
MASKS = ["none", "left", "right", "holes", "empty-row"]
WINDOWS = [None, (2, 1), (0, None), (-1, 2), (3, 0)]


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="attention.. runs on")
        yield


def attend(*tensors: Tensor, **options: Any) -> Any:
    """attention(), for the type checker: a tensor, or two with return_lse."""
    return attention(*tensors, **options)


# ---- the truth: loops over sequences, heads and rows, from the definition ----


def make_mask(kind: str, batch: int, length: int, generator: torch.Generator) -> Tensor:
    mask = torch.ones(batch, length, dtype=torch.bool)
    for row in range(batch):
        size = int(torch.randint(1, length + 1, (), generator=generator))
        if kind == "left":
            mask[row, : length - size] = False
        elif kind == "right":
            mask[row, size:] = False
        elif kind == "holes":
            mask[row] = torch.rand(length, generator=generator) < 0.6
        elif kind == "empty-row" and row == 0:
            mask[row] = False
    return mask


@dataclass
class Problem:
    """One attention problem in padded form, in float64, with everything that takes a gradient."""

    batch: int = 2
    length: int = 5
    keys: int = 7
    heads: int = 4
    groups: int = 2
    dim: int = 3
    q_mask_kind: str = "right"
    k_mask_kind: str = "left"
    causal: bool = False
    window: tuple[int | None, int | None] | None = None
    bias_kind: str | None = None
    softcap: float | None = None
    scale: float | None = None
    dropout_p: float = 0.0
    seed: int | None = None
    entropy: int = 0
    poison: bool = True
    q: Tensor = field(init=False)
    k: Tensor = field(init=False)
    v: Tensor = field(init=False)
    q_mask: Tensor = field(init=False)
    k_mask: Tensor = field(init=False)
    weight: Tensor | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        g = torch.Generator().manual_seed(self.entropy)

        def rand(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, dtype=torch.float64)

        self.q_mask = make_mask(self.q_mask_kind, self.batch, self.length, g)
        self.k_mask = make_mask(self.k_mask_kind, self.batch, self.keys, g)
        self.q = rand(self.batch, self.length, self.heads, self.dim)
        self.k = rand(self.batch, self.keys, self.groups, self.dim)
        self.v = rand(self.batch, self.keys, self.groups, self.dim)
        if self.poison:  # nothing in padding may reach a result
            self.q[~self.q_mask] = math.nan
            self.k[~self.k_mask] = math.nan
            self.v[~self.k_mask] = math.nan
        shapes = {
            "alibi": (self.heads,),
            "t5": (12, self.heads),
            "t5-causal": (12, self.heads),
            "relative": (self.heads, 5),
            "dense": (self.batch, self.heads, self.length, self.keys),
            "dense-inf": (self.batch, 1, self.length, self.keys),
            "dense-2d": (self.length, 1),
        }
        if self.bias_kind is not None:
            self.weight = rand(*shapes[self.bias_kind])
            if self.bias_kind == "dense-inf":
                self.weight[torch.rand(self.weight.shape, generator=g) < 0.4] = -math.inf
        for x in self.leaves:
            x.requires_grad_()

    @property
    def leaves(self) -> list[Tensor]:
        return [x for x in (self.q, self.k, self.v, self.weight) if x is not None]

    def bias(self, weight: Tensor | None) -> Bias | None:
        if weight is None or self.bias_kind is None:
            return None
        if self.bias_kind.startswith("t5"):
            return T5Bias(weight, bidirectional=self.bias_kind == "t5", max_distance=20)
        return {"alibi": ALiBi, "relative": RelativeBias}.get(self.bias_kind, DenseBias)(weight)

    def options(self, weight: Tensor | None) -> dict[str, Any]:
        names = ("causal", "window", "softcap", "scale", "dropout_p", "seed")
        return {name: getattr(self, name) for name in names} | {"bias": self.bias(weight)}

    def run(self, backend: str, leaves: list[Tensor] | None = None, **more: Any) -> Any:
        q, k, v, *weight = self.leaves if leaves is None else leaves
        layouts = {"q_layout": Layout.padded(self.q_mask), "kv_layout": Layout.padded(self.k_mask.long())}
        return attend(q, k, v, **layouts, **self.options(weight[0] if weight else None), backend=backend, **more)

    def run_packed(self, backend: str, **more: Any) -> Tensor:
        """The same problem packed, and its result padded again."""
        out = attend(
            self.q[self.q_mask], self.k[self.k_mask], self.v[self.k_mask],
            q_layout=packed(self.q_mask), kv_layout=packed(self.k_mask),
            **self.options(self.weight), backend=backend, **more,
        )  # fmt: skip
        return torch.zeros(self.q.shape, dtype=out.dtype).index_put((self.q_mask,), out)

    def bias_row(self, b: int, h: int, raw_i: int, position: int, raw_js: list[int], js: list[int]) -> Tensor:
        weight = self.weight
        if weight is None or self.bias_kind is None:
            return torch.zeros(len(js), dtype=torch.float64)
        if self.bias_kind == "alibi":
            return torch.stack([-weight[h] * abs(position - j) for j in js])
        if self.bias_kind.startswith("t5"):
            return torch.stack([weight[bucket(j - position, 12, 20, self.bias_kind == "t5"), h] for j in js])
        if self.bias_kind == "relative":
            return torch.stack([weight[h, min(max(j - position, -2), 2) + 2] for j in js])
        return weight.expand(self.batch, self.heads, self.length, self.keys)[b, h, raw_i, raw_js]

    def truth(self) -> tuple[Tensor, Tensor]:
        """Output `[B, L, H, D]` and lse `[B, H, L]` from the definition."""
        scale = self.dim**-0.5 if self.scale is None else self.scale
        left, right = (math.inf if side in (None, -1) else side for side in self.window or (None, None))
        outs, lses = {}, {}
        for b in range(self.batch):
            q_rows = self.q_mask[b].nonzero().flatten().tolist()
            k_rows = self.k_mask[b].nonzero().flatten().tolist()
            shift = len(k_rows) - len(q_rows) if self.causal else 0
            for h, (i, raw_i) in itertools.product(range(self.heads), enumerate(q_rows)):
                position = i + shift
                top = min(position + right, position if self.causal else math.inf)
                js = [j for j in range(len(k_rows)) if position - left <= j <= top]
                if not js:
                    continue
                raw_js = [k_rows[j] for j in js]
                g = h // (self.heads // self.groups)
                scores = self.k[b, raw_js, g] @ self.q[b, raw_i, h] * scale
                if self.softcap is not None:
                    scores = self.softcap * (scores / self.softcap).tanh()
                scores = scores + self.bias_row(b, h, raw_i, position, raw_js, js)
                finite = [n for n, s in enumerate(scores.tolist()) if s > -math.inf]
                if not finite:
                    continue
                scores = scores[finite]
                weights = (scores - scores.max().detach()).exp()
                weights = weights / weights.sum()
                if self.dropout_p > 0:
                    kept = [keep(self.seed or 0, b, h, i, js[n], self.dropout_p) for n in finite]
                    weights = weights * torch.tensor(kept) / (1 - self.dropout_p)
                outs[b, raw_i, h] = weights @ self.v[b, [raw_js[n] for n in finite], g]
                lses[b, h, raw_i] = scores.exp().sum().log()
        out = torch.zeros(self.batch, self.length, self.heads, self.dim, dtype=torch.float64)
        lse = torch.full((self.batch, self.heads, self.length), -math.inf, dtype=torch.float64)
        for key, value in outs.items():
            out = out.index_put(tuple(torch.tensor(n) for n in key), value)
        for key, value in lses.items():
            lse = lse.index_put(tuple(torch.tensor(n) for n in key), value)
        return out, lse


def packed(mask: Tensor) -> Layout:
    sizes = mask.sum(-1)
    cu_seqlens = F.pad(sizes.cumsum(0), (1, 0)).to(torch.int32)
    return Layout.packed(cu_seqlens, mask.shape[1])


def bucket(ahead: int, buckets: int, max_distance: int, bidirectional: bool) -> int:
    first = 0
    if bidirectional:
        buckets //= 2
        first = buckets if ahead > 0 else 0
    distance = abs(ahead) if bidirectional else max(-ahead, 0)
    exact = buckets // 2
    if distance < exact:
        return first + distance
    octaves = math.log(distance / exact) / math.log(max_distance / exact)
    return first + min(exact + int(octaves * (buckets - exact)), buckets - 1)


def keep(seed: int, sequence: int, head: int, row: int, column: int, p: float) -> bool:
    """The documented dropout decision, in Python's integers."""
    low = 0xFFFFFFFF

    def mix(x: int) -> int:
        x = ((x ^ x >> 16) * 0x85EBCA6B) & low
        x = ((x ^ x >> 13) * 0xC2B2AE35) & low
        return x ^ x >> 16

    key = mix(mix(seed & low) ^ (seed >> 32))
    for part in (sequence, head, row):
        key = mix(key ^ part)
    return mix(key ^ ((column * 0x9E3779B9) & low)) >> 8 >= round(p * 2**24)


def serves(backend: str, problem: Problem) -> bool:
    row = attention_backends()[backend]
    return (problem.softcap is None or row["softcap"]) and (problem.dropout_p == 0 or row["seed"])


def gradients(out: Tensor, problem: Problem) -> list[Tensor]:
    probe = torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=out.dtype)
    grads = torch.autograd.grad((out * probe).sum(), problem.leaves, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(grads, problem.leaves, strict=True)]


@contextmanager
def small_blocks() -> Iterator[None]:
    """Let the blockwise backend meet many blocks, of rows and of keys, in small problems."""
    with pytest.MonkeyPatch.context() as patch:
        for name, size in {"elements": 24, "keys": 3, "rows": 2}.items():
            patch.setattr(Limits, name, size)
        yield


@contextmanager
def lone_sequences() -> Iterator[None]:
    """Let the sdpa backend give every packed sequence a call of its own, as it does with long ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_sdpa, "LONG_SEQUENCES", 0)
        yield


def check(problem: Problem, backends: list[str] = BACKENDS) -> None:
    """Output and every gradient of every backend, padded and packed, against the truth."""
    expected, expected_lse = problem.truth()
    any_key = expected.requires_grad
    expected_grads = gradients(expected, problem) if any_key else [torch.zeros_like(x) for x in problem.leaves]
    for backend in backends:
        if not serves(backend, problem):
            continue
        runs = {"padded": problem.run}
        if not (problem.bias_kind or "").startswith("dense"):  # a dense bias has the coordinates of one layout
            runs["packed"] = problem.run_packed
        sizes = [nullcontext, {"blockwise": small_blocks, "sdpa": lone_sequences}.get(backend, nullcontext)]
        for (name, run), size in itertools.product(runs.items(), sizes):
            at = f"{backend} {name} {size.__name__} {problem}"
            with size():
                out = run(backend)
                torch.testing.assert_close(out, expected, atol=1e-10, rtol=1e-9, msg=lambda m, at=at: f"{at}\n{m}")
                assert (out[expected == 0] == 0).all(), at
                for got, want in zip(gradients(out, problem), expected_grads, strict=True):
                    torch.testing.assert_close(got, want, atol=1e-9, rtol=1e-8, msg=lambda m, at=at: f"{at}\n{m}")
    with torch.no_grad():  # few queries without gradients go their own way
        out = problem.run("blockwise")
    torch.testing.assert_close(out, expected.detach(), atol=1e-10, rtol=1e-9, msg=lambda m: f"direct {problem}\n{m}")
    assert (out[expected == 0] == 0).all(), problem
    for backend in ("reference", "blockwise"):
        out, lse = problem.run(backend, return_lse=True)
        torch.testing.assert_close(lse, expected_lse, atol=1e-10, rtol=1e-9)


# ---- against the truth ----


@pytest.mark.parametrize("k_mask_kind", MASKS)
@pytest.mark.parametrize("q_mask_kind", MASKS)
def test_masks(q_mask_kind: str, k_mask_kind: str) -> None:
    for causal, (length, keys) in itertools.product((False, True), ((3, 6), (6, 3), (5, 5))):
        check(Problem(3, length, keys, q_mask_kind=q_mask_kind, k_mask_kind=k_mask_kind, causal=causal, entropy=1))


@pytest.mark.parametrize("bias_kind", BIASES)
@pytest.mark.parametrize("causal", [False, True])
def test_biases(bias_kind: str | None, causal: bool) -> None:
    check(Problem(2, 4, 11, bias_kind=bias_kind, causal=causal))
    check(Problem(1, 11, 4, bias_kind=bias_kind, causal=causal, q_mask_kind="none", k_mask_kind="none"))


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("causal", [False, True])
def test_windows(window: tuple[int | None, int | None] | None, causal: bool) -> None:
    for length, keys in ((7, 5), (4, 9)):
        check(Problem(2, length, keys, q_mask_kind="holes", k_mask_kind="right", window=window, causal=causal))
        check(Problem(1, length, keys, q_mask_kind="none", k_mask_kind="none", window=window, causal=causal))


def test_softcap_scale_and_group_sizes() -> None:
    for heads, groups in ((4, 4), (6, 2), (3, 1)):
        check(Problem(heads=heads, groups=groups, softcap=1.5, scale=0.7, bias_kind="alibi"))
        check(Problem(heads=heads, groups=groups, scale=-0.3, causal=True))


@pytest.mark.parametrize("seed", [0, 5, 2**40 + 3])
def test_dropout_is_the_documented_function(seed: int) -> None:
    check(Problem(dropout_p=0.4, seed=seed, q_mask_kind="holes", k_mask_kind="right"))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    problem=st.builds(
        Problem,
        batch=st.integers(1, 3),
        length=st.integers(1, 8),
        keys=st.integers(1, 9),
        heads=st.sampled_from([2, 4]),
        groups=st.sampled_from([1, 2]),
        dim=st.integers(1, 4),
        q_mask_kind=st.sampled_from(MASKS),
        k_mask_kind=st.sampled_from(MASKS),
        causal=st.booleans(),
        window=st.sampled_from(WINDOWS),
        bias_kind=st.sampled_from(BIASES),
        softcap=st.sampled_from([None, None, 2.0]),
        dropout_p=st.sampled_from([0.0, 0.0, 0.3]),
        seed=st.integers(0, 2**62),
        entropy=st.integers(0, 1000),
    )
)
def test_random_problems(problem: Problem) -> None:
    check(problem)


@pytest.mark.parametrize("bias_kind", ["alibi", "t5", "relative", "dense", "dense-inf"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend: str, bias_kind: str) -> None:
    problem = Problem(2, 3, 4, 2, 1, 2, q_mask_kind="empty-row", causal=True, bias_kind=bias_kind, poison=False)
    with torch.no_grad():
        if bias_kind == "dense-inf":  # finite differences need finite inputs
            problem.leaves[3].clamp_(min=-20)
    assert torch.autograd.gradcheck(lambda *leaves: problem.run(backend, list(leaves)), problem.leaves)


# ---- layouts ----


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [False, True])
def test_mixed_layouts(backend: str, causal: bool) -> None:
    problem = Problem(3, 5, 6, q_mask_kind="left", k_mask_kind="holes", causal=causal, bias_kind="t5", poison=False)
    expected, _ = problem.truth()
    options = problem.options(problem.weight) | {"backend": backend}
    keys_packed = attend(
        problem.q, problem.k[problem.k_mask], problem.v[problem.k_mask],
        q_layout=Layout.padded(problem.q_mask), kv_layout=packed(problem.k_mask), **options,
    )  # fmt: skip
    torch.testing.assert_close(keys_packed, expected)
    queries_packed = attend(
        problem.q[problem.q_mask], problem.k, problem.v,
        q_layout=packed(problem.q_mask), kv_layout=Layout.padded(problem.k_mask), **options,
    )  # fmt: skip
    torch.testing.assert_close(queries_packed, expected[problem.q_mask])


@pytest.mark.parametrize("backend", BACKENDS)
def test_dense_bias_on_packed_sequences_counts_inside_each(backend: str) -> None:
    problem = Problem(3, 6, 8, q_mask_kind="right", k_mask_kind="right", bias_kind="dense-inf")
    torch.testing.assert_close(problem.run_packed(backend), problem.truth()[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_sequences_and_empty_tensors(backend: str) -> None:
    pairs: list[tuple[list[int], list[int]]] = [
        ([2, 0, 3], [0, 4, 3]), ([3, 0], [0, 5]), ([0, 0], [0, 0]), ([2, 1], [0, 0]), ([], []),
    ]  # fmt: skip
    for q_sizes, k_sizes in pairs:
        q = torch.randn(sum(q_sizes), 2, 4, requires_grad=True)
        k = torch.randn(sum(k_sizes), 2, 4, requires_grad=True)
        layouts = [Layout.packed(torch.tensor([0, *itertools.accumulate(s)])) for s in (q_sizes, k_sizes)]
        out = attend(q, k, k, q_layout=layouts[0], kv_layout=layouts[1], causal=True, backend=backend)
        assert out.shape == q.shape
        for grad in torch.autograd.grad(out.sum(), [q, k]):
            assert grad.isfinite().all()
        if q_sizes and k_sizes[0] == 0:
            assert (out[: q_sizes[0]] == 0).all()
    for batch, length, keys in ((0, 3, 3), (2, 0, 3), (2, 3, 0)):
        q = torch.randn(batch, length, 2, 4, requires_grad=True)
        k = torch.randn(batch, keys, 2, 4, requires_grad=True)
        out = attend(q, k, k, backend=backend)
        assert out.shape == q.shape and (out == 0).all()
        torch.autograd.grad(out.sum(), [q, k])


def test_packed_equals_padded_with_dropout_and_many_lengths() -> None:
    sizes = torch.tensor([1, 9, 17, 2, 33, 8, 16, 30])
    mask = torch.arange(40) < sizes[:, None]
    q, k, v = (torch.randn(8, 40, 2, 8) for _ in range(3))
    layout = packed(mask)
    for options in ({"dropout_p": 0.5, "seed": 11, "backend": "reference"}, {"backend": "sdpa"}):
        for causal in (False, True):
            padded = [
                attend(*tensors, q_layout=Layout.padded(mask), kv_layout=Layout.padded(mask), causal=causal, **options)
                for tensors in ((q, k, v), (q.double(), k.double(), v.double()))
            ]
            out = attend(q[mask], k[mask], v[mask], q_layout=layout, kv_layout=layout, causal=causal,
                            **options)  # fmt: skip
            assert_within(out, *(rows[mask] for rows in padded))


def test_sdpa_never_sees_the_whole_packed_square(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = torch.tensor([5, 9, 30, 12, 7, 30, 11, 28])
    cu_seqlens = F.pad(sizes.cumsum(0), (1, 0))
    areas: list[int] = []
    kernel = F.scaled_dot_product_attention

    def spy(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        areas.append(q.shape[0] * q.shape[2] * k.shape[2])
        assert attn_mask is None or attn_mask.numel() <= areas[-1]
        return kernel(q, k, v, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    x = torch.randn(int(sizes.sum()), 2, 4)
    layout = Layout.packed(cu_seqlens)
    for options in ({}, {"causal": True}, {"window": (4, 4)}):
        areas.clear()
        attend(x, x, x, q_layout=layout, kv_layout=layout, backend="sdpa", **options)
        assert sum(areas) < 1.7 * int((sizes**2).sum())


def test_noncontiguous_inputs_and_other_value_dim() -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 3, 10, generator=generator).permute(0, 2, 1, 3)[..., ::2]
    k = torch.randn(2, 2, 7, 5, generator=generator).transpose(1, 2)
    v = torch.randn(7, 2, 2, 6, generator=generator).transpose(0, 1)
    outs = [attend(q, k, v, causal=True, backend=backend) for backend in BACKENDS]
    straight = attend(q.contiguous(), k.contiguous(), v.contiguous(), causal=True)
    truth = attend(q.double(), k.double(), v.double(), causal=True, backend="reference")
    assert straight.shape == (2, 3, 4, 6)
    for out in outs:
        assert_within(out, straight, truth)


# ---- numbers ----


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias_kind", [None, "alibi", "t5", "relative"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_low_precision_is_within_twice_torch_s_own_error(
    backend: str, bias_kind: str | None, dtype: torch.dtype
) -> None:
    problem = Problem(2, 23, 37, dim=16, causal=True, bias_kind=bias_kind, entropy=3, poison=False)
    low = [x.detach().to(dtype) for x in problem.leaves]
    problem.q, problem.k, problem.v = (x.double().requires_grad_() for x in low[:3])
    if problem.weight is not None:
        problem.weight = low[3].double().requires_grad_()
    expected = problem.truth()[0]
    # PyTorch's own attention in this dtype: matmul, mask, softmax, matmul
    k, v = (x.repeat_interleave(2, dim=2) for x in low[1:3])
    scores = torch.einsum("blhd,bshd->bhls", low[0], k) * 0.25
    ranks = [m.cumsum(-1) - 1 for m in (problem.q_mask, problem.k_mask)]
    position = ranks[0] + (problem.k_mask.sum(-1) - problem.q_mask.sum(-1))[:, None]
    bias = problem.bias(low[3] if problem.weight is not None else None)
    if bias is not None:
        scores = scores + bias.dense(position, ranks[1]).to(dtype)
    allowed = (ranks[1][:, None] <= position[..., None]) & problem.k_mask[:, None] & problem.q_mask[..., None]
    weights = scores.masked_fill(~allowed[:, None], -math.inf).softmax(-1).nan_to_num(0)
    torch_error = (torch.einsum("bhls,bshd->blhd", weights, v).double() - expected).abs().max()
    error = (problem.run(backend, low).double() - expected).abs().max()
    assert error <= 2 * torch_error + 1e-6


def test_autocast_brings_q_k_v_together() -> None:
    q, k, v = torch.randn(1, 3, 2, 4), torch.randn(1, 3, 2, 4), torch.randn(1, 3, 2, 4, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        outs = [attend(q, k, v, backend=backend) for backend in BACKENDS]
    assert all(out.dtype == torch.bfloat16 for out in outs)


def test_dropout_keeps_its_share_and_scales() -> None:
    q = torch.zeros(2, 64, 4, 1)
    k, v = torch.zeros(2, 256, 4, 1), torch.ones(2, 256, 4, 1)
    kept = attend(q, k, v, dropout_p=0.25, seed=3, backend="reference")
    assert abs(kept.mean().item() - 1) < 0.01
    assert kept.std().item() == pytest.approx(math.sqrt(0.25 / 0.75 / 256), rel=0.15)
    other = attend(q, k, v, dropout_p=0.25, seed=torch.tensor(4), backend="reference")
    assert not torch.equal(kept, other)


def test_dropout_without_seed_follows_torch_s_generator() -> None:
    x = torch.randn(2, 6, 2, 4)
    for backend in BACKENDS:
        torch.manual_seed(1)
        first = attend(x, x, x, dropout_p=0.5, backend=backend)
        second = attend(x, x, x, dropout_p=0.5, backend=backend)
        torch.manual_seed(1)
        again = attend(x, x, x, dropout_p=0.5, backend=backend)
        assert torch.equal(first, again) and not torch.equal(first, second)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_t5_buckets_are_transformers(bidirectional: bool) -> None:
    from transformers.models.t5.modeling_t5 import T5Attention

    ahead = torch.arange(-600, 600)[None]
    for buckets, max_distance in ((32, 128), (8, 20), (16, 64), (32, 256)):
        bias = T5Bias(torch.zeros(buckets, 2), bidirectional, max_distance)
        theirs = T5Attention._relative_position_bucket(ahead, bidirectional, buckets, max_distance)
        assert torch.equal(bias.bucket(ahead), theirs)


def test_compiles_whole_on_the_padded_path() -> None:
    x, mask = torch.randn(2, 5, 2, 4), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    slopes = torch.tensor([0.5, 0.25])

    def run(x: Tensor, mask: Tensor, slopes: Tensor) -> Any:
        layout = Layout.padded(mask)
        soft = attend(x, x, x, q_layout=layout, kv_layout=layout, causal=True, softcap=3.0, dropout_p=0.2, seed=9)
        return soft, attend(x, x, x, q_layout=layout, kv_layout=layout, bias=ALiBi(slopes))

    compiled = torch.compile(run, fullgraph=True, backend="eager")
    assert_within(compiled(x, mask, slopes), run(x, mask, slopes), run(x.double(), mask, slopes.double()))


# ---- choosing and refusing ----


def test_auto_warns_once_when_it_leaves_the_fast_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_dispatch, "_warned", set())
    poor = replace(attention_dispatch.BACKENDS["blockwise"], serves=frozenset({"causal"}))
    x = torch.randn(1, 3, 2, 4, requires_grad=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        attend(x, x, x, causal=True, softcap=3.0, dropout_p=0.1, seed=1)
        assert not caught
        monkeypatch.setitem(attention_dispatch.BACKENDS, "blockwise", poor)
        attend(x, x, x, causal=True)
        assert not caught
        for _ in range(2):
            attend(x, x, x, softcap=3.0)
        attend(x, x, x, dropout_p=0.1, seed=1)
    messages = [str(w.message) for w in caught]
    assert len(messages) == 2 and "softcap" in messages[0] and "seed" in messages[1]
    assert all("blockwise" in message and "reference" in message for message in messages)


def test_a_backend_that_cannot_run_here_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"backend='triton' cannot run here: .*(GPU|not installed)"):
        attend(X, KV, KV, backend="triton")


X, KV = torch.randn(2, 3, 4, 8), torch.randn(2, 5, 2, 8)
PACKED = torch.randn(6, 4, 8)
LAYOUT = Layout.packed(torch.tensor([0, 2, 6]))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"backend": "nonsense"}, ["backend", "nonsense", "reference", "sdpa"]),
        ({"backend": "sdpa", "softcap": 2.0}, ["sdpa", "softcap", "reference"]),
        ({"backend": "sdpa", "return_lse": True}, ["sdpa", "return_lse"]),
        ({"backend": "sdpa", "dropout_p": 0.1, "seed": 1}, ["sdpa", "seed"]),
        ({"k": KV[:, :, :1].expand(2, 5, 3, 8), "v": KV[:, :, :1].expand(2, 5, 3, 8)}, ["multiple", "3"]),
        ({"k": KV.double()}, ["k", "float64", "float32"]),
        ({"q": X.long()}, ["q", "int64"]),
        ({"q": X[0, 0]}, ["q", "packed"]),
        ({"q": PACKED}, ["q_layout", "Layout.packed"]),
        ({"v": KV[:, :4]}, ["v", "agree"]),
        ({"k": KV[..., :4], "v": KV}, ["head dim"]),
        ({"q": X[:1]}, ["1 sequences", "2"]),
        ({"q_layout": Layout.padded(torch.ones(2, 4, dtype=torch.bool))}, ["q_layout", "[2, 4]"]),
        ({"q_layout": LAYOUT}, ["q_layout", "6 tokens"]),
        ({"kv_layout": torch.ones(2, 5)}, ["kv_layout", "Layout.padded"]),
        ({"window": 3}, ["window", "left, right"]),
        ({"window": (-2, 1)}, ["window", "-2"]),
        ({"softcap": 0.0}, ["softcap"]),
        ({"scale": math.inf}, ["scale"]),
        ({"dropout_p": 1.0}, ["dropout_p"]),
        ({"dropout_p": 0.1, "seed": -1}, ["seed", "-1"]),
        ({"bias": torch.zeros(3, 5)}, ["bias", "DenseBias"]),
        ({"bias": DenseBias(torch.zeros(2, 4, 3, 6))}, ["DenseBias", "[2, 4, 3, 5]"]),
        ({"bias": ALiBi(torch.zeros(3))}, ["ALiBi", "3", "4"]),
        ({"bias": T5Bias(torch.zeros(8, 3))}, ["T5Bias", "3", "4"]),
        ({"bias": RelativeBias(torch.zeros(3, 5))}, ["RelativeBias", "3", "4"]),
    ],
)
def test_errors_name_the_argument(arguments: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        attend(**({"q": X, "k": KV, "v": KV} | arguments))
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: Layout.packed(torch.tensor([1, 2])), ["start at 0"]),
        (lambda: Layout.packed(torch.tensor([0, 4, 2])), ["decrease", "4 then 2"]),
        (lambda: Layout.packed(torch.tensor([0, 4]), 3), ["max_length=3", "4"]),
        (lambda: Layout.packed(torch.tensor([0.0, 4.0])), ["int32 or int64"]),
        (lambda: Layout.packed(torch.tensor([[0, 4]])), ["shape"]),
        (lambda: Layout.padded(torch.ones(2)), ["mask", "shape"]),
        (lambda: Layout.padded(torch.ones(2, 3)), ["mask", "float32"]),
        (lambda: ALiBi(torch.ones(2, 2)), ["slopes"]),
        (lambda: T5Bias(torch.ones(2, 2)), ["T5Bias", "2 buckets"]),
        (lambda: T5Bias(torch.ones(32, 2), True, 8), ["max_distance"]),
        (lambda: RelativeBias(torch.ones(2, 4)), ["2R + 1", "4"]),
        (lambda: DenseBias(torch.ones(2, 2, dtype=torch.bool)), ["bool", "-inf"]),
    ],
)
def test_layouts_and_biases_refuse_by_name(build: Any, words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        build()
    for word in words:
        assert word in str(error.value)
