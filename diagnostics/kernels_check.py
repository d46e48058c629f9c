"""`urform doctor kernels`: every attention backend and the fused loss on this machine, against float64.

Each case runs forward and backward in each dtype through `attention(backend=...)`. The truth is the reference backend
in float64 on the same rounded inputs; the yardstick is the definition computed by plain PyTorch in the case's own
dtype. Error and yardstick are largest absolute differences, and the rule is flash-attention's:

    error <= 2 * yardstick + atol,    atol = 16 eps(float32) * largest |truth|

for the output, lse, and the gradients of q, k, v and of the bias (of hidden, weight and bias for the fused loss). The
16 eps, in every dtype, are for PyTorch's own CPU kernel, whose exponential is off by up to 20 units in the last place.
A backend that gives other than 0 at padding or in rows without keys, or NaN or infinity anywhere, fails in any case.

Shapes: B batch, L queries, S keys, N packed tokens, H heads, G key/value heads, D head dim, E hidden, V vocabulary.
"""

from __future__ import annotations

import platform
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..modeling.kernels.attention_biases import ALiBi, Bias, DenseBias, RelativeBias, T5Bias
from ..modeling.kernels.attention_dispatch import FEATURES, attention, attention_backends
from ..modeling.kernels.attention_layouts import Layout, query_positions, visible
from ..modeling.kernels.attention_reference import dropout_keep, reference_attention
from ..modeling.kernels.loss_linear_cross_entropy import linear_cross_entropy
from .reports import jsonable, table

DTYPES: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
LOSS = "linear_cross_entropy"  #: the fused loss, which stands in the report as one more backend
OK, FAIL, NOT_SERVED, UNAVAILABLE = "ok", "FAIL", "not served", "unavailable"


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
    KernelCase("everything", layout="packed", heads=(4, 2), causal=True, window=(20, None), bias="alibi",
               softcap=3.0, dropout_p=0.1, return_lse=True),
)  # fmt: skip

LOSS_CASES: dict[str, dict[str, Any]] = {
    "loss, ignored labels": {},
    "loss, smoothing, z-loss": {"label_smoothing": 0.1, "z_loss": 1e-2},
    "loss, softcap, scale, num_items": {"softcap": 3.0, "logit_scale": 0.5, "num_items": 77},
}  #: options of `linear_cross_entropy`

_SEED = 2**40 + 3


@dataclass(frozen=True)
class KernelResult:
    """One backend, case and dtype.

    Attributes:
        status: "ok", "FAIL", "not served" or "unavailable".
        ratio: largest error over its tolerance, among output, lse and gradients; above 1 fails. None where not run.
        worst: the tensor of that ratio: "out", "lse", "dq", "dk", "dv", "dbias"; "loss", "dhidden", "dweight".
        error: that tensor's largest absolute error.
        tolerance: what the rule allows there.
        reason: why it failed or did not run.
        milliseconds: the case's forward and backward, once, after a first run.
    """

    backend: str
    case: str
    dtype: str
    status: str
    ratio: float | None = None
    worst: str = ""
    error: float | None = None
    tolerance: float | None = None
    reason: str = ""
    milliseconds: float | None = None


@dataclass(frozen=True)
class KernelTiming:
    """Forward and backward of packed causal attention, 8 heads of 64: best of a few, in milliseconds."""

    backend: str
    dtype: str
    problem: str
    milliseconds: float


@dataclass(frozen=True)
class KernelReport:
    """What `check_kernels` found."""

    device: str
    environment: dict[str, str]
    results: tuple[KernelResult, ...]
    timings: tuple[KernelTiming, ...]

    @property
    def failures(self) -> tuple[KernelResult, ...]:
        """The results that are wrong."""
        return tuple(result for result in self.results if result.status == FAIL)

    @property
    def ok(self) -> bool:
        """Whether nothing failed; what is not served or unavailable does not count."""
        return not self.failures

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return jsonable({"ok": self.ok, **asdict(self)})

    def to_text(self) -> str:
        """Give the table: a row per case, a column per backend, in each cell the ratios by dtype."""
        backends = list(dict.fromkeys(result.backend for result in self.results))
        dtypes = list(dict.fromkeys(result.dtype for result in self.results))
        lines = [f"{name}: {value}" for name, value in self.environment.items()]
        gone = [r for r in self.results if r.status == UNAVAILABLE]
        lines += [f"{name}: unavailable: {reason}" for name, reason in
                  dict.fromkeys((r.backend, r.reason) for r in gone)]  # fmt: skip
        shown = [name for name in backends if name not in {r.backend for r in gone} and name != LOSS]
        if shown:
            lines += ["", f"Largest error / tolerance, {', '.join(dtypes)} (above 1 is FAIL, - is not served):"]
            lines += self._table(shown, dtypes)
        lines += ["", *self._table([LOSS], dtypes)] if LOSS in backends else []
        refusals = dict.fromkeys((r.backend, r.reason) for r in self.results if r.status == NOT_SERVED)
        lines += [f"- {name}: {reason}" for name, reason in refusals]
        if self.timings:
            lines += ["", f"Forward and backward of {self.timings[0].problem}, ms:"]
            lines += [f"  {t.backend:12} {t.dtype:9} {t.milliseconds:9.1f}" for t in self.timings]
        lines += [""] if self.failures else []
        lines += [f"FAIL {r.backend} / {r.case} / {r.dtype}: {r.reason}" for r in self.failures]
        count = {s: sum(r.status == s for r in self.results) for s in (OK, FAIL, NOT_SERVED, UNAVAILABLE)}
        return "\n".join([*lines, "", ", ".join(f"{n} {status}" for status, n in count.items() if n)])

    def _table(self, backends: list[str], dtypes: list[str]) -> list[str]:
        found = {(r.backend, r.case, r.dtype): r for r in self.results}
        cases = list(dict.fromkeys(r.case for r in self.results if r.backend in backends))
        rows = [["", *backends]]
        for case in cases:
            cells = []
            for backend in backends:
                results = [found.get((backend, case, dtype)) for dtype in dtypes]
                cells.append(" ".join(_cell(result) for result in results))
            rows.append([case, *cells])
        return table(rows)


def _cell(result: KernelResult | None) -> str:
    if result is None or result.status in (NOT_SERVED, UNAVAILABLE):
        return "-".rjust(4)
    return "FAIL" if result.status == FAIL else f"{result.ratio:.2f}"


def check_kernels(
    device: str | torch.device | None = None,
    dtypes: Sequence[torch.dtype] = DTYPES,
    cases: Sequence[KernelCase] = CASES,
    *,
    backends: Sequence[str] | None = None,
    timing: bool = True,
) -> KernelReport:
    """Test the backends of `attention_backends()`, and the fused loss, on this machine.

    Args:
        device: "cpu", "cuda", …; None: the accelerator if there is one, else the CPU.
        dtypes: floating dtypes to run in.
        cases: attention problems; the default covers every feature of the capability table.
        backends: names from the table, and "linear_cross_entropy" for the fused loss; None: all.
        timing: also time a larger problem on each backend.

    Raises:
        ValueError: the device does not exist here, a backend is not known, `dtypes` or `cases` is empty, or a dtype is
            not floating point.
    """
    device = _find_device(device)
    if not dtypes or not cases:
        raise ValueError(f"dtypes={tuple(dtypes)!r} and cases ({len(cases)} given) must each hold at least one")
    for dtype in dtypes:
        if not dtype.is_floating_point:
            raise ValueError(f"dtypes holds {dtype}; give floating dtypes such as {DTYPES}")
    known = [*attention_backends(), LOSS]
    for name in backends or ():
        if name not in known:
            raise ValueError(f"backends holds {name!r}, which is not known; use some of {known}")
    backends = known if backends is None else backends
    results: list[KernelResult] = []
    timings: list[KernelTiming] = []
    with warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("ignore")
        for backend, served in attention_backends().items():
            if backend not in backends:
                continue
            missing = _unavailable(backend, device)
            if missing:
                results += [
                    KernelResult(backend, case.name, _name(dtype), UNAVAILABLE, reason=missing)
                    for case, dtype in product(cases, dtypes)
                ]
                continue
            for dtype in dtypes:
                found = [_check(backend, served, case, dtype, device) for case in cases]
                results += found
                slow = any((result.milliseconds or 0) > 1000 for result in found)  # Triton's interpreter
                timed = _time(backend, dtype, device) if timing and not slow else None
                timings += [] if timed is None else [timed]
        if LOSS in backends:
            results += [_check_loss(name, dtype, device) for name, dtype in product(LOSS_CASES, dtypes)]
    return KernelReport(str(device), _environment(device), tuple(results), tuple(timings))


def _find_device(device: str | torch.device | None) -> torch.device:
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if device is None:
        return accelerator or torch.device("cpu")
    try:
        wanted = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device={device!r} is no device of torch; use 'cpu' or 'cuda'") from error
    if wanted.type != "cpu" and (accelerator is None or accelerator.type != wanted.type):
        raise ValueError(f"device={str(device)!r} is not on this machine; use 'cpu'" +
                         (f" or {accelerator.type!r}" if accelerator else ""))  # fmt: skip
    return wanted


def _environment(device: torch.device) -> dict[str, str]:
    """Versions and what the machine can do."""

    def version(package: str) -> str:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return "not installed"

    found = {
        "device": f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device),
        "versions": ", ".join(f"{name} {version(name)}" for name in ("urform", "torch", "transformers", "triton")),
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "cpu": f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads",
    }
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        found["gpu"] = f"compute capability {major}.{minor}, CUDA {torch.version.cuda or torch.version.hip}"
    return found


# ---------------------------------------------------------------------------------------------------- one problem


@dataclass
class _Problem:
    """The tensors of a case: leaves in float64 holding values that the dtype can hold exactly."""

    case: KernelCase
    dtype: torch.dtype
    device: torch.device

    def __post_init__(self) -> None:
        case, generator = self.case, torch.Generator().manual_seed(len(self.case.name))

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
        if weight is None or self.case.bias is None:
            return None
        if self.case.bias == "t5":
            return T5Bias(weight, bidirectional=not self.case.causal, max_distance=32)
        return {"alibi": ALiBi, "relative": RelativeBias, "dense": DenseBias}[self.case.bias](weight)

    def solve(self, f: Callable[..., Any], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Run forward and backward by `f(problem, q, k, v, bias)`, which gives out and lse; name every result."""
        leaves = {name: x.detach().clone() if dtype is None else x.detach().to(dtype, copy=True)
                  for name, x in self.leaves.items()}  # fmt: skip
        for x in leaves.values():
            x.requires_grad_()
        out, lse = f(self, leaves["q"], leaves["k"], leaves["v"], self.bias(leaves.get("bias")))
        probe = torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
        grads = torch.autograd.grad(out, list(leaves.values()), probe.to(out.device, self.dtype).to(out.dtype))
        results = {"out": out.detach(), **{f"d{name}": g for name, g in zip(leaves, grads, strict=True)}}
        return results if lse is None else {**results, "lse": lse.detach()}

    def options(self) -> dict[str, Any]:
        case = self.case
        return {
            "causal": case.causal,
            "window": case.window,
            "softcap": case.softcap,
            "dropout_p": case.dropout_p,
            "seed": _SEED if case.dropout_p > 0 else None,
            "return_lse": case.return_lse,
        }


def _truth(problem: _Problem, q: Tensor, k: Tensor, v: Tensor, bias: Bias | None) -> tuple[Tensor, Tensor | None]:
    return reference_attention(
        q, k, v, problem.q_layout, problem.kv_layout, bias=bias, scale=q.shape[-1] ** -0.5, **problem.options()
    )


def _plain(problem: _Problem, q: Tensor, k: Tensor, v: Tensor, bias: Bias | None) -> tuple[Tensor, Tensor | None]:
    """Compute the definition in q's own dtype, step by step: the precision that a user of plain PyTorch has."""
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


# -------------------------------------------------------------------------------------------------------- checking


def _unavailable(backend: str, device: torch.device) -> str:
    """Say why a backend cannot run here at all; "" if it can. It is asked for the simplest thing there is."""
    x = torch.ones(1, 16, 1, 32, device=device)
    try:
        attention(x, x, x, backend=backend)
    except (ImportError, ValueError) as error:  # refusals; anything else is a failure and shows in the cases
        return _first_line(error)
    except Exception:
        return ""
    return ""


def _check(backend: str, served: dict[str, bool], case: KernelCase, dtype: torch.dtype,
           device: torch.device) -> KernelResult:  # fmt: skip
    missing = [text for feature, text in FEATURES.items() if feature in case.needs and not served[feature]]
    if missing:
        return KernelResult(backend, case.name, _name(dtype), NOT_SERVED, reason=", ".join(missing))
    problem = _Problem(case, dtype, device)

    def ours(problem: _Problem, q: Tensor, k: Tensor, v: Tensor, bias: Bias | None) -> tuple[Tensor, Tensor | None]:
        result = attention(
            q, k, v, q_layout=problem.q_layout, kv_layout=problem.kv_layout, bias=bias, backend=backend,
            **problem.options(),
        )  # fmt: skip
        return result if isinstance(result, tuple) else (result, None)

    return _judge(
        backend, case.name, dtype,
        run=lambda: problem.solve(ours),
        truth=lambda: problem.solve(_truth, torch.float64),
        plain=lambda: problem.solve(_plain),
    )  # fmt: skip


def _judge(
    backend: str,
    case: str,
    dtype: torch.dtype,
    run: Callable[[], dict[str, Tensor]],
    truth: Callable[[], dict[str, Tensor]],
    plain: Callable[[], dict[str, Tensor]],
) -> KernelResult:
    """Run one problem and hold it to the rule."""
    try:
        run()
        start = time.perf_counter()
        got = run()
        _wait(next(iter(got.values())))
        milliseconds = (time.perf_counter() - start) * 1e3
    except Exception as raised:  # whatever a kernel raises is its result
        refused = isinstance(raised, ValueError) and backend in str(raised)  # our refusals name who refuses
        reason = _first_line(raised) if refused else f"{type(raised).__name__}: {_first_line(raised)}"
        return KernelResult(backend, case, _name(dtype), NOT_SERVED if refused else FAIL, reason=reason)
    want, yardstick = truth(), plain()
    measured = [(name, *_compare(got.get(name), want[name], yardstick[name], dtype, name)) for name in want]
    worst, error, tolerance, flaw = max(measured, key=lambda row: row[1] / row[2])
    ratio = error / tolerance
    flaw = flaw or f"{worst} is off by {error:.1e}, {ratio:.1f} times the tolerance {tolerance:.1e}"
    return KernelResult(
        backend, case, _name(dtype), OK if ratio <= 1 else FAIL, ratio, worst, error, tolerance,
        "" if ratio <= 1 else flaw, milliseconds,
    )  # fmt: skip


def _compare(
    got: Tensor | None, want: Tensor, plain: Tensor, dtype: torch.dtype, name: str
) -> tuple[float, float, str]:  # error, tolerance, what is wrong besides
    infinite = want.isinf()  # lse of rows without keys
    real = want.masked_fill(infinite, 0).abs()
    largest = real.amax().item() if real.numel() else 0.0
    yardsticks = (plain.double() - want).masked_fill(infinite, 0).abs().nan_to_num(0)
    yardstick = yardsticks.amax().item() if yardsticks.numel() else 0.0
    if want.dim() == 0:  # of one number plain PyTorch may be right by luck
        yardstick = max(yardstick, torch.finfo(dtype).eps * largest)
    tolerance = 2 * yardstick + 16 * torch.finfo(torch.float32).eps * largest + torch.finfo(torch.float32).tiny
    if got is None or got.shape != want.shape:
        shape = "is missing" if got is None else f"has shape {tuple(got.shape)} instead of {tuple(want.shape)}"
        return float("inf"), tolerance, f"{name} {shape}"
    if not (got.isinf() == infinite).all() or got.isnan().any():
        return float("inf"), tolerance, f"{name} holds NaN, or infinity in other places than the truth"
    if name == "out" and not (got[want == 0] == 0).all():
        return float("inf"), tolerance, "out is not exactly 0 at padding or in rows without keys"
    error = (got.double() - want).masked_fill(infinite, 0).abs()
    return (error.amax().item() if error.numel() else 0.0), tolerance, ""


def _check_loss(name: str, dtype: torch.dtype, device: torch.device) -> KernelResult:
    """Hold the fused loss to the rule: 3 rows of 40 labels, a third of them ignored, over 301 words."""
    options = LOSS_CASES[name]
    generator = torch.Generator().manual_seed(len(name))
    shapes = {"hidden": (3, 40, 48), "weight": (301, 48), "bias": (301,)}
    tensors = {key: torch.randn(shape, generator=generator).to(device, dtype) for key, shape in shapes.items()}
    labels = torch.randint(301, (3, 40), generator=generator)
    labels = labels.masked_fill(torch.rand(3, 40, generator=generator) < 1 / 3, -100).to(device)

    def solve(f: Callable[..., Tensor], wide: torch.dtype = dtype) -> dict[str, Tensor]:
        leaves = {key: x.to(wide, copy=True).requires_grad_() for key, x in tensors.items()}
        loss = f(leaves["hidden"], leaves["weight"], labels, bias=leaves["bias"], **options)
        grads = torch.autograd.grad(loss, list(leaves.values()))
        return {"loss": loss.detach(), **{f"d{key}": g for key, g in zip(leaves, grads, strict=True)}}

    return _judge(
        LOSS, name, dtype,
        run=lambda: solve(linear_cross_entropy),
        truth=lambda: solve(_plain_loss, torch.float64),
        plain=lambda: solve(_plain_loss),
    )  # fmt: skip


def _plain_loss(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, bias: Tensor, label_smoothing: float = 0.0, z_loss: float = 0.0,
    softcap: float | None = None, logit_scale: float = 1.0, num_items: int | None = None,
) -> Tensor:  # fmt: skip
    """Compute the loss from full logits, which become float32 (or wider) for the softmax as in transformers."""
    logits_NV = (logit_scale * F.linear(hidden, weight, bias)).flatten(0, 1)
    logits_NV = logits_NV if softcap is None else softcap * torch.tanh(logits_NV / softcap)
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    kept_N = labels.flatten() != -100
    total = F.cross_entropy(logits_NV, labels.flatten(), label_smoothing=label_smoothing, reduction="sum")
    total = total + z_loss * logits_NV[kept_N].logsumexp(-1).square().sum()
    return total / (kept_N.sum() if num_items is None else num_items)


def _time(backend: str, dtype: torch.dtype, device: torch.device) -> KernelTiming | None:
    """Best of up to 5 runs within half a second, after one that warms up; None where the backend refuses."""
    sizes = (512, 130, 64, 318) if device.type == "cpu" else (4096, 1030, 520, 2546)
    case = KernelCase("timing", sizes, sizes, "packed", (8, 8), (64, 64), causal=True)
    problem, best, spent = _Problem(case, dtype, device), float("inf"), 0.0

    def ours(problem: _Problem, q: Tensor, k: Tensor, v: Tensor, bias: Bias | None) -> tuple[Any, None]:
        return attention(
            q, k, v, q_layout=problem.q_layout, kv_layout=problem.kv_layout, causal=True, backend=backend
        ), None  # fmt: skip

    for attempt in range(6):
        start = time.perf_counter()
        try:
            _wait(problem.solve(ours)["out"])
        except Exception:  # already in the table: the cases fail the same way
            return None
        seconds = time.perf_counter() - start
        spent += seconds if attempt or seconds > 1 else 0
        best = min(best, seconds) if attempt or seconds > 1 else best
        if spent > 0.5:
            break
    name = f"packed causal attention, documents of {', '.join(map(str, sizes))} tokens, 8 heads of 64"
    return KernelTiming(backend, _name(dtype), name, best * 1e3)


def _wait(x: Tensor) -> None:
    if x.device.type != "cpu":
        torch.accelerator.synchronize(x.device)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
