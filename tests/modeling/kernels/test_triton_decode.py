"""The Triton decode kernel against a naive float64 attention, in Triton's interpreter (on a GPU where there is one).

Tolerance: at most twice the error that the same naive attention makes in the tensors' own dtype.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the Triton kernels need the package triton")

from urform.modeling.kernels.triton.attention_triton_decode import decode_attention

DEVICE = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
KINDS = ("none", "slopes", "lut", "dense")


def bounds(sizes: Sequence[int]) -> Tensor:
    return torch.tensor([0, *sizes]).cumsum(0).to(DEVICE)


def naive(
    q: Tensor, k: Tensor, v: Tensor, q_sizes: Sequence[int], k_sizes: Sequence[int], *, dtype: torch.dtype,
    causal: bool, window: tuple[int | None, int | None] | None, scale: float, softcap: float | None = None,
    slopes: Tensor | None = None, lut: Tensor | None = None, dense: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention of packed sequences, one (sequence, head) at a time."""
    heads, group = q.shape[1], q.shape[1] // k.shape[1]
    out = torch.zeros(q.shape[0], heads, v.shape[-1], dtype=dtype, device=q.device)
    lse = torch.full((heads, q.shape[0]), -torch.inf, dtype=dtype, device=q.device)
    q_at = k_at = 0
    for b, (rows, columns) in enumerate(zip(q_sizes, k_sizes, strict=True)):
        row = torch.arange(rows, device=q.device)[:, None]
        column = torch.arange(columns, device=q.device)[None, :]
        ahead = column - row - (columns - rows if causal else 0)
        seen = torch.ones(rows, columns, dtype=torch.bool, device=q.device)
        if causal:
            seen &= ahead <= 0
        if window is not None and window[0] is not None:
            seen &= ahead >= -window[0]
        if window is not None and window[1] is not None:
            seen &= ahead <= window[1]
        for h in range(heads):
            q_LD, k_SD, v_SD = (
                x.to(dtype) for x in (q[q_at : q_at + rows, h], k[k_at : k_at + columns, h // group],
                                      v[k_at : k_at + columns, h // group])
            )  # fmt: skip
            scores = (q_LD @ k_SD.T) * scale
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            if slopes is not None:
                scores = scores - slopes[h].to(dtype) * ahead.abs()
            if lut is not None:
                reach = lut.shape[1] // 2
                scores = scores + lut[h].to(dtype)[ahead.clamp(-reach, reach) + reach]
            if dense is not None:
                plane = dense[min(b, dense.shape[0] - 1), min(h, dense.shape[1] - 1)].to(dtype)
                scores = scores + plane[: rows if plane.shape[0] > 1 else 1, : columns if plane.shape[1] > 1 else 1]
            scores = scores.masked_fill(~seen, -torch.inf)
            alive = (scores > -torch.inf).any(-1)
            out[q_at : q_at + rows, h][alive] = torch.softmax(scores[alive], -1) @ v_SD
            lse[h, q_at : q_at + rows][alive] = torch.logsumexp(scores[alive], -1)
        q_at, k_at = q_at + rows, k_at + columns
    return out, lse


def make(
    q_sizes: Sequence[int], k_sizes: Sequence[int], heads: int, kv_heads: int, dim: int, v_dim: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    q = torch.randn(sum(q_sizes), heads, dim).to(DEVICE, dtype)
    k = torch.randn(sum(k_sizes), kv_heads, dim).to(DEVICE, dtype)
    v = torch.randn(sum(k_sizes), kv_heads, v_dim).to(DEVICE, dtype)
    return q, k, v


def make_bias(kind: str, heads: int, batch: int, max_q: int, max_k: int, dtype: torch.dtype) -> dict[str, Tensor]:
    if kind == "slopes":
        return {"slopes": torch.rand(heads).to(DEVICE)}
    if kind == "lut":
        return {"lut": torch.randn(heads, 11).to(DEVICE)}
    if kind == "dense":
        dense = torch.randn(random.choice((1, batch)), random.choice((1, heads)), random.choice((1, max_q)), max_k)
        return {"dense": dense.masked_fill(torch.rand_like(dense) < 0.1, -torch.inf).to(DEVICE, dtype)}
    return {}


def compare(ours: tuple[Tensor, Tensor], reference: tuple[Tensor, Tensor], lowprec: tuple[Tensor, Tensor]) -> None:
    """Hold `out` to the tolerance rule, and `lse` to float32's; both exactly empty where the reference is."""
    (out, lse), (out64, lse64), (out_low, lse_low) = ours, reference, lowprec
    assert out.dtype == out_low.dtype and lse.dtype == torch.float32
    finite = lse64 > -torch.inf
    assert torch.equal(lse > -torch.inf, finite)
    assert not out.transpose(0, 1)[~finite].any()
    error, allowed = (out - out64).abs().max(), 2 * (out_low - out64).abs().max() + 1e-6
    assert error <= allowed, f"out: {error} > {allowed}"
    if finite.any():
        error = (lse - lse64)[finite].abs().max()
        allowed = 2 * (lse_low - lse64)[finite].abs().max() + 2e-6
        assert error <= allowed, f"lse: {error} > {allowed}"


def run_and_compare(
    q: Tensor, k: Tensor, v: Tensor, q_sizes: Sequence[int], k_sizes: Sequence[int], splits: int | None, **case: Any
) -> tuple[Tensor, Tensor]:
    max_q, max_k = max(q_sizes), max(k_sizes)
    ours = decode_attention(q, k, v, bounds(q_sizes), bounds(k_sizes), max_q, max_k, splits=splits, **case)
    reference = naive(q, k, v, q_sizes, k_sizes, dtype=torch.float64, **case)
    compare(ours, reference, naive(q, k, v, q_sizes, k_sizes, dtype=q.dtype, **case))
    return ours


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Any:
    """Fill uninitialised memory with NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("dim", "v_dim"), [(16, 16), (40, 24), (64, 128), (200, 200), (256, 256)])
def test_dtypes_and_head_dims(dtype: torch.dtype, dim: int, v_dim: int) -> None:
    q_sizes, k_sizes = [1, 3, 1], [61, 130, 7]
    tensors = make(q_sizes, k_sizes, 4, 2, dim, v_dim, dtype)
    case = {"causal": True, "window": None, "scale": dim**-0.5, "softcap": 20.0, "lut": torch.randn(4, 9).to(DEVICE)}
    run_and_compare(*tensors, q_sizes, k_sizes, 3, **case)


@pytest.mark.parametrize("number", range(16))
def test_random_cases(number: int) -> None:
    """Sizes, groups, masks, biases, splits and empty sequences at random."""
    random.seed(number)
    torch.manual_seed(number)
    batch, kv_heads, group = random.randint(1, 3), random.randint(1, 2), random.choice((1, 2, 3, 5, 8))
    heads = kv_heads * group
    q_sizes = [random.choice((0, 1, 1, 2, 5, 16)) for _ in range(batch)]
    k_sizes = [random.choice((0, 1, 3, 31, 64, 150)) for _ in range(batch)]
    q_sizes[0] = q_sizes[0] or 1
    k_sizes[-1] = k_sizes[-1] or 17
    dim, v_dim = (random.choice((16, 24, 40, 64, 72)) for _ in range(2))
    dtype = random.choice((torch.float32, torch.float16, torch.bfloat16))
    window = random.choice((None, (20, None), (3, 2), (None, 4), (0, 0)))
    case = {
        "causal": random.random() < 0.6,
        "window": window,
        "scale": random.choice((dim**-0.5, 0.5)),
        "softcap": random.choice((None, 5.0, 50.0)),
        **make_bias(random.choice(KINDS), heads, batch, max(q_sizes), max(k_sizes), dtype),
    }
    tensors = make(q_sizes, k_sizes, heads, kv_heads, dim, v_dim, dtype)
    run_and_compare(*tensors, q_sizes, k_sizes, random.choice((None, 1, 2, 5, 9)), **case)


@pytest.mark.parametrize("kind", KINDS)
def test_every_bias_over_splits(kind: str) -> None:
    """The number of splits, more than there are keys included, does not matter."""
    q_sizes, k_sizes = [4, 1], [300, 0]
    tensors = make(q_sizes, k_sizes, 6, 2, 32, 32, torch.float32)
    bias = make_bias(kind, 6, 2, 4, 300, torch.float32)
    for splits in (1, 3, 20):
        run_and_compare(
            *tensors, q_sizes, k_sizes, splits, causal=True, window=(200, None), scale=0.2, softcap=None, **bias
        )


def test_rows_without_keys() -> None:
    """More queries than keys under causality, an empty sequence, and a bias of -inf: exactly 0, and -inf."""
    q_sizes, k_sizes = [5, 2, 3], [2, 0, 40]
    tensors = make(q_sizes, k_sizes, 2, 1, 16, 16, torch.float32)
    dense = torch.zeros(3, 1, 5, 40)
    dense[2, :, 1] = -torch.inf
    out, lse = run_and_compare(
        *tensors, q_sizes, k_sizes, 2, causal=True, window=None, scale=0.25, dense=dense.to(DEVICE)
    )
    empty = [0, 1, 2, 5, 6, 8]
    assert not out[empty].any() and torch.isneginf(lse[:, empty]).all()
    assert torch.isfinite(lse[:, [3, 4, 7, 9]]).all()


@pytest.mark.parametrize("kind", ["none", "dense"])
@pytest.mark.parametrize("holes", [False, True])
def test_cache(kind: str, holes: bool) -> None:
    """A transposed view of a cache, padded on the left or with holes; what is not a key is NaN and never read."""
    batch, heads, kv_heads, columns, dim = 3, 4, 2, 90, 40
    keep = torch.zeros(batch, columns, dtype=torch.bool)
    for b, (start, end) in enumerate(((30, 90), (0, 71), (89, 90))):
        keep[b, start:end] = True
    if holes:
        keep &= torch.rand(batch, columns) < 0.7
        keep[:, -1] = True
    k, v = (torch.randn(batch, kv_heads, columns, dim).transpose(1, 2) for _ in range(2))
    k, v = (x.masked_fill(~keep[:, :, None, None], torch.nan).to(DEVICE) for x in (k, v))
    k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v))
    assert not k.is_contiguous()
    q_sizes, k_sizes = [1, 2, 1], keep.sum(1).tolist()
    q = torch.randn(sum(q_sizes), heads, dim).to(DEVICE)
    dense_k = torch.randn(batch, heads, 2, columns)
    order = (~keep).to(torch.int8).argsort(dim=1, stable=True)
    dense = dense_k.gather(3, order[:, None, None].expand_as(dense_k))  # by rank, as the packed reference wants it
    if holes:
        cu_k, map_k = torch.tensor([[0] * batch, k_sizes]), order.to(DEVICE)
    else:
        cu_k, map_k = torch.tensor([[30, 0, 89], [90, 71, 90]]), None
    case: dict[str, Any] = {"causal": True, "window": (40, None), "scale": 0.3}
    for splits in (1, 4):
        ours = decode_attention(
            q, k, v, bounds(q_sizes), cu_k.to(DEVICE), 2, columns, splits=splits, map_k=map_k,
            dense=dense_k.to(DEVICE) if kind == "dense" else None, **case,
        )  # fmt: skip
        packed = [x[keep.to(DEVICE)] for x in (k, v)]
        if kind == "dense":
            case["dense"] = dense.to(DEVICE)
        reference = naive(q, *packed, q_sizes, k_sizes, dtype=torch.float64, **case)
        compare(ours, reference, naive(q, *packed, q_sizes, k_sizes, dtype=torch.float32, **case))
        case.pop("dense", None)


@pytest.mark.parametrize("splits", [1, 3])
def test_padded_queries(splits: int) -> None:
    """`[2, B]` bounds leave rows of padding between the queries: 0 and -inf there; `map_q` gives rows of the bias."""
    q, k, v = make([6], [50, 9], 2, 2, 16, 16, torch.float32)
    dense = torch.randn(2, 2, 3, 50).to(DEVICE)
    map_q = torch.tensor([0, 2, -1, 1, -1, -1]).to(DEVICE)
    out, lse = decode_attention(
        q, k, v, torch.tensor([[0, 3], [2, 4]]).to(DEVICE), bounds([50, 9]), 2, 50, causal=False, window=None,
        scale=0.25, dense=dense, map_q=map_q, splits=splits,
    )  # fmt: skip
    real, padding = [0, 1, 3], [2, 4, 5]
    assert not out[padding].any() and torch.isneginf(lse[:, padding]).all()
    picked = torch.stack([dense[0, :, [0, 2]], dense[1, :, [1, 1]]])
    case: dict[str, Any] = {"causal": False, "window": None, "scale": 0.25, "dense": picked}
    expected = naive(q[real], k, v, [2, 1], [50, 9], dtype=torch.float64, **case)
    low = naive(q[real], k, v, [2, 1], [50, 9], dtype=torch.float32, **case)
    compare((out[real], lse[:, real]), expected, low)


def test_strided_inputs() -> None:
    """Slices of wider tensors, with strides that are no multiples of 8 and a last dimension that is not dense."""
    q_sizes, k_sizes = [1, 2], [20, 33]
    q, k, v = make(q_sizes, k_sizes, 4, 2, 24, 16, torch.float32)
    odd = torch.zeros(53, 2, 27, device=DEVICE)
    odd[..., 1:25] = k
    case = {"causal": True, "window": None, "scale": 0.2}
    reference = run_and_compare(q, k, v, q_sizes, k_sizes, 2, **case)
    strided = run_and_compare(
        q.repeat_interleave(2, -1)[..., ::2], odd[..., 1:25], v.transpose(0, 1).contiguous().transpose(0, 1),
        q_sizes, k_sizes, 2, **case,
    )  # fmt: skip
    assert torch.equal(strided[0], reference[0]) and torch.equal(strided[1], reference[1])


def test_runs_are_bit_equal() -> None:
    q, k, v = make([1, 2], [200, 77], 4, 1, 32, 32, torch.float16)
    first, *others = [
        decode_attention(q, k, v, bounds([1, 2]), bounds([200, 77]), 2, 200, causal=True, window=None, scale=0.2)
        for _ in range(5)
    ]
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


def call(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor) -> tuple[Tensor, Tensor]:
    return decode_attention(
        q, k, v, cu_q, cu_k, q.shape[0], k.shape[0], causal=True, window=(9, None), scale=0.3, softcap=10.0
    )


def test_operator() -> None:
    """Schema and fake implementation agree with the operator; it compiles in one graph and exports."""
    q, k, v = make([2, 1], [30, 12], 2, 1, 16, 24, torch.float32)
    inputs = (q, k, v, bounds([2, 1]), bounds([30, 12]))
    torch.use_deterministic_algorithms(False)
    torch.library.opcheck(
        torch.ops.urform.attention_triton_decode.default,
        (*inputs, 2, 30, True, None, 0, None, None, None, None, 0.25, None, None, 2),
    )
    expected = call(*inputs)
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    for ours, wanted in zip(compiled(*inputs), expected, strict=True):
        assert torch.equal(ours, wanted)
    longer = make([2, 1], [44, 12], 2, 1, 16, 24, torch.float32)
    longer_inputs = (*longer, bounds([2, 1]), bounds([44, 12]))
    for ours, wanted in zip(compiled(*longer_inputs), call(*longer_inputs), strict=True):
        assert torch.equal(ours, wanted)

    class Module(torch.nn.Module):
        def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
            return call(*inputs)

    exported = torch.export.export(Module(), inputs).module()
    for ours, wanted in zip(exported(*inputs), expected, strict=True):
        assert torch.equal(ours, wanted)


def test_refused_by_name() -> None:
    q, k, v = make([1], [8], 2, 1, 16, 16, torch.float32)
    cu_q, cu_k = bounds([1]), bounds([8])
    out, _lse = call(q.requires_grad_(), k, v, cu_q, cu_k)
    with pytest.raises(NotImplementedError, match="attention_triton_decode has no gradient"):
        out.sum().backward()
    q = q.detach()
    with pytest.raises(RuntimeError, match=r"attention_triton_decode does not go under torch\.func\.vmap"):
        torch.func.vmap(lambda x: call(x, k, v, cu_q, cu_k)[0])(q[None])
    cache = k[None].expand(1, 8, 1, 16)
    lut = torch.zeros(2, 4, device=DEVICE)
    refused: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
        ("float64", (q.double(), k.double(), v.double(), cu_q, cu_k), {}),
        (r"\[N, H, D\]", (q[None], k, v, cu_q, cu_k), {}),
        ("from 1 to 256", (*make([1], [8], 2, 1, 264, 16, torch.float32), cu_q, cu_k), {}),
        ("multiple of the 3", (q, *(x.expand(8, 3, 16) for x in (k, v)), cu_q, cu_k), {}),
        ("cu_k has shape", (q, k, v, cu_q, bounds([4, 4])), {}),
        (r"give \[2, 1\]", (q, cache, cache, cu_q, cu_k), {}),
        ("exclude each other", (q, k, v, cu_q, cu_k), {"slopes": lut[:, 0], "lut": lut[:, :3]}),
        ("slopes have shape", (q, k, v, cu_q, cu_k), {"slopes": lut[0]}),
        ("lut has shape", (q, k, v, cu_q, cu_k), {"lut": lut}),
        ("dense has shape", (q, k, v, cu_q, cu_k), {"dense": lut}),
        ("map_q has shape", (q, k, v, cu_q, cu_k), {"map_q": cu_q}),
        ("map_k has shape", (q, k, v, cu_q, cu_k), {"map_k": cu_q}),
    ]
    for message, inputs, bias in refused:
        with pytest.raises(ValueError, match=message):
            decode_attention(*inputs, 1, 8, causal=False, window=None, scale=1.0, **bias)
