"""The Triton kernels' numbers, in Triton's interpreter on a CPU, against a float64 implementation written here.

`TRITON_INTERPRET=1` is read when kernels are decorated and holds for a whole process, so the checks (functions named
`interpreted_*`, which pytest does not collect by itself) run in subprocesses of their own, with a GPU or without; other
tests of this process see Triton as it is. One check by hand:

    cd tests/modeling/kernels
    TRITON_INTERPRET=1 pytest -o python_functions='interpreted_*' test_triton_interpret.py -k dropout
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo
from numerics import assert_within
from torch import Tensor

from urform.modeling.kernels.attention_biases import ALiBi, Bias, DenseBias, RelativeBias, T5Bias
from urform.modeling.kernels.attention_layouts import Layout
from urform.modeling.kernels.attention_settings import AttentionSettings

# In the ordinary process ---------------------------------------------------------------------------------------------


def _run_interpreted(*arguments: str) -> None:
    command = [
        sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist",
        "-o", "python_functions=interpreted_*", __file__, *arguments,
    ]  # fmt: skip
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    for name in [name for name in environment if name.startswith("PYTEST_")]:
        del environment[name]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    if result.returncode != 0:
        pytest.fail(result.stdout[-8000:] + result.stderr[-2000:], pytrace=False)


@pytest.mark.timeout(900)  # minutes of one core where others use it, too
@pytest.mark.parametrize("part", ["matches", "operator"])
def test_in_the_interpreter(part: str) -> None:
    pytest.importorskip("triton", reason="the triton backend is optional, and triton is not installed")
    _run_interpreted("-k", part)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_random_cases_in_the_interpreter() -> None:
    pytest.importorskip("triton", reason="the triton backend is optional, and triton is not installed")
    _run_interpreted("-m", "slow", "-o", "timeout=2900")


def test_cpu_tensors_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from urform.modeling.kernels.triton import attention_triton

    monkeypatch.setattr(attention_triton, "INTERPRETED", False)
    q = torch.randn(1, 4, 2, 16)
    layout = Layout.full(1, 4)
    with pytest.raises(ValueError, match=r"backend='triton' needs"):
        attention_triton.triton_attention(q, q, q, layout, layout, AttentionSettings())


# The float64 implementation ------------------------------------------------------------------------------------------


@dataclass
class Side:
    """One side's layout, and for every sequence the rows of the flat tensor that hold its real tokens, in order."""

    layout: Layout
    shape: tuple[int, ...]
    rows: list[list[int]]
    columns: list[list[int]]  # what a DenseBias calls these tokens

    @property
    def padding(self) -> list[int]:
        real = {row for rows in self.rows for row in rows}
        return [row for row in range(int(np.prod(self.shape))) if row not in real]


def packed(*sizes: int) -> Side:
    starts = np.cumsum([0, *sizes])
    rows = [list(range(a, b)) for a, b in itertools.pairwise(starts)]
    layout = Layout.packed(torch.tensor(starts))
    return Side(layout, (int(starts[-1]),), rows, [list(range(size)) for size in sizes])


def full(batch: int, length: int) -> Side:
    rows = [list(range(b * length, (b + 1) * length)) for b in range(batch)]
    return Side(Layout.full(batch, length), (batch, length), rows, [list(range(length))] * batch)


def padded(*lengths: int, length: int, where: str = "holes") -> Side:
    mask = torch.zeros(len(lengths), length, dtype=torch.bool)
    generator = torch.Generator().manual_seed(length)
    for row, size in zip(mask, lengths, strict=True):
        places = {
            "left": torch.arange(length - size, length),
            "right": torch.arange(size),
            "holes": torch.randperm(length, generator=generator)[:size],
        }[where]
        row[places] = True
    columns = [row.nonzero()[:, 0].tolist() for row in mask]
    rows = [[b * length + column for column in row] for b, row in enumerate(columns)]
    return Side(Layout.padded(mask), (len(lengths), length), rows, columns)


def bias_of_sequence(bias: Bias, ahead: Tensor, sequence: int, rows: list[int], columns: list[int]) -> Tensor:
    """The bias `[H, l, s]` of one sequence's tokens, by its definition."""
    if isinstance(bias, ALiBi):
        return -bias.weight[:, None, None] * ahead.abs()
    if isinstance(bias, T5Bias):
        from transformers.models.t5.modeling_t5 import T5Attention

        buckets = T5Attention._relative_position_bucket(
            ahead, bias.bidirectional, bias.weight.shape[0], bias.max_distance
        )
        return bias.weight[buckets].permute(2, 0, 1)
    if isinstance(bias, RelativeBias):
        reach = bias.weight.shape[1] // 2
        return bias.weight[:, ahead.clamp(-reach, reach) + reach]
    dense = bias.weight[(None,) * (4 - bias.weight.dim())]
    plane = dense[sequence if dense.shape[0] > 1 else 0]
    plane = plane[:, rows] if plane.shape[1] > 1 else plane.expand(-1, len(rows), -1)
    return plane[:, :, columns] if plane.shape[2] > 1 else plane.expand(-1, -1, len(columns))


def mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return x ^ (x >> np.uint32(16))


def survivors(seed: int, sequence: int, heads: int, rows: int, columns: int, dropout_p: float) -> Tensor:
    """The dropout mask `[H, l, s]` in unsigned arithmetic, as `attention_reference.dropout_keep` documents it."""
    with np.errstate(over="ignore"):
        key = mix(mix(np.full((1, 1, 1), seed & 0xFFFFFFFF, np.uint32)) ^ np.uint32(seed >> 32)) ^ np.uint32(sequence)
        key = mix(mix(key) ^ np.arange(heads, dtype=np.uint32)[:, None, None])
        key = mix(key ^ np.arange(rows, dtype=np.uint32)[None, :, None])
        hashed = mix(key ^ np.arange(columns, dtype=np.uint32)[None, None] * np.uint32(0x9E3779B9))
    return torch.from_numpy(hashed >> np.uint32(8) >= round(dropout_p * (1 << 24)))


def attend(
    q: Tensor, k: Tensor, v: Tensor, q_side: Side, kv_side: Side, *, causal: bool = False,
    window: tuple[int | None, int | None] | None = None, bias: Bias | None = None, softcap: float | None = None,
    scale: float, dropout_p: float = 0.0, seed: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention of flat `[N, H, D]` tensors, sequence by sequence, in their dtype; out `[N, H, Dv]`, lse `[N, H]`."""
    heads, group = q.shape[1], q.shape[1] // k.shape[1]
    left, right = window or (None, None)
    outs, lses, places = [], [], []
    for b, (q_rows, k_rows) in enumerate(zip(q_side.rows, kv_side.rows, strict=True)):
        if not q_rows or not k_rows:
            continue
        shift = len(k_rows) - len(q_rows) if causal else 0
        ahead = torch.arange(len(k_rows))[None] - torch.arange(len(q_rows))[:, None] - shift
        seen = torch.ones_like(ahead, dtype=torch.bool)
        seen &= ahead <= 0 if causal else seen
        seen &= ahead >= -left if left is not None else seen
        seen &= ahead <= right if right is not None else seen
        k_b, v_b = (x[k_rows].repeat_interleave(group, 1) for x in (k, v))
        scores = torch.einsum("lhd,shd->hls", q[q_rows], k_b) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if bias is not None:
            scores = scores + bias_of_sequence(bias, ahead, b, q_side.columns[b], kv_side.columns[b]).to(q.dtype)
        scores = scores.masked_fill(~seen, -torch.inf)
        dead = (scores == -torch.inf).all(-1, keepdim=True)
        weights = torch.softmax(scores.masked_fill(dead, 0), -1)
        lse = torch.logsumexp(scores.masked_fill(dead, 0), -1).masked_fill(dead[..., 0], -torch.inf)
        if dropout_p:
            weights = weights * survivors(seed, b, heads, *ahead.shape, dropout_p) / (1 - dropout_p)
        outs.append(torch.einsum("hls,shd->lhd", weights.masked_fill(dead, 0), v_b))
        lses.append(lse.t())
        places += q_rows
    nothing = 0 * (q.sum() + k.sum() + v.sum())  # gradients of zero where no sequence has anything to attend
    out = q.new_zeros(q.shape[0], heads, v.shape[2]) + nothing
    lse = q.new_full((q.shape[0], heads), -torch.inf) + nothing
    if places:
        out, lse = (
            out.index_copy(0, torch.tensor(places), torch.cat(outs)),
            lse.index_copy(0, torch.tensor(places), torch.cat(lses)),
        )
    return out, lse


# Comparison ----------------------------------------------------------------------------------------------------------


@dataclass
class Case:
    """What is computed, and how."""

    q_side: Side
    kv_side: Side
    heads: int = 2
    kv_heads: int = 2
    dim: int = 16
    v_dim: int = 16
    dtype: torch.dtype = torch.float32
    bias: Bias | None = None
    options: dict[str, Any] = field(default_factory=dict)


def ours(q: Tensor, k: Tensor, v: Tensor, case: Case, bias: Bias | None, **changes: Any) -> tuple[Tensor, Tensor]:
    """The backend, on flat tensors that are brought into the case's layouts; out and lse come back flat."""
    from urform.modeling.kernels.triton.attention_triton import triton_attention

    options = {"scale": q.shape[-1] ** -0.5, **case.options, **changes}
    settings = AttentionSettings(bias=bias, return_lse=True, **options)
    q, k, v = (x.unflatten(0, side.shape) for x, side in zip((q, k, v), _sides(case), strict=True))
    out, lse = triton_attention(q, k, v, case.q_side.layout, case.kv_side.layout, settings)
    assert lse is not None
    if len(case.q_side.shape) == 1:
        return out, lse.transpose(0, 1)
    return out.flatten(0, 1), lse.transpose(1, 2).flatten(0, 1)


def _sides(case: Case) -> tuple[Side, Side, Side]:
    return case.q_side, case.kv_side, case.kv_side


def tensors_of(case: Case) -> list[Tensor]:
    """q, k, v as float64 numbers that the case's dtype can hold, then the gradients of out and lse."""
    q_rows, k_rows = (int(np.prod(side.shape)) for side in (case.q_side, case.kv_side))
    shapes = [
        (q_rows, case.heads, case.dim), (k_rows, case.kv_heads, case.dim), (k_rows, case.kv_heads, case.v_dim),
        (q_rows, case.heads, case.v_dim), (q_rows, case.heads),
    ]  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator).to(case.dtype).double() for shape in shapes]


def results(case: Case, dtype: torch.dtype, backend: bool) -> dict[str, Tensor]:
    """Forward and all gradients in a dtype; `backend` asks ours, with NaN in all padding."""
    q, k, v, grad, grad_lse = (x.to(dtype) for x in tensors_of(case))
    inputs = [q, k, v]
    bias = None
    if case.bias is not None:
        weight = case.bias.weight.detach().to(torch.float32 if backend else dtype).requires_grad_()
        bias = type(case.bias)(weight, *_bias_arguments(case.bias))
    if backend:
        for x, side in ((q, case.q_side), (k, case.kv_side), (v, case.kv_side), (grad, case.q_side)):
            x[side.padding] = torch.nan
    for x in inputs:
        x.requires_grad_()
    if backend:
        out, lse = ours(*inputs, case, bias)
    else:
        out, lse = attend(*inputs, case.q_side, case.kv_side, bias=bias, **{"scale": case.dim**-0.5, **case.options})
    grad_lse = grad_lse.to(lse.dtype).masked_fill(lse == -torch.inf, 0)
    wanted = {"dq": q, "dk": k, "dv": v} | ({"dbias": bias.weight} if bias is not None else {})
    found = torch.autograd.grad((out, lse), list(wanted.values()), (grad, grad_lse), allow_unused=True)
    gradients = {
        name: torch.zeros_like(x) if g is None else g for (name, x), g in zip(wanted.items(), found, strict=True)
    }
    return {"out": out.detach(), "lse": lse.detach(), **gradients}


def _bias_arguments(bias: Bias) -> tuple[Any, ...]:
    return (bias.bidirectional, bias.max_distance) if isinstance(bias, T5Bias) else ()


def compare(case: Case) -> None:
    """Hold ours to twice the error of PyTorch in the same dtype, and to exact zeros where there is nothing."""
    truth = results(case, torch.float64, backend=False)
    torchs = results(case, case.dtype, backend=False)
    found = results(case, case.dtype, backend=True)
    for name, expected in truth.items():
        x = found[name].double()
        if name == "lse":
            assert torch.equal(x == -torch.inf, expected == -torch.inf), "lse is -inf in the wrong rows"
            x, expected = (y.masked_fill(expected == -torch.inf, 0) for y in (x, expected))
            torchs[name] = torchs[name].masked_fill(torchs[name] == -torch.inf, 0)
        assert x.isfinite().all(), f"{name} is not finite"
        peak = expected.abs().max().item() if expected.numel() else 0.0
        error = (x - expected).abs().max().item() if expected.numel() else 0.0
        other = (torchs[name].double() - expected).abs().max().item() if expected.numel() else 0.0
        bound = 2 * other + 2e-6 * max(1.0, peak)
        assert error <= bound, f"{name}: error {error:.2e}, PyTorch's {other:.2e}, largest value {peak:.2e}"
    empty = truth["lse"] == -torch.inf
    assert (found["out"][empty] == 0).all() and (found["dq"][empty] == 0).all()
    for name in ("dk", "dv"):
        assert (found[name][case.kv_side.padding] == 0).all(), f"{name} is not zero in padding"


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Fill what `torch.empty` and its relatives give with NaN; yields the sizes that were asked for."""
    sizes: list[int] = []

    def poison(function: Any) -> Any:
        def allocate(*args: Any, **kwargs: Any) -> Tensor:
            x = function(*args, **kwargs)
            sizes.append(x.numel())
            return x.fill_(torch.nan) if x.is_floating_point() else x

        return allocate

    torch._dynamo.trace_rules.lookup(torch.empty)  # it makes a table of PyTorch's functions once: not of these
    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))
    yield sizes


def table(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


def dense(*shape: int) -> Tensor:
    """A dense bias with entries, and (in its third row) all of a row, forbidden."""
    bias = table(*shape).masked_fill(torch.rand(shape, generator=torch.Generator().manual_seed(3)) < 0.1, -torch.inf)
    if bias.shape[-2] > 2:
        bias[..., 2, :] = -torch.inf
    return bias


CASES: dict[str, Case] = {
    "full": Case(full(2, 50), full(2, 70), kv_heads=1, v_dim=24),
    "full, causal, more keys": Case(full(2, 33), full(2, 70), options={"causal": True}),
    "full, causal, more queries": Case(full(1, 70), full(1, 33), options={"causal": True}),
    "packed, causal, empty sequences": Case(
        packed(50, 0, 7, 0, 33), packed(70, 5, 0, 0, 20), dim=40, v_dim=40, options={"causal": True}
    ),
    "no tokens": Case(packed(0, 0), packed(0, 0), options={"causal": True}),
    "no keys": Case(packed(5, 3), packed(0, 0)),
    "no queries": Case(packed(0, 0), packed(5, 3)),
    "padded, window": Case(
        padded(40, 0, 17, 50, length=50), padded(33, 9, 0, 40, length=40), options={"window": (9, 3)}
    ),
    "padded left and right": Case(
        padded(40, 17, length=50, where="left"), padded(33, 40, length=40, where="right"), options={"causal": True}
    ),
    "packed, causal, window, softcap, group of 3": Case(
        packed(100, 33), packed(120, 40), heads=6, options={"causal": True, "window": (9, 3), "softcap": 1.5}
    ),
    "window to the left": Case(packed(80), packed(90), options={"window": (40, None)}),
    "window beyond everything": Case(packed(40), packed(50), options={"window": (1 << 40, 1 << 31)}),
    "window to the right": Case(packed(80), packed(90), options={"window": (None, 5)}),
    "window of one key": Case(full(1, 40), full(1, 40), options={"window": (0, 0)}),
    "queries padded, keys packed": Case(
        padded(40, 17, length=50), packed(33, 40), options={"causal": True, "dropout_p": 0.4, "seed": 7}
    ),
    "dropout, softcap": Case(
        full(2, 40), full(2, 70), kv_heads=1, options={"dropout_p": 0.3, "seed": (5 << 40) + 3, "softcap": 3.0}
    ),
    "alibi": Case(padded(40, 0, 17, length=50), padded(33, 9, 40, length=40), bias=ALiBi(table(2))),
    "alibi, causal, packed": Case(packed(70, 3), packed(70, 9), bias=ALiBi(table(2)), options={"causal": True}),
    "t5, causal, dropout": Case(
        padded(40, 0, 17, length=50), padded(33, 9, 40, length=40), bias=T5Bias(table(8, 2), True, 20),
        options={"causal": True, "dropout_p": 0.3, "seed": 1234567890123},
    ),
    "t5, one direction": Case(
        packed(70, 33), packed(90, 20), kv_heads=1, bias=T5Bias(table(32, 2), False, 128), options={"causal": True}
    ),
    "t5, far": Case(packed(150), packed(170), bias=T5Bias(table(32, 2), True, 64), options={"softcap": 2.0}),
    "relative": Case(packed(90, 33), packed(70, 40), bias=RelativeBias(table(2, 9))),
    "relative, wider than the sequences": Case(
        packed(70, 33), packed(90, 40), bias=RelativeBias(table(2, 401)), options={"causal": True}
    ),
    "relative, window": Case(
        full(1, 80), full(1, 70), bias=RelativeBias(table(2, 101)), options={"window": (35, 20)}
    ),
    "relative, one value": Case(full(1, 40), full(1, 40), bias=RelativeBias(table(2, 1))),
    "dense": Case(
        padded(40, 0, 17, length=50), padded(33, 9, 40, length=40), bias=DenseBias(dense(3, 2, 50, 40)),
        options={"causal": True},
    ),
    "dense, one plane": Case(packed(50, 20), packed(40, 33), bias=DenseBias(dense(60, 45)), options={"softcap": 3.0}),
    "dense, a row per head": Case(
        padded(40, 17, length=50), padded(33, 40, length=40, where="left"), bias=DenseBias(dense(1, 2, 1, 40))
    ),
    "dense, a column per sequence": Case(full(2, 40), full(2, 50), bias=DenseBias(table(2, 1, 40, 1))),
    "head dim 72 and 8": Case(full(1, 40), full(1, 50), dim=72, v_dim=8),
    "head dim 20": Case(packed(40), packed(50), dim=20, v_dim=20, options={"causal": True}),
    "head dim 256": Case(full(1, 20), full(1, 40), dim=256, v_dim=256),
    "float16": Case(
        packed(50, 20), packed(70, 33), dtype=torch.float16, kv_heads=1, dim=64, v_dim=64, options={"causal": True}
    ),
    "float16, t5, dropout": Case(
        packed(50, 20), packed(70, 33), dtype=torch.float16, bias=T5Bias(table(8, 2), True, 20),
        options={"dropout_p": 0.2, "seed": 3},
    ),
    "bfloat16": Case(
        packed(50, 20), packed(70, 33), dtype=torch.bfloat16, kv_heads=1, dim=64, v_dim=64, options={"causal": True}
    ),
    "bfloat16, alibi, window, softcap": Case(
        padded(40, 17, length=50), padded(33, 40, length=40), dtype=torch.bfloat16, bias=ALiBi(table(2)),
        options={"window": (20, 20), "softcap": 2.0},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def interpreted_matches_float64(name: str, poisoned: list[int]) -> None:
    compare(CASES[name])


def random_case(seed: int) -> Case:
    """Anything that the backend serves."""
    random = np.random.default_rng(seed)

    def side(batch: int) -> Side:
        lengths = [int(random.choice([0, 1, random.integers(2, 20), random.integers(20, 120)])) for _ in range(batch)]
        kind = random.choice(["packed", "left", "right", "holes", "full"])
        if kind == "full":
            return full(batch, max(1, lengths[0]))
        if kind == "packed":
            return packed(*lengths)
        return padded(*lengths, length=max(*lengths, 1) + int(random.integers(0, 9)), where=str(kind))

    batch, group, kv_heads = int(random.integers(1, 4)), int(random.integers(1, 4)), int(random.integers(1, 3))
    q_side, kv_side = side(batch), side(batch)
    heads = group * kv_heads
    biases: list[Any] = [
        lambda: None,
        lambda: ALiBi(table(heads)),
        lambda: T5Bias(table(int(random.integers(4, 33)), heads), bool(random.integers(2)), 40),
        lambda: RelativeBias(table(heads, 2 * int(random.integers(0, 90)) + 1)),
        lambda: DenseBias(dense(batch, 1, q_side.layout.length, kv_side.layout.length)),
    ]
    options: dict[str, Any] = {"causal": bool(random.integers(2))}
    if random.integers(2):
        options["window"] = tuple(int(x) if x < 60 else None for x in random.integers(0, 90, 2))
    if random.integers(3) == 0:
        options["softcap"] = float(random.uniform(0.5, 5))
    if random.integers(3) == 0:
        options.update(dropout_p=float(random.uniform(0, 0.9)), seed=int(random.integers(1 << 62)))
    dtype = [torch.float32, torch.float32, torch.float16, torch.bfloat16][random.integers(4)]
    dim, v_dim = (int(x) * 8 for x in random.integers(2, 13, 2))
    return Case(q_side, kv_side, heads, kv_heads, dim, v_dim, dtype, biases[random.integers(5)](), options)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100))
def interpreted_random_matches_float64(seed: int, poisoned: list[int]) -> None:
    compare(random_case(seed))


# Properties ----------------------------------------------------------------------------------------------------------


def interpreted_operator_repeats_bit_for_bit() -> None:
    case = CASES["t5, causal, dropout"]
    first, *others = (results(case, torch.float32, backend=True) for _ in range(3))
    assert all(torch.equal(first[name], again[name]) for again in others for name in first)


def interpreted_operator_packed_equals_padded_with_dropout() -> None:
    sizes_q, sizes_k = (40, 0, 17), (33, 9, 40)
    options = {"causal": True, "dropout_p": 0.5, "seed": 99}
    bias = T5Bias(table(8, 2), True, 20)
    flat = Case(packed(*sizes_q), packed(*sizes_k), bias=bias, options=options)
    reference = results(flat, torch.float32, backend=True)
    truth = results(flat, torch.float64, backend=False)["dbias"]
    q, k, v, grad, grad_lse = (x.float() for x in tensors_of(flat))
    for where in ("left", "holes"):
        case = Case(
            padded(*sizes_q, length=50, where=where), padded(*sizes_k, length=45, where=where), bias=bias,
            options=options,
        )  # fmt: skip

        def spread(x: Tensor, side: Side) -> Tensor:
            wide = x.new_full((int(np.prod(side.shape)), *x.shape[1:]), torch.nan)
            wide[[row for rows in side.rows for row in rows]] = x
            return wide

        inputs = [spread(x, side).requires_grad_() for x, side in zip((q, k, v), _sides(case), strict=True)]
        weight = bias.weight.clone().requires_grad_()
        out, lse = ours(*inputs, case, T5Bias(weight, True, 20))
        found = torch.autograd.grad(
            (out, lse), [*inputs, weight], (spread(grad, case.q_side), spread(grad_lse, case.q_side))
        )
        rows_q, rows_k = ([row for rows in side.rows for row in rows] for side in (case.q_side, case.kv_side))
        assert torch.equal(out[rows_q], reference["out"])
        for name, x, rows in zip(("dq", "dk", "dv"), found, (rows_q, rows_k, rows_k), strict=False):
            assert torch.equal(x[rows], reference[name])
        assert_within(found[3], reference["dbias"], truth)


def interpreted_operator_drops_what_dropout_keep_drops() -> None:
    from urform.modeling.kernels.attention_reference import dropout_keep

    side, seed, dropout_p = full(2, 60), (7 << 33) + 12345, 0.25
    case = Case(side, side, dim=16, v_dim=64, options={"dropout_p": dropout_p, "seed": seed})
    q = torch.zeros(120, 2, 16)
    v = torch.eye(60, 64).repeat(2, 1)[:, None].expand(-1, 2, -1)
    out, _ = ours(q, q, v, case, None)
    kept = out.view(2, 60, 2, 64)[..., :60].permute(0, 2, 1, 3) > 0
    expected = dropout_keep(seed, side.layout, side.layout, 2, dropout_p)
    assert torch.equal(kept, expected)
    assert torch.equal(expected, torch.stack([survivors(seed, b, 2, 60, 60, dropout_p) for b in range(2)]))
    tensor_seed, _ = ours(q, q, v, case, None, seed=torch.tensor(seed))
    assert torch.equal(tensor_seed, out)


def interpreted_operator_takes_any_strides() -> None:
    side = full(2, 20)
    case = Case(side, side, heads=4, kv_heads=2, options={"causal": True})
    q, k, v, grad, _ = (x.float() for x in tensors_of(case))
    expected = ours(q, k, v, case, None)[0]
    fused = torch.cat([q, k, v], 1)
    transposed = k.view(2, 20, 2, 16).transpose(1, 2).contiguous().transpose(1, 2)
    for inputs in (
        tuple(fused.split([4, 2, 2], 1)),
        (q, transposed.flatten(0, 1), v),
        (q.permute(2, 1, 0).contiguous().permute(2, 1, 0), k, v),
    ):
        leaves = [x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in inputs]
        out = ours(*leaves, case, None)[0]
        assert torch.equal(out, expected)
        contiguous = [x.detach().contiguous().requires_grad_() for x in leaves]
        others = torch.autograd.grad(ours(*contiguous, case, None)[0], contiguous, grad)
        found = torch.autograd.grad(out, leaves, grad.transpose(0, 1).contiguous().transpose(0, 1))
        assert all(torch.equal(a, b) for a, b in zip(found, others, strict=True))
    leaf = k.detach()[:, :1].requires_grad_()
    ours(q, leaf.expand(-1, 2, -1), v, case, None)[0].sum().backward()
    assert leaf.grad is not None and leaf.grad.isfinite().all()


def interpreted_operator_memory_grows_with_length_alone(poisoned: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """No buffer of L x S, forward or backward, with a bias whose table is wider than the sequence."""
    length = 192
    zeros, make_zeros = [], torch.zeros

    def recorded_zeros(*args: Any, **kwargs: Any) -> Tensor:
        x = make_zeros(*args, **kwargs)
        zeros.append(x.numel())
        return x

    monkeypatch.setattr(torch, "zeros", recorded_zeros)
    case = Case(packed(length), packed(length), heads=1, kv_heads=1, bias=RelativeBias(table(1, 2 * length - 1)))
    results(case, torch.float32, backend=True)
    assert zeros and max(*poisoned, *zeros) <= 16 * length < length * length


def interpreted_operator_decodes_few_queries() -> None:
    """Without gradients and with few queries, the decode kernel serves; it is held to the same truth."""
    from urform.modeling.kernels.triton import attention_triton

    sides: list[tuple[Side, Side]] = [
        (full(3, 1), padded(70, 9, 90, length=90, where="left")),
        (full(3, 1), padded(70, 0, 90, length=95)),
        (padded(3, 0, 5, length=6), packed(70, 9, 80)),
        (packed(1, 4, 2), packed(70, 9, 80)),
        (full(2, 2), full(2, 64)),
    ]
    for q_side, kv_side in sides:
        for bias in (None, ALiBi(table(4)), T5Bias(table(8, 4), False, 20)):
            case = Case(q_side, kv_side, heads=4, bias=bias, options={"causal": True, "softcap": 3.0})
            q, k, v, *_ = tensors_of(case)
            expected, expected_lse = attend(q, k, v, q_side, kv_side, bias=bias, scale=0.25, **case.options)
            inputs = [x.float() for x in (q, k, v)]
            for x, side in zip(inputs, _sides(case), strict=True):
                x[side.padding] = torch.nan
            assert attention_triton._decodes(*inputs, None, q_side.layout.length)
            out, lse = ours(*inputs, case, bias)
            q, k, v = (x.float() for x in (q, k, v))
            weight = bias and type(bias)(bias.weight.float(), *_bias_arguments(bias))
            torchs, torchs_lse = attend(q, k, v, q_side, kv_side, bias=weight, scale=0.25, **case.options)
            assert (out - expected).abs().max() <= 2 * (torchs - expected).abs().max() + 1e-6
            seen = expected_lse > -torch.inf
            assert torch.equal(lse > -torch.inf, seen)
            assert_within(lse[seen], torchs_lse[seen], expected_lse[seen])


# The operators' contracts --------------------------------------------------------------------------------------------


def _operator_arguments(requires_grad: bool = True) -> tuple[Any, ...]:
    starts = torch.tensor([0, 20])
    q, k, v = (torch.randn(20, heads, 16, requires_grad=requires_grad) for heads in (2, 1, 1))
    slopes = torch.randn(2, requires_grad=requires_grad)
    seed = torch.tensor(3)
    return (
        q, k, v, starts, starts.diff(), starts, starts.diff(), slopes, None, None, seed, 20, 20, True, -1, -1, 1, 0.0,
        0.25, 0.1,
    )  # fmt: skip


def interpreted_operator_passes_opcheck() -> None:
    from urform.modeling.kernels.triton.attention_triton import attention_triton_bwd, attention_triton_fwd

    arguments = _operator_arguments()
    torch.library.opcheck(attention_triton_fwd, arguments)
    plain = _operator_arguments(requires_grad=False)
    out, lse, parts = attention_triton_fwd(*plain)
    torch.library.opcheck(attention_triton_bwd, (torch.randn_like(out), None, out, lse, parts, True, *plain))


@pytest.mark.parametrize("where", ["packed", "holes"])
def interpreted_operator_compiles_into_one_graph(where: str) -> None:
    sides = (packed(20, 17), packed(30, 9)) if where == "packed" else (padded(20, 17, length=25), full(2, 30))
    case = Case(*sides, options={"causal": True, "dropout_p": 0.2, "seed": 5})
    q, k, v, grad, _ = (x.float() for x in tensors_of(case))

    def step(q: Tensor, k: Tensor, v: Tensor, weight: Tensor) -> Tensor:
        return ours(q, k, v, case, T5Bias(weight, True, 20))[0]

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    answers = []
    for function in (step, compiled):
        case.q_side.layout.memo.clear()
        case.kv_side.layout.memo.clear()
        leaves = [x.clone().requires_grad_() for x in (q, k, v, table(8, 2))]
        out = function(*leaves)
        answers.append([out, *torch.autograd.grad(out, leaves, grad)])
    assert all(torch.equal(a, b) for a, b in zip(*answers, strict=True))


def interpreted_operator_exports() -> None:

    class Attention(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
            from urform.modeling.kernels.triton.attention_triton import triton_attention

            settings = AttentionSettings(causal=True, scale=0.25)
            return triton_attention(q, k, v, Layout.padded(mask), Layout.padded(mask), settings)[0]

    q, k, v = (torch.randn(2, 24, 2, 16) for _ in range(3))
    mask = torch.rand(2, 24) < 0.7
    length = torch.export.Dim("length", min=20, max=64)
    shapes = ({1: length},) * 4
    program = torch.export.export(Attention(), (q, k, v, mask), dynamic_shapes=shapes)
    q, k, v = (torch.randn(2, 33, 2, 16) for _ in range(3))
    mask = torch.rand(2, 33) < 0.7
    assert torch.equal(program.module()(q, k, v, mask), Attention()(q, k, v, mask))


def interpreted_operator_goes_through_autocast() -> None:
    case = Case(packed(20), packed(30))
    q, k, v, *_ = (x.float().requires_grad_() for x in tensors_of(case))
    with torch.autocast("cpu", torch.bfloat16):
        out = ours(*(x.bfloat16() for x in (q, k, v)), case, T5Bias(table(8, 2), True, 20))[0]
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert q.grad is not None and q.grad.dtype == torch.float32 and q.grad.isfinite().all()


def interpreted_operator_gives_only_the_gradients_asked_for() -> None:
    case = CASES["relative"]
    q, k, v, grad, _ = (x.float() for x in tensors_of(case))
    everything = results(case, torch.float32, backend=True)
    weight = case.bias.weight.clone().requires_grad_()  # type: ignore[union-attr]
    out, lse = ours(q, k, v, case, RelativeBias(weight))
    (dbias,) = torch.autograd.grad(out, [weight], grad)
    assert dbias.isfinite().all() and dbias.shape == everything["dbias"].shape
    q.requires_grad_()
    out, lse = ours(q, k, v, case, RelativeBias(weight.detach()))
    lse.sum().backward()
    assert q.grad is not None and q.grad.isfinite().all()


def interpreted_operator_passes_its_proof() -> None:
    """`attention(backend="triton")` asks for it here as on a GPU."""
    from urform.modeling.kernels import attention_proof
    from urform.modeling.kernels.attention_dispatch import attention

    x = torch.randn(1, 20, 2, 16)
    out = attention(x, x, x, backend="triton")
    assert attention_proof.OUTCOMES == {("triton", "cpu", None): ""}
    assert isinstance(out, Tensor)
    torch.testing.assert_close(out, attention(x, x, x, backend="reference"))


def interpreted_operator_refuses_by_name() -> None:
    from urform.modeling.kernels.triton.attention_triton import attention_triton_fwd, triton_attention

    q, k, v, *rest = _operator_arguments()
    out, *_ = attention_triton_fwd(q, k, v, *rest)
    (dq,) = torch.autograd.grad(out.square().sum(), [q], create_graph=True)
    with pytest.raises(RuntimeError, match=r"double backward.*backend='reference'"):
        dq.sum().backward()
    with pytest.raises(RuntimeError, match=r"urform::attention_triton_fwd.*vmap"):
        torch.func.vmap(lambda x: attention_triton_fwd(x, k, v, *rest)[0])(torch.randn(2, 20, 2, 16))

    layout = Layout.full(1, 20)
    for x, message in ((torch.randn(1, 20, 2, 264), "head dims up to 256"), (torch.randn(1, 20, 2, 16).double(), "64")):
        with pytest.raises(ValueError, match=message):
            triton_attention(x, x, x, layout, layout, AttentionSettings())
