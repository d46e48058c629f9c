"""The triton backend: the host side of the Triton kernels, as `torch.library` operators with gradients.

In the order of the file: launch configurations, launches of the forward and backward kernels, the operators
`urform::attention_triton_fwd` and `urform::attention_triton_bwd`, and the backend function, which brings every layout
and bias into the form that the kernels read. Nothing here waits for the device or depends on values that lie there.

Under `TRITON_INTERPRET=1`, set before the first import, the kernels run on CPU tensors in Triton's interpreter.

Shapes: B sequences, L queries, S keys, N and M rows of query and key tensors (real tokens and padding), H heads,
G key/value heads, D head dim, Dv head dim of v, R reach of a table of biases.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention_biases import ALiBi, Bias, DenseBias, RelativeBias, T5Bias
from ..attention_layouts import Layout
from ..attention_settings import AttentionSettings

try:
    import triton

    from .attention_triton_backward import (
        attention_backward_diagonals,
        attention_backward_dkdv,
        attention_backward_dq,
        attention_delta,
    )
    from .attention_triton_decode import decode_attention
    from .attention_triton_kernels import attention_forward

    INTERPRETED = not isinstance(attention_forward, triton.JITFunction)
except ImportError:
    triton = None
    INTERPRETED = False

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
KINDS = {None: 0, "alibi": 1, "t5": 2, "relative": 2, "dense": 3}  #: NO_BIAS, ALIBI, TABLE, DENSE of the kernels
ALIBI, TABLE, DENSE = 1, 2, 3
DECODE_QUERIES = 16  #: up to so many queries per sequence, and no gradient: the decode kernel, split over keys
DIAGONAL_PROGRAMS = 1024  #: programs wanted for the gradient of a table; the partial sums are that many times a tile

# Launch configurations -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Launch:
    """Rows of queries and of keys in a tile, warps, and stages of the software pipeline."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


#: family -> (pass, bytes of an element) -> head dim up to -> BLOCK_M, BLOCK_N, warps, stages. All are compiled ahead of
#: time by tests/modeling/kernels/test_triton_compile.py, which checks shared memory and tensor cores.
LAUNCHES: dict[str, dict[tuple[str, int], dict[int, tuple[int, int, int, int]]]] = {
    "sm90": {
        ("forward", 2): {64: (128, 64, 4, 3), 128: (128, 64, 8, 3), 256: (128, 64, 8, 2)},
        ("dq", 2): {64: (128, 64, 8, 3), 128: (128, 64, 8, 2), 256: (64, 32, 8, 2)},
        ("dkdv", 2): {64: (64, 128, 8, 2), 128: (32, 128, 8, 2), 256: (32, 64, 8, 2)},
        ("diagonals", 2): {128: (64, 64, 4, 1), 256: (32, 32, 4, 1)},
        ("forward", 4): {64: (64, 32, 8, 2), 128: (64, 16, 8, 2), 256: (32, 16, 8, 1)},
        ("dq", 4): {64: (32, 32, 8, 1), 128: (32, 16, 8, 1), 256: (16, 16, 8, 1)},
        ("dkdv", 4): {64: (32, 32, 8, 1), 128: (16, 32, 8, 1), 256: (16, 16, 8, 1)},
        ("diagonals", 4): {64: (32, 32, 8, 1), 256: (16, 16, 8, 1)},
    },
    "sm80": {
        ("forward", 2): {64: (128, 64, 4, 3), 128: (128, 64, 8, 2), 256: (64, 32, 4, 2)},
        ("dq", 2): {64: (64, 64, 4, 2), 128: (64, 64, 8, 2), 256: (32, 32, 4, 1)},
        ("dkdv", 2): {64: (64, 64, 4, 2), 128: (64, 64, 8, 2), 256: (32, 32, 8, 1)},
        ("diagonals", 2): {64: (64, 64, 4, 1), 256: (32, 32, 4, 1)},
        ("forward", 4): {64: (64, 32, 8, 2), 128: (64, 16, 8, 2), 256: (32, 16, 8, 1)},
        ("dq", 4): {64: (32, 32, 8, 1), 128: (32, 16, 8, 1), 256: (16, 16, 8, 1)},
        ("dkdv", 4): {64: (32, 32, 8, 1), 128: (16, 32, 8, 1), 256: (16, 16, 8, 1)},
        ("diagonals", 4): {64: (32, 32, 8, 1), 256: (16, 16, 8, 1)},
    },
    # 64 KB of shared memory: CDNA 3, and whatever is not known better
    "other": {
        ("forward", 2): {64: (128, 64, 4, 1), 128: (128, 32, 4, 1), 256: (64, 32, 4, 1)},
        ("dq", 2): {64: (64, 64, 4, 1), 128: (64, 32, 4, 1), 256: (32, 32, 4, 1)},
        ("dkdv", 2): {64: (64, 64, 4, 1), 128: (32, 64, 4, 1), 256: (32, 32, 4, 1)},
        ("diagonals", 2): {64: (64, 64, 4, 1), 256: (32, 32, 4, 1)},
        ("forward", 4): {64: (64, 32, 4, 1), 128: (32, 32, 4, 1), 256: (32, 16, 4, 1)},
        ("dq", 4): {64: (32, 32, 4, 1), 128: (32, 32, 4, 1), 256: (16, 16, 4, 1)},
        ("dkdv", 4): {64: (32, 32, 4, 1), 128: (32, 32, 4, 1), 256: (16, 16, 4, 1)},
        ("diagonals", 4): {128: (32, 32, 4, 1), 256: (16, 16, 4, 1)},
    },
    # every operation of a program costs the same there, whatever its size; yet tests want several tiles
    "interpreter": {
        (kernel, size): {256: (32, 32, 1, 1)}
        for kernel in ("forward", "dq", "dkdv", "diagonals")
        for size in (2, 4)
    },
}  # fmt: skip
LAUNCHES["sm100"] = LAUNCHES["sm90"]


def device_family() -> str:
    """Give the row of `LAUNCHES` for the current device (`interpreter` where nothing is compiled)."""
    if INTERPRETED:
        return "interpreter"
    target = triton.runtime.driver.active.get_current_target()
    family = f"sm{target.arch}" if target.backend == "cuda" else str(target.arch)
    return family if family in LAUNCHES else "other"


def launch_configuration(kernel: str, width: int, dtype: torch.dtype, family: str | None = None) -> Launch:
    """Look the launch configuration of a kernel up.

    Args:
        kernel: "forward", "dq", "dkdv" or "diagonals".
        width: the larger head dim, padded to a power of two.
        dtype: of q, k and v.
        family: a key of `LAUNCHES`; None: the current device's.
    """
    by_width = LAUNCHES[family or device_family()][kernel, dtype.itemsize]
    return Launch(*by_width[min(limit for limit in by_width if width <= limit)])


# Launches ------------------------------------------------------------------------------------------------------------


def _power_of_two(size: int) -> int:
    return max(16, 1 << (size - 1).bit_length())


def _for_kernels(x: Tensor) -> Tensor:
    """Make rows dense; the interpreter multiplies bfloat16 wrongly and rounds to it by cutting off: float32 there."""
    x = x if x.stride(-1) == 1 or x.numel() == 0 else x.contiguous()
    return x.float() if INTERPRETED and x.dtype == torch.bfloat16 else x


def _strides(x: Tensor) -> tuple[int, int]:
    """Strides of tokens and heads; 0 where there is one, whose stride PyTorch may make up."""
    tokens, heads = (0 if size == 1 else stride for size, stride in zip(x.shape[:2], x.stride()[:2], strict=True))
    return tokens, heads


class _KernelArguments:
    """What forward and backward share: the operator's arguments, turned into the kernels' arguments."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, starts_q: Tensor, lengths_q: Tensor, starts_k: Tensor,
        lengths_k: Tensor, bias: Tensor | None, map_q: Tensor | None, map_k: Tensor | None, seed: Tensor | None,
        max_q: int, max_k: int, causal: bool, left: int, right: int, kind: int, softcap: float, scale: float,
        dropout_p: float, others: tuple[Tensor, ...] = (),
    ):  # fmt: skip
        self.q, self.k, self.v = q, k, v
        self.max_q, self.max_k = max_q, max_k
        self.tokens, self.heads, self.dim = q.shape
        self.kv_heads, self.v_dim = v.shape[1:]
        self.batch = lengths_q.shape[0]
        self.bias, self.kind = bias, kind
        everything = max_q + max_k  # a wider window is none, and has to fit 32 bits
        self.left, self.right = min(left, everything), 0 if causal else min(right, everything)
        self.width, self.v_width = _power_of_two(self.dim), _power_of_two(self.v_dim)
        self.unit = 1 if any(stride % 8 for x in (q, k, v, *others) for stride in _strides(x)) else 8
        self.reach = bias.shape[1] // 2 if bias is not None and kind == TABLE else 0
        self.family = device_family()
        self.sequences = dict(StartsQ=starts_q, LengthsQ=lengths_q, StartsK=starts_k, LengthsK=lengths_k)
        self.maps = dict(MapQ=map_q, MapK=map_k)
        self.shared = dict(
            Q=q, K=k, V=v, **self.sequences, Bias=bias, Seed=seed if dropout_p > 0 else None,
            **self.strides("qkv", (q, k, v)), tokens_q=self.tokens, left=self.left, right=self.right,
            reach=self.reach, threshold=round(dropout_p * (1 << 24)), scale=scale, softcap=softcap or 1.0,
            keep_scale=1 / (1 - dropout_p), GROUP=self.heads // self.kv_heads, HEAD_DIM=self.dim,
            HEAD_DIM_V=self.v_dim, BLOCK_D=self.width, BLOCK_DV=self.v_width, UNIT=self.unit, CAUSAL=causal,
            HAS_LEFT=self.left >= 0, HAS_RIGHT=self.right >= 0, SOFTCAP=softcap > 0,
        )  # fmt: skip

    def strides(self, names: str, tensors: tuple[Tensor, ...]) -> dict[str, int]:
        """Name the strides of tokens and heads, in units."""
        return {
            f"stride_{name}{axis}": stride // self.unit
            for name, x in zip(names, tensors, strict=True)
            for axis, stride in zip("nh", _strides(x), strict=True)
        }

    def bias_strides(self) -> dict[str, int]:
        """Name the strides of the bias; 0 along what it is broadcast over."""
        strides: tuple[int, ...] = (0, 0, 0, 0)
        if self.bias is not None and self.kind == DENSE:
            strides = tuple(0 if n == 1 else s for n, s in zip(self.bias.shape, self.bias.stride(), strict=True))
        elif self.bias is not None:
            strides = (0, self.bias.stride(0), 0, 0)
        names = ("batch", "head", "row", "column")
        return {f"stride_bias_{name}": stride for name, stride in zip(names, strides, strict=True)}

    def launch(self, name: str, length: int, programs: int, arguments: dict[str, Any]) -> None:
        """Launch one of the tiled kernels over `length` rows of `programs` sequences and heads."""
        launch = launch_configuration(name, max(self.width, self.v_width), self.q.dtype, self.family)
        tiles = -(-length // (launch.block_n if name == "dkdv" else launch.block_m))
        if tiles * programs == 0:
            return
        kernel = {
            "forward": attention_forward,
            "dq": attention_backward_dq,
            "dkdv": attention_backward_dkdv,
        }[name]
        with self.on_device():
            kernel[(tiles * programs,)](
                **self.shared, **self.maps, **self.bias_strides(), **arguments, tiles=tiles, BIAS=self.kind,
                BLOCK_M=launch.block_m, BLOCK_N=launch.block_n, num_warps=launch.num_warps,
                num_stages=launch.num_stages,
            )  # fmt: skip

    def on_device(self) -> contextlib.AbstractContextManager[Any]:
        """Make the tensors' device current, where Triton launches."""
        if self.q.device.type == "cpu":
            return contextlib.nullcontext()
        return torch.get_device_module(self.q.device).device(self.q.device)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, starts_q: Tensor, lengths_q: Tensor, starts_k: Tensor, lengths_k: Tensor,
    bias: Tensor | None, map_q: Tensor | None, map_k: Tensor | None, seed: Tensor | None, max_q: int, max_k: int,
    causal: bool, left: int, right: int, kind: int, softcap: float, scale: float, dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dtype = q.dtype
    q, k, v = (_for_kernels(x) for x in (q, k, v))
    out = q.new_empty(q.shape[0], q.shape[1], v.shape[2])
    lse = q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)
    parts = lse.new_empty(_parts_shape(q))
    args = _KernelArguments(
        q, k, v, starts_q, lengths_q, starts_k, lengths_k, bias, map_q, map_k, seed, max_q, max_k, causal, left, right,
        kind, softcap, scale, dropout_p, (out,),
    )  # fmt: skip
    if out.numel():
        arguments = dict(
            Out=out, Lse=lse, Top=_part(parts, 0), Total=_part(parts, 1), heads=args.heads, **args.strides("o", (out,))
        )
        args.launch("forward", max_q, args.heads * args.batch, arguments)
    return out.to(dtype), lse, parts


def _backward(
    grad: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, parts: Tensor, bias_grad: bool,
    q: Tensor, k: Tensor, v: Tensor, starts_q: Tensor, lengths_q: Tensor, starts_k: Tensor, lengths_k: Tensor,
    bias: Tensor | None, map_q: Tensor | None, map_k: Tensor | None, seed: Tensor | None, max_q: int, max_k: int,
    causal: bool, left: int, right: int, kind: int, softcap: float, scale: float, dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dtype = q.dtype
    q, k, v, grad, out = (_for_kernels(x) for x in (q, k, v, grad, out))
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    args = _KernelArguments(
        q, k, v, starts_q, lengths_q, starts_k, lengths_k, bias, map_q, map_k, seed, max_q, max_k, causal, left, right,
        kind, softcap, scale, dropout_p, (grad, out, dq),
    )  # fmt: skip
    delta = torch.empty_like(lse)
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    if out.numel():
        _launch_delta(args, out, grad, grad_lse, lse, delta)
    top = lse if parts.numel() == 0 else parts[0]
    common = dict(Grad=grad, Top=top, Total=_part(parts, 1), Delta=delta, **args.strides("g", (grad,)))
    sums, ds = _bias_buffers(args, bias_grad)
    if dq.numel():
        shape = (0, 0) if ds is None else (ds.shape[2], ds.shape[3])
        arguments = dict(
            common, GradLse=grad_lse, dQ=dq, Ds=ds, Sums=sums, ds_rows=shape[0], ds_columns=shape[1],
            heads=args.heads, batch=args.batch, BIAS_GRAD=bias_grad, **args.strides("o", (dq,)),
        )  # fmt: skip
        args.launch("dq", max_q, args.heads * args.batch, arguments)
    if k.numel():
        args.launch("dkdv", max_k, args.kv_heads * args.batch, dict(common, dK=dk, dV=dv, heads=args.kv_heads))
    return dq.to(dtype), dk.to(dtype), dv.to(dtype), _bias_gradient(args, common, sums, ds)


def _bias_gradient(args: _KernelArguments, common: dict[str, Any], sums: Tensor | None, ds: Tensor | None) -> Tensor:
    """Return the gradient of the bias from what the dq kernel has summed; empty where nobody asks for it."""
    bias = args.bias
    if bias is not None and ds is not None:
        return ds.sum_to_size(bias.shape).to(bias.dtype)
    if bias is None or sums is None:
        return args.q.new_empty(0)
    if args.kind == ALIBI:
        return sums[0].sum((1, 2)).to(bias.dtype)
    dtable = sums.new_zeros(bias.shape)
    dtable[:, 0] += sums[0].sum((1, 2))
    dtable[:, -1] += sums[1].sum((1, 2))
    _add_diagonals(args, common, dtable)
    return dtable.to(bias.dtype)


def _parts_shape(q: Tensor) -> tuple[int, ...]:
    """Shape of the log-sum-exp's parts, which float32 keeps for the backward pass (its logarithm rounds too much)."""
    kept = q.dtype == torch.float32 or (INTERPRETED and q.dtype == torch.bfloat16)
    return (2, q.shape[1], q.shape[0]) if kept else (2, 0, 0)


def _part(parts: Tensor, index: int) -> Tensor | None:
    return parts[index] if parts.numel() else None


def _launch_delta(
    args: _KernelArguments, out: Tensor, grad: Tensor, grad_lse: Tensor | None, lse: Tensor, delta: Tensor
) -> None:
    rows = 32
    tiles = -(-args.tokens // rows)
    with args.on_device():
        attention_delta[(tiles * args.heads,)](
            out, grad, grad_lse, lse, delta,
            **args.strides("og", (out, grad)), tokens_q=args.tokens, tiles=tiles, HEAD_DIM_V=args.v_dim,
            BLOCK_DV=args.v_width, BLOCK_M=rows, UNIT=args.unit, num_warps=4,
        )  # fmt: skip


def _bias_buffers(args: _KernelArguments, bias_grad: bool) -> tuple[Tensor | None, Tensor | None]:
    """Give the zeroed buffers for the bias's gradient: sums of tiles for slopes and tables, dS for a dense tensor."""
    if not bias_grad:
        return None, None
    zeros: dict[str, Any] = dict(dtype=torch.float32, device=args.q.device)
    if args.kind == DENSE:
        return None, torch.zeros(args.batch, args.heads, args.max_q, args.max_k, **zeros)
    rows = launch_configuration("dq", max(args.width, args.v_width), args.q.dtype, args.family).block_m
    return torch.zeros(2, args.heads, args.batch, -(-args.max_q // rows), **zeros), None


def _add_diagonals(args: _KernelArguments, common: dict[str, Any], dtable: Tensor) -> None:
    """Add the gradient of a table `[H, 2R + 1]` between its clipped ends."""
    ends = max(args.max_q, args.max_k) - 1
    low = max(-args.reach + 1, -ends, *([-args.left] if args.left >= 0 else []))
    high = min(args.reach - 1, ends, *([args.right] if args.right >= 0 else []))
    diagonals = high - low + 1
    launch = launch_configuration("diagonals", max(args.width, args.v_width), args.q.dtype, args.family)
    tiles = -(-args.max_q // launch.block_m)
    if diagonals <= 0 or tiles * args.batch * args.heads == 0 or args.k.numel() == 0:
        return
    programs = -(-diagonals // launch.block_m) * args.heads
    splits = max(1, min(tiles * args.batch, DIAGONAL_PROGRAMS // programs))
    sums = torch.empty(splits, args.heads, diagonals, dtype=torch.float32, device=args.q.device)
    with args.on_device():
        attention_backward_diagonals[(programs * splits,)](
            **args.shared, **common, Sums=sums, tiles=tiles, heads=args.heads, batch=args.batch, low_diagonal=low,
            diagonals=diagonals, splits=splits, BLOCK=launch.block_m, num_warps=launch.num_warps,
            num_stages=launch.num_stages,
        )  # fmt: skip
    dtable[:, low + args.reach : high + args.reach + 1] += sums.sum(0)


# Operators -----------------------------------------------------------------------------------------------------------


@torch.library.custom_op("urform::attention_triton_fwd", mutates_args=())
def attention_triton_fwd(
    q: Tensor, k: Tensor, v: Tensor, starts_q: Tensor, lengths_q: Tensor, starts_k: Tensor, lengths_k: Tensor,
    bias: Tensor | None, map_q: Tensor | None, map_k: Tensor | None, seed: Tensor | None, max_q: int, max_k: int,
    causal: bool, left: int, right: int, kind: int, softcap: float, scale: float, dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Compute attention of sequences that own consecutive rows of q, k and v.

    Args:
        q: `[N, H, D]`; k: `[M, G, D]`; v: `[M, G, Dv]`.
        starts_q: integer `[B + 1]`: sequence b owns rows `starts[b]` to `starts[b + 1]`; starts_k: likewise.
        lengths_q: integer `[B]`, real tokens, the first of the sequence's rows; lengths_k: likewise.
        bias: slopes `[H]`, a table by clipped distance `[H, 2R + 1]`, or a dense `[B | 1, H | 1, L | 1, S | 1]`.
        map_q: integer `[N]`, row of a dense bias that a query token has (None: its rank); map_k: column, `[M]`.
        seed: int64 scalar on the device, for dropout.
        max_q: upper bound on the rows that a sequence owns; max_k: likewise.
        left: keys before the position that are visible, -1 all of them; right: keys behind it.
        kind: of the bias, 0 none, 1 slopes, 2 table, 3 dense.
        softcap: 0 for none.

    Returns:
        out `[N, H, Dv]` and lse float32 `[H, N]`, zeros and -inf in padding and in rows without keys; then what the
        backward pass wants besides.
    """
    return _forward(
        q, k, v, starts_q, lengths_q, starts_k, lengths_k, bias, map_q, map_k, seed, max_q, max_k, causal, left, right,
        kind, softcap, scale, dropout_p,
    )  # fmt: skip


@torch.library.custom_op("urform::attention_triton_bwd", mutates_args=())
def attention_triton_bwd(
    grad: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, parts: Tensor, bias_grad: bool,
    q: Tensor, k: Tensor, v: Tensor, starts_q: Tensor, lengths_q: Tensor, starts_k: Tensor, lengths_k: Tensor,
    bias: Tensor | None, map_q: Tensor | None, map_k: Tensor | None, seed: Tensor | None, max_q: int, max_k: int,
    causal: bool, left: int, right: int, kind: int, softcap: float, scale: float, dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Give the gradients of `attention_triton_fwd` in q, k, v and the bias (empty unless `bias_grad`)."""
    return _backward(
        grad, grad_lse, out, lse, parts, bias_grad, q, k, v, starts_q, lengths_q, starts_k, lengths_k, bias, map_q,
        map_k, seed, max_q, max_k, causal, left, right, kind, softcap, scale, dropout_p,
    )  # fmt: skip


@attention_triton_fwd.register_fake
def _forward_fake(q: Tensor, k: Tensor, v: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    out = q.new_empty(q.shape[0], q.shape[1], v.shape[2])
    lse = q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)
    return out, lse, lse.new_empty(_parts_shape(q))


@attention_triton_bwd.register_fake
def _backward_fake(
    grad: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, parts: Tensor, bias_grad: bool,
    q: Tensor, k: Tensor, v: Tensor, starts_q: Tensor, lengths_q: Tensor, starts_k: Tensor, lengths_k: Tensor,
    bias: Tensor | None, *_: object,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dbias = q.new_empty(0) if bias is None or not bias_grad else bias.new_empty(bias.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dbias


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:11], *output)
    ctx.numbers = inputs[11:]


def _differentiate(
    ctx: Any, grad: Tensor | None, grad_lse: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    *tensors, out, lse, parts = ctx.saved_tensors
    bias_grad = ctx.needs_input_grad[7]
    grad = torch.zeros_like(out) if grad is None else grad
    dq, dk, dv, dbias = attention_triton_bwd(grad, grad_lse, out, lse, parts, bias_grad, *tensors, *ctx.numbers)
    return dq, dk, dv, *(None,) * 4, dbias if bias_grad else None, *(None,) * 12


def _refuse_double_backward(ctx: Any, *grads: Tensor | None) -> None:
    raise RuntimeError(
        "urform::attention_triton_bwd has no gradient of its own (double backward); use backend='reference' for "
        "second derivatives"
    )


def _refuse_vmap(*_: object, **__: object) -> None:
    raise RuntimeError(
        "urform::attention_triton_fwd and urform::attention_triton_bwd do not go under torch.func.vmap; their first "
        "dimension already is a batch: fold yours into it, or use backend='reference'"
    )


attention_triton_fwd.register_autograd(_differentiate, setup_context=_remember)
attention_triton_bwd.register_autograd(_refuse_double_backward)
attention_triton_fwd.register_vmap(_refuse_vmap)
attention_triton_bwd.register_vmap(_refuse_vmap)


# The backend ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Rows:
    """Where the kernels find the sequences of a layout.

    Attributes:
        starts: int64 `[B + 1]`, first row of each sequence, and the number of rows.
        lengths: int64 `[B]`, real tokens, which come first among a sequence's rows.
        order: int64 `[B * L]`, the padded tensor's row for each of the kernels' rows; None where they are the same.
        inverse: int64 `[B * L]`, the other way round.
        columns: int64 `[B * L]`, `order` inside the sequence.
    """

    starts: Tensor
    lengths: Tensor
    order: Tensor | None = None
    inverse: Tensor | None = None
    columns: Tensor | None = None

    def bounds(self) -> Tensor:
        """First real row of each sequence and the one after its last, `[2, B]`."""
        return torch.stack([self.starts[:-1], self.starts[:-1] + self.lengths])


def _rows_of(layout: Layout) -> _Rows:
    """Derive the kernels' rows from a layout: real tokens are moved before the padding, by shapes known beforehand."""
    if "triton" in layout.memo:
        return layout.memo["triton"]
    device = layout.lengths.device
    if layout.cu_seqlens is not None:
        rows = _Rows(layout.cu_seqlens, layout.lengths)
    else:
        starts = torch.arange(layout.batch + 1, device=device) * layout.length
        rows = _Rows(starts, layout.lengths)
        if layout.mask is not None and layout.known_sizes is None:
            columns_BL = (~layout.mask).to(torch.int8).argsort(dim=-1, stable=True)
            order = (columns_BL + starts[:-1, None]).flatten()
            inverse = torch.empty_like(order).scatter_(0, order, torch.arange(order.shape[0], device=device))
            rows = _Rows(starts, layout.lengths, order, inverse, columns_BL.flatten())
    if not torch.compiler.is_compiling():
        layout.memo["triton"] = rows
    return rows


def _gather(x: Tensor, rows: _Rows) -> Tensor:
    """Turn a padded or packed tensor into the kernels' rows."""
    x = x.flatten(0, 1) if x.dim() == 4 else x
    return x if rows.order is None else x.index_select(0, rows.order)


def _bias_tensor(bias: Bias | None, q_layout: Layout, kv_layout: Layout) -> Tensor | None:
    """Give what the kernels read for a bias, differentiably."""
    if bias is None:
        return None
    if isinstance(bias, T5Bias):
        reach = bias.max_distance
        distances = torch.arange(-reach, reach + 1, device=bias.table.device)
        return F.embedding(bias.bucket(distances), bias.table.float()).t().contiguous()
    if isinstance(bias, (ALiBi, RelativeBias)):
        return bias.weight.contiguous()
    if isinstance(bias, DenseBias):
        return bias.narrow(None, q_layout.length, kv_layout.length).tensor
    raise ValueError(f"backend='triton' does not serve a {type(bias).__name__}; use backend='reference'")


def triton_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_layout: Layout,
    kv_layout: Layout,
    settings: AttentionSettings,
) -> tuple[Tensor, Tensor | None]:
    """Compute attention by Triton kernels, in O(L) memory (FlashAttention-2, Dao 2023).

    Raises:
        ValueError: Triton is missing, or the tensors' device, dtype or head dims are not served.
    """
    _check_served(q, v)
    weight = _bias_tensor(settings.bias, q_layout, kv_layout)
    q_rows, kv_rows = _rows_of(q_layout), _rows_of(kv_layout)
    if settings.dropout_p == 0 and _decodes(q, k, v, weight, q_layout.length):
        out, lse = _decode(q, k, v, q_layout, kv_layout, weight, settings)
    else:
        kind = KINDS[None if settings.bias is None else settings.bias.kind]
        left, right = (-1 if side is None else side for side in settings.window or (None, None))
        map_q, map_k = (rows.columns if kind == DENSE else None for rows in (q_rows, kv_rows))
        seed = None if settings.dropout_p == 0 else _seed_tensor(settings.seed, q.device)
        out, lse, _ = attention_triton_fwd(
            _gather(q, q_rows), _gather(k, kv_rows), _gather(v, kv_rows), q_rows.starts, q_rows.lengths,
            kv_rows.starts, kv_rows.lengths, weight, map_q, map_k, seed, q_layout.length, kv_layout.length,
            settings.causal, left, right, kind, settings.softcap or 0.0, settings.scale, settings.dropout_p,
        )  # fmt: skip
    if q_rows.inverse is not None:
        out, lse = out.index_select(0, q_rows.inverse), lse.index_select(1, q_rows.inverse)
    if not q_layout.is_packed:
        out = out.unflatten(0, (q_layout.batch, q_layout.length))
        lse = lse.unflatten(1, (q_layout.batch, q_layout.length)).transpose(0, 1)
    return out, lse if settings.return_lse else None


def _decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_layout: Layout,
    kv_layout: Layout,
    weight: Tensor | None,
    settings: AttentionSettings,
) -> tuple[Tensor, Tensor]:
    """Call the decode kernel, which reads padded keys where they are; out and lse come in the kernels' rows."""
    q_rows, kv_rows = _rows_of(q_layout), _rows_of(kv_layout)
    kind = KINDS[None if settings.bias is None else settings.bias.kind]
    columns = kv_rows.columns
    return decode_attention(
        _gather(q, q_rows), k, v, q_rows.starts if q_layout.mask is None else q_rows.bounds(),
        kv_rows.starts if kv_layout.is_packed else F.pad(kv_rows.lengths[None], (0, 0, 1, 0)),
        q_layout.length, kv_layout.length, causal=settings.causal, window=settings.window,
        slopes=weight if kind == ALIBI else None, lut=weight if kind == TABLE else None,
        dense=weight if kind == DENSE else None, softcap=settings.softcap, scale=settings.scale,
        map_q=q_rows.columns if kind == DENSE else None,
        map_k=None if columns is None else columns.view(kv_layout.batch, kv_layout.length),
    )  # fmt: skip


def _decodes(q: Tensor, k: Tensor, v: Tensor, weight: Tensor | None, queries: int) -> bool:
    """Whether the decode kernel is to do it: few queries, no gradient."""
    grad = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, weight))
    return not grad and queries <= DECODE_QUERIES


def _seed_tensor(seed: int | Tensor | None, device: torch.device) -> Tensor:
    if isinstance(seed, Tensor):
        return seed.to(device, torch.int64)
    return torch.full((), seed or 0, dtype=torch.int64, device=device)


def _check_served(q: Tensor, v: Tensor) -> None:
    if triton is None:
        raise ValueError("backend='triton' needs the package triton (3.6 or newer); install urform[triton]")
    if q.device.type == "cpu" and not INTERPRETED:
        raise ValueError(
            "backend='triton' needs tensors on a GPU, got cpu; move them, use another backend, or set "
            "TRITON_INTERPRET=1 before the first import to run its interpreter"
        )
    if q.dtype not in DTYPES:
        raise ValueError(f"backend='triton' serves float16, bfloat16 and float32, got {q.dtype}; use 'reference'")
    for name, dim in (("q and k", q.shape[-1]), ("v", v.shape[-1])):
        if not 1 <= dim <= 256:
            raise ValueError(f"backend='triton' serves head dims up to 256, got {dim} of {name}; use 'reference'")
