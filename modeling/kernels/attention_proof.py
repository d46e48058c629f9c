"""Proof of a backend: a tiny case against the reference, the first time a process uses the backend on a device.

Kernels that a compiler makes on the user's machine, or that come with a PyTorch build, may fail to compile there or
compute something else. So `attention()` uses such a backend only after it has shown what it can: forward pass and all
gradients of its `ProofCase`s, and the forward pass without gradients, against the reference backend in float64 on the
CPU. A backend that raises, gives NaN or is off by more than rounding explains is left for the rest of the process on
that device, with one warning that says what differed. Asked for by name it raises a ValueError that says the same.

A proof runs eagerly or not at all. In a graph that is being compiled or exported, with fake tensors and under CUDA
graph capture `attention()` uses what has been proven before, and nothing unproven unless asked for by name. To use a
backend from the first compiled call on, run one batch eagerly before, or call
`attention_dispatch.prove_backends(device)`. `urform doctor kernels` shows the outcome.

Shapes: L queries, S keys, H heads, G key/value heads, D head dim.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.graph import saved_tensors_hooks

from .attention_biases import T5Bias
from .attention_layouts import Layout
from .attention_reference import reference_attention
from .attention_settings import AttentionSettings

Run = Callable[[Tensor, Tensor, Tensor, Layout, Layout, AttentionSettings], tuple[Tensor, Tensor | None]]


class ProofCase(NamedTuple):
    """One tiny problem that a backend must solve.

    Attributes:
        name: how a warning calls it.
        dtype: of q, k and v.
        q_sizes: queries of each sequence.
        k_sizes: keys of each sequence.
        packed: sequences follow each other; else they are padded on the left, with NaN at padding.
        settings: all but the bias.
        heads: (query heads, key/value heads).
        t5_bias: add a T5Bias with a gradient.
    """

    name: str
    dtype: torch.dtype
    q_sizes: tuple[int, ...]
    k_sizes: tuple[int, ...]
    packed: bool
    settings: AttentionSettings
    heads: tuple[int, int] = (2, 2)
    t5_bias: bool = False


HEAD_DIM = 32
_SCALE = HEAD_DIM**-0.5
#: Exact and half-precision products, and every kind of path in the kernels: masks, bias, softcap, dropout, decoding.
TRITON_CASES = (
    ProofCase(
        "padded, causal, grouped heads", torch.float32, (5, 9), (37, 20), False,
        AttentionSettings(causal=True, scale=_SCALE), (4, 2),
    ),
    ProofCase(
        "packed, window, T5 bias, softcap, dropout", torch.float16, (40, 7), (40, 7), True,
        AttentionSettings(window=(20, 5), softcap=3.0, scale=_SCALE, dropout_p=0.1, seed=7), t5_bias=True,
    ),
)  # fmt: skip
#: PyTorch chooses among kernels by the longest sequence; a causal row may see no key.
VARLEN_CASES = (
    ProofCase(
        "packed, causal, grouped heads, rows without keys", torch.float16, (5, 40), (130, 8), True,
        AttentionSettings(causal=True, scale=_SCALE), (4, 2),
    ),
    ProofCase("padded", torch.float16, (130, 65), (130, 65), False, AttentionSettings(scale=_SCALE)),
    ProofCase("packed, window", torch.float16, (70, 9), (70, 9), True, AttentionSettings(window=(8, 3), scale=_SCALE)),
)  # fmt: skip

#: (backend, type of device, its index) -> what failed; "" where nothing did.
OUTCOMES: dict[tuple[str, str, int | None], str] = {}
_disregarded = False


@contextmanager
def proofs_disregarded() -> Iterator[None]:
    """Let `attention()` use backends whatever their proofs say: `urform doctor` measures how wrong they are."""
    global _disregarded
    before, _disregarded = _disregarded, True
    try:
        yield
    finally:
        _disregarded = before


def why_unproven(name: str, run: Run, cases: Sequence[ProofCase], q: Tensor, by_name: bool) -> str | None:
    """Return why a backend is not to be used for `q`, or None where it has passed its proof or needs none.

    Args:
        name: the backend's name, under which the outcome is kept.
        run: the backend.
        cases: what it must solve; none: it needs no proof.
        q: on the device in question.
        by_name: the user named the backend: then only a proof that has failed counts.
    """
    if not cases or _disregarded:
        return None
    outcome = OUTCOMES.get((name, q.device.type, q.device.index))
    if outcome is None:
        if _is_traced(q):
            return None if by_name else "it has not been proven on this device yet, and a proof cannot run in a graph"
        outcome = prove(name, run, cases, q.device)
    return f"it failed its proof on {q.device}: {outcome}" if outcome else None


def prove(name: str, run: Run, cases: Sequence[ProofCase], device: torch.device) -> str:
    """Run a backend's proof once per device, and return what failed, "" for nothing; warn once where it failed."""
    key = (name, device.type, device.index)
    if key not in OUTCOMES:
        failures = (_failure(run, case, device) for case in cases)
        OUTCOMES[key] = next((failure for failure in failures if failure), "")
        if OUTCOMES[key]:
            warnings.warn(
                f"attention() leaves backend {name!r} on {device}: it failed its proof against the reference: "
                f"{OUTCOMES[key]}; 'urform doctor kernels' measures all cases",
                UserWarning,
                stacklevel=2,
            )
    return OUTCOMES[key]


def _is_traced(q: Tensor) -> bool:
    """Return whether a proof must not run now: everything is recorded for later, or nothing is real."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or isinstance(q, FakeTensor):
        return True
    return q.is_cuda and torch.cuda.is_current_stream_capturing()


def _failure(run: Run, case: ProofCase, device: torch.device) -> str:
    """Return how a backend fails a case, "" if it does not."""
    truth = _solve(reference_attention, case, torch.device("cpu"), torch.float64)
    try:
        results = _solve(run, case, device, case.dtype)
    except torch.OutOfMemoryError:  # says nothing about the backend
        raise
    except Exception as error:  # whatever a compiler or a launch raises is the outcome
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return f"{case.name}: {type(error).__name__}: {lines[0] if lines else 'no message'}"
    # Rounding explains some units in the last place of the largest number. TF32 and a percent in half do not pass.
    rounding = 2.0**-13 if case.dtype == torch.float32 else 2.0**-6
    for what, want in truth.items():
        got = results[what].to("cpu", torch.float64)
        off, allowed = (got - want).abs().max().item(), rounding * want.abs().max().item()
        if not off <= allowed:  # NaN is not
            flaw = "holds NaN" if math.isnan(off) else f"is off by {off:.1e}, and rounding explains {allowed:.1e}"
            return f"{case.name}: {what} {flaw}"
    return ""


def _solve(run: Run, case: ProofCase, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return output and gradients of a case, and the output without gradients (decoding has kernels of its own).

    Nothing of the caller's state takes part: no inference mode, no autocast, no hooks on saved tensors, such as those
    with which checkpointing counts what a forward pass saves.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autocast(device.type, enabled=False))
        stack.enter_context(saved_tensors_hooks(lambda x: x, lambda x: x))
        q_layout, kv_layout = (_layout(sizes, case.packed, device) for sizes in (case.q_sizes, case.k_sizes))
        shapes = {
            "q": (q_layout, case.heads[0]), "k": (kv_layout, case.heads[1]), "v": (kv_layout, case.heads[1])
        }  # fmt: skip
        leaves = {}
        for phase, (leaf, (layout, heads)) in enumerate(shapes.items()):
            rows = (sum(layout.sizes),) if layout.is_packed else (layout.batch, layout.length)
            x = _waves((*rows, heads, HEAD_DIM), phase).to(case.dtype).to(device, dtype)
            if layout.mask is not None:
                x[~layout.mask] = torch.nan
            leaves[leaf] = x.requires_grad_()
        settings = case.settings
        if case.t5_bias:
            wide = torch.promote_types(dtype, torch.float32)
            leaves["bias"] = _waves((16, case.heads[0]), 3).to(torch.float32).to(device, wide).requires_grad_()
            settings = settings.with_bias(T5Bias(leaves["bias"], max_distance=32))
        arguments = (leaves["q"], leaves["k"], leaves["v"], q_layout, kv_layout, settings)
        out, _ = run(*arguments)
        probe = _waves(tuple(out.shape), 4).to(case.dtype).to(device, out.dtype)
        gradients = torch.autograd.grad(out, list(leaves.values()), probe)
        with torch.no_grad():
            alone, _ = run(*arguments)
    named = {f"d{leaf}": gradient for leaf, gradient in zip(leaves, gradients, strict=True)}
    return {"out": out.detach(), **named, "out without gradients": alone}


def _layout(sizes: tuple[int, ...], packed: bool, device: torch.device) -> Layout:
    lengths_B = torch.tensor(sizes)
    if packed:
        cu_seqlens = torch.nn.functional.pad(lengths_B.cumsum(0), (1, 0))
        return Layout.packed(cu_seqlens.to(device), max(sizes))
    return Layout.padded((torch.arange(max(sizes)) >= max(sizes) - lengths_B[:, None]).to(device))


def _waves(shape: tuple[int, ...], phase: int) -> Tensor:
    """Return numbers between -1.5 and 1.5 that no generator of the user's has to give, float64 on the CPU."""
    places = torch.arange(math.prod(shape), dtype=torch.float64, device="cpu")
    return 1.5 * torch.sin(places * (1.3 + 0.37 * phase) + phase).view(shape)
