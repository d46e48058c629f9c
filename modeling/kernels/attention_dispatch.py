"""`attention()`: the one entry to every attention backend, its checks, and the table of who can serve what.

The dispatcher prefers by feature, by speed and by proof: a backend whose kernels are compiled on the user's machine or
come with a PyTorch build runs only after it has agreed with the reference there (`attention_proof`).

Shapes: B batch, L queries, S keys, N packed tokens, H heads, G key/value heads, D head dim.
"""

from __future__ import annotations

import importlib.util
import math
import os
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from .attention_biases import Bias
from .attention_direct import MAX_DIRECT_QUERIES, direct_attention, is_direct
from .attention_layouts import Layout
from .attention_proof import TRITON_CASES, VARLEN_CASES, ProofCase, Run, prove, why_unproven
from .attention_reference import reference_attention
from .attention_sdpa import sdpa_attention
from .attention_settings import AttentionSettings, Window
from .attention_varlen import FEATURES as VARLEN_FEATURES
from .attention_varlen import varlen_attention, varlen_refuses, varlen_why_not
from .blockwise.attention_blockwise import blockwise_attention

FEATURES: dict[str, str] = {
    "causal": "causal=True",
    "window": "window",
    "gqa": "fewer key/value heads than query heads",
    "padded": "padded layouts",
    "packed": "packed layouts",
    "mixed": "one layout padded, the other packed",
    "alibi": "an ALiBi bias",
    "t5": "a T5Bias",
    "relative": "a RelativeBias",
    "dense": "a DenseBias",
    "softcap": "softcap",
    "dropout": "dropout_p",
    "seed": "dropout with a seed (counter-based)",
    "lse": "return_lse=True",
    "float64": "float64 tensors",
    "wide": "head dims above 256",
}


Arguments = tuple[Tensor, Tensor, Tensor, Layout, Layout, AttentionSettings]  #: what every backend takes


def _anywhere(device: torch.device) -> str | None:
    return None


def _anything(
    q: Tensor, k: Tensor, v: Tensor, q_layout: Layout, kv_layout: Layout, settings: AttentionSettings
) -> str | None:
    return None


@dataclass(frozen=True)
class Backend:
    """A way to compute attention.

    Attributes:
        run: the function.
        serves: the features (keys of `FEATURES`) it serves.
        draws: whether it draws its own dropout where no seed is given.
        why_not: returns why it cannot run on a device here, or None.
        refuses: returns why it does not serve tensors whose features it serves, or None.
        proofs: what it must solve on a device before `attention()` uses it there; none where it is plain PyTorch.
    """

    run: Run
    serves: frozenset[str]
    draws: bool = False
    why_not: Callable[[torch.device], str | None] = _anywhere
    refuses: Callable[[Tensor, Tensor, Tensor, Layout, Layout, AttentionSettings], str | None] = _anything
    proofs: tuple[ProofCase, ...] = ()


def _triton(
    q: Tensor, k: Tensor, v: Tensor, q_layout: Layout, kv_layout: Layout, settings: AttentionSettings
) -> tuple[Tensor, Tensor | None]:
    from .triton.attention_triton import triton_attention  # Triton is loaded by whoever uses it

    return triton_attention(q, k, v, q_layout, kv_layout, settings)


def _no_triton(device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install 'triton>=3.6')"
    if device.type not in ("cuda", "xpu") and os.environ.get("TRITON_INTERPRET") != "1":
        return f"it needs a GPU and the tensors are on {device.type}"
    return None


_ALL = frozenset(FEATURES)
#: The capability table.
BACKENDS: dict[str, Backend] = {
    "varlen": Backend(
        varlen_attention, VARLEN_FEATURES, why_not=varlen_why_not, refuses=varlen_refuses, proofs=VARLEN_CASES
    ),
    "triton": Backend(_triton, _ALL - {"float64", "wide"}, why_not=_no_triton, proofs=TRITON_CASES),
    "blockwise": Backend(blockwise_attention, _ALL, draws=True),
    "sdpa": Backend(sdpa_attention, _ALL - {"softcap", "seed", "lse"}, draws=True),
    "reference": Backend(reference_attention, _ALL),
}

#: On CPUs PyTorch's kernels win from about this many keys on; below, theirs are slow in backward passes.
MIN_SDPA_KEYS = 512

_warned: set[str] = set()


def attention_backends() -> dict[str, dict[str, bool]]:
    """Return the capability table: backend -> feature -> whether it is served."""
    return {name: {feature: feature in backend.serves for feature in FEATURES} for name, backend in BACKENDS.items()}


def prove_backends(device: torch.device, names: Collection[str] | None = None) -> dict[str, str]:
    """Run the proofs that `attention()` would run on a device, if they have not run yet.

    Args:
        device: where to run them.
        names: of the backends in question; None: all.

    Returns:
        for each backend that needs a proof and can run there: what failed, "" for nothing.
    """
    device = torch.empty(0, device=device).device  # with its index, as tensors have it
    return {
        name: prove(name, backend.run, backend.proofs, device)
        for name, backend in BACKENDS.items()
        if backend.proofs and (names is None or name in names) and backend.why_not(device) is None
    }


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    q_layout: Layout | None = None,
    kv_layout: Layout | None = None,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    bias: Bias | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute scaled dot-product attention (Vaswani et al. 2017, eq. 1) for every layout, mask and bias.

    `dropout(softmax(softcap * tanh(scale * q k^T / softcap) + bias)) v`, over the keys that each query may attend.

    Positions count real tokens: inside each sequence keys are 0..S-1 and queries 0..L-1, shifted by S-L when `causal`
    so that the last query meets the last key. Window, causality and positional biases all use these positions.

    Args:
        q: `[B, L, H, D]`, or packed `[N, H, D]` with a packed `q_layout`.
        k: `[B, S, G, D]` or packed `[M, G, D]`; H must be a multiple of G (Ainslie et al. 2023).
        v: as k; its head dim may differ, the output then has it.
        q_layout: where the queries' sequences are; None: `[B, L]` without padding.
        kv_layout: where the keys' sequences are; None: `[B, S]` without padding.
        causal: a query attends only to keys up to its position.
        window: `(left, right)` keeps keys in `[position - left, position + right]`; None or -1 is unbounded.
        bias: `ALiBi`, `T5Bias`, `RelativeBias` or `DenseBias`, added after scale and softcap.
        softcap: bound of the scores (Gemma 2, Gemma Team 2024, section 2).
        scale: factor of the scores; None: `D ** -0.5`.
        dropout_p: probability of dropping an attention weight, in [0, 1).
        seed: integer (or 0-dim integer tensor) for counter-based dropout, which depends on (seed, sequence, head, row,
            column) alone: packed equals padded, and recomputation equals the forward pass. None: randomness from
            torch's default generator.
        return_lse: also return the log of the softmax's denominator (before dropout).
        backend: "auto", or a name in `attention_backends()`.

    Returns:
        out, of q's shape and dtype; exactly 0 at padding and in rows that may attend nothing, with finite gradients.
        With `return_lse`, `(out, lse)`: lse is `[B, H, L]` (packed `[H, N]`), float32 or wider, -inf where out is 0
        for want of keys.

    Raises:
        ValueError: an argument is wrong, or the named backend does not serve the case. Names argument, value, remedy.
    """
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is not known; use 'auto' or one of {sorted(BACKENDS)}")
    _check_numbers(softcap, scale, dropout_p, seed)
    if bias is not None and not isinstance(bias, Bias):
        raise ValueError(f"bias must be a bias object, got {type(bias).__name__}; wrap a tensor in DenseBias(tensor)")
    q, k, v = _under_autocast(q, k, v)
    if scale is None:
        scale = q.shape[-1] ** -0.5 if q.dim() > 0 else 1.0  # what has no dimensions is refused below
    settings = AttentionSettings(causal, _check_window(window), bias, softcap, scale, dropout_p, seed, return_lse)
    # A decoding step would spend as long on the checks as on the attention: `is_direct` itself sees that all is sound.
    checked = False
    if not (isinstance(q_layout, Layout) and isinstance(kv_layout, Layout)):
        q_layout, kv_layout = _check_tensors(q, k, v, q_layout, kv_layout)
        checked = True
    if backend in ("auto", "blockwise") and is_direct(q, k, v, q_layout, kv_layout, settings):
        if bias is not None:
            _check_bias(bias, q, q_layout, kv_layout)
        return direct_attention(q, k, v, q_layout, kv_layout, settings)
    if not checked:
        _check_tensors(q, k, v, q_layout, kv_layout)
    if bias is not None:
        _check_bias(bias, q, q_layout, kv_layout)
    out, lse = _run((q, k, v, q_layout, kv_layout, settings), backend)
    return out if lse is None else (out, lse)


def _run(arguments: Arguments, backend: str) -> tuple[Tensor, Tensor | None]:
    """Choose a backend and run it; one that does not draw its own dropout gets a seed."""
    q, settings = arguments[0], arguments[-1]
    needed = _needed(*arguments)
    if backend == "auto":
        chosen = BACKENDS[_choose(_preference(arguments, needed), needed, arguments)]
    else:
        chosen = BACKENDS[_require(backend, needed, arguments)]
    if settings.dropout_p > 0 and settings.seed is None and not chosen.draws:
        causal, window, bias, softcap, scale, dropout_p, _, return_lse = settings
        seed = torch.randint(1 << 62, (), device=q.device)
        settings = AttentionSettings(causal, window, bias, softcap, scale, dropout_p, seed, return_lse)
    return chosen.run(*arguments[:-1], settings)


def _needed(
    q: Tensor, k: Tensor, v: Tensor, q_layout: Layout, kv_layout: Layout, settings: AttentionSettings
) -> set[str]:
    """Return the features that a call asks for."""
    needs = {
        "causal": settings.causal,
        "window": settings.window is not None,
        "gqa": q.shape[-2] != k.shape[-2],
        "padded": q_layout.mask is not None or kv_layout.mask is not None,
        "packed": q_layout.is_packed and kv_layout.is_packed,
        "mixed": q_layout.is_packed != kv_layout.is_packed,
        "softcap": settings.softcap is not None,
        "dropout": settings.dropout_p > 0,
        "seed": settings.dropout_p > 0 and settings.seed is not None,
        "lse": settings.return_lse,
        "float64": q.dtype == torch.float64,
        "wide": max(q.shape[-1], v.shape[-1]) > 256,
    }
    needed = {feature for feature, yes in needs.items() if yes}
    return needed if settings.bias is None else needed | {settings.bias.kind}


def _trains(q: Tensor, k: Tensor, v: Tensor, settings: AttentionSettings) -> bool:
    leaves = (q, k, v) if settings.bias is None else (q, k, v, settings.bias.weight)
    return torch.is_grad_enabled() and any(x.requires_grad for x in leaves)


def _preference(arguments: Arguments, needed: set[str]) -> list[str]:
    """Order the backends by speed for a call."""
    q, k, v, q_layout, _, settings = arguments
    trains = _trains(q, k, v, settings)
    if q.device.type != "cpu":
        decodes = not trains and q_layout.length <= MAX_DIRECT_QUERIES  # Triton reads a padded cache where it is
        first = ["triton", "varlen"] if decodes else ["varlen", "triton"]
        return [*first, "sdpa", "blockwise", "reference"]
    if torch.compiler.is_compiling() and not needed & {"packed", "mixed"}:
        return ["sdpa", "reference", "blockwise"]  # operations that every compiler and exporter knows
    plain = not trains and not needed & {"packed", "mixed"}  # one call, where the others run Python
    if _sdpa_stays_small(arguments, needed) and (plain or _sdpa_pays(arguments, needed, trains)):
        return ["sdpa", "blockwise", "reference"]
    return ["blockwise", "sdpa", "reference"]


def _sdpa_stays_small(arguments: Arguments, needed: set[str]) -> bool:
    """Return whether sdpa needs no mask, bias or weights of L x S."""
    if needed & {"window", "alibi", "t5", "relative", "dropout"}:
        return False
    if "causal" not in needed:
        return True
    q_layout, kv_layout = arguments[3:5]
    if "packed" in needed:
        return q_layout.known_sizes == kv_layout.known_sizes
    return q_layout.mask is kv_layout.mask is None and q_layout.length == kv_layout.length


def _sdpa_pays(arguments: Arguments, needed: set[str], trains: bool) -> bool:
    """Return whether sequences are long enough for PyTorch's CPU kernel, and its gradients exact enough.

    It sums dk and dv in half precision: three times the error of plain products at 530 tokens.
    """
    q, kv_layout = arguments[0], arguments[4]
    total = sum(kv_layout.known_sizes) if kv_layout.known_sizes else kv_layout.length * kv_layout.batch
    exact = not trains or (q.dtype in (torch.float32, torch.float64) and "dense" not in needed)
    return total >= MIN_SDPA_KEYS * kv_layout.batch and exact


def _why_left(name: str, needed: set[str], arguments: Arguments) -> str | None:
    """Return why a backend is not for a call, or None; its proof is not asked."""
    backend = BACKENDS[name]
    missing = _names(needed - backend.serves)
    if missing:
        return f"it does not serve {missing}"
    return backend.why_not(arguments[0].device) or backend.refuses(*arguments)


def _require(name: str, needed: set[str], arguments: Arguments) -> str:
    """Return the name of a backend that was asked for, or say why it cannot serve."""
    backend, device = BACKENDS[name], arguments[0].device
    missing = _names(needed - backend.serves)
    if missing:
        able = [other for other in BACKENDS if _why_left(other, needed, arguments) is None]
        raise ValueError(f"backend={name!r} does not serve {missing}; use 'auto' or one of {able}")
    reason = backend.why_not(device)
    if reason is not None:
        raise ValueError(f"backend={name!r} cannot run here: {reason}; use 'auto'")
    reason = backend.refuses(*arguments)
    if reason is not None:
        raise ValueError(f"backend={name!r} does not serve these tensors: {reason}; use 'auto'")
    reason = why_unproven(name, backend.run, backend.proofs, arguments[0], by_name=True)
    if reason is not None:
        raise ValueError(f"backend={name!r} cannot run here: {reason}; use 'auto'")
    return name


def _choose(names: list[str], needed: set[str], arguments: Arguments) -> str:
    """Return the first backend that serves; warn once, with the reason, where the fast path is left.

    A proof that fails has given a warning of its own.
    """
    reasons = []
    for name in names:
        backend, reason = BACKENDS[name], _why_left(name, needed, arguments)
        if reason is None and why_unproven(name, backend.run, backend.proofs, arguments[0], by_name=False) is None:
            break
        if reason is not None and name in ("triton", "blockwise"):  # what serves everything, and should
            reasons.append(f"{name!r} is left: {reason}")
    if reasons and not torch.compiler.is_compiling():
        message = f"attention() runs on {name!r}; {'; '.join(reasons)}"
        if message not in _warned:
            _warned.add(message)
            warnings.warn(message, UserWarning, stacklevel=4)
    return name


def _names(features: set[str]) -> str:
    return ", ".join(text for feature, text in FEATURES.items() if feature in features)


def is_autocast(kind: str) -> bool:
    """Return whether autocast is on for a type of device; torch 2.11 cannot trace `is_autocast_available`."""
    return (torch.compiler.is_compiling() or torch.amp.is_autocast_available(kind)) and torch.is_autocast_enabled(kind)


def _under_autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cast as autocast casts for PyTorch's attention: rotary embeddings leave q and k wider than v."""
    kind = q.device.type
    if not is_autocast(kind):
        return q, k, v
    dtype = torch.get_autocast_dtype(kind)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in (q, k, v))  # type: ignore[return-value]


def _check_tensors(
    q: Tensor, k: Tensor, v: Tensor, q_layout: Layout | None, kv_layout: Layout | None
) -> tuple[Layout, Layout]:
    """Check that tensors and layouts agree, and return the layouts, made where none was given."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() not in (3, 4):
            raise ValueError(f"{name} must be [batch, length, heads, dim] or packed [tokens, heads, dim], got {_of(x)}")
        if not x.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {x.dtype}; convert it with .to()")
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(f"{name} is {x.dtype} on {x.device} but q is {q.dtype} on {q.device}; make them equal")
    if k.shape[:-1] != v.shape[:-1]:
        raise ValueError(f"k {_of(k)} and v {_of(v)} must agree in all but the last dimension")
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(f"q {_of(q)} and k {_of(k)} must have the same head dim (the last dimension)")
    if k.shape[-2] == 0 or q.shape[-2] % k.shape[-2]:
        raise ValueError(f"q {_of(q)} has {q.shape[-2]} heads, which must be a multiple of the {k.shape[-2]} of k")
    q_layout, kv_layout = _check_layout("q", q, q_layout), _check_layout("k", k, kv_layout)
    if q_layout.batch != kv_layout.batch:
        raise ValueError(f"q has {q_layout.batch} sequences and k has {kv_layout.batch}; they must correspond")
    return q_layout, kv_layout


def _check_layout(name: str, x: Tensor, layout: Layout | None) -> Layout:
    argument = f"{'q' if name == 'q' else 'kv'}_layout"
    if layout is None:
        if x.dim() == 3:
            raise ValueError(f"{name} {_of(x)} is packed: pass {argument}=Layout.packed(cu_seqlens, max_length)")
        return Layout.full(x.shape[0], x.shape[1], x.device)
    if not isinstance(layout, Layout):
        raise ValueError(f"{argument} must be a Layout, got {type(layout).__name__}; use Layout.padded(mask)")
    if layout.lengths.device != x.device:
        raise ValueError(f"{argument} is on {layout.lengths.device} but {name} is on {x.device}; move one of them")
    if layout.is_packed:
        tokens = None if layout.known_sizes is None else sum(layout.known_sizes)
        if x.dim() != 3 or tokens not in (None, x.shape[0]):
            raise ValueError(f"{argument} packs {tokens} tokens (the last of cu_seqlens) but {name} is {_of(x)}; pass "
                             f"[{tokens}, heads, dim]")  # fmt: skip
    elif x.dim() != 4 or tuple(x.shape[:2]) != (layout.batch, layout.length):
        raise ValueError(f"{argument} is padded [{layout.batch}, {layout.length}] but {name} is {_of(x)}; pass "
                         "[batch, length, heads, dim] with the mask's batch and length")  # fmt: skip
    return layout


def _check_window(window: Window | None) -> Window | None:
    """Check the window, and write "unbounded" as None."""
    if window is None:
        return None
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise ValueError(f"window={window!r} must be (left, right); None or -1 leaves a side unbounded")
    for side in window:
        if side is not None and (not isinstance(side, int) or isinstance(side, bool) or side < -1):
            raise ValueError(f"window={window!r} must hold integers from 0 up; None or -1 leaves a side unbounded")
    left, right = (None if side == -1 else side for side in window)
    return None if left is right is None else (left, right)


def _check_numbers(softcap: float | None, scale: float | None, dropout_p: float, seed: int | Tensor | None) -> None:
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap={softcap!r} must be positive and finite; pass None for no softcap")
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"scale={scale!r} must be finite; pass None for head_dim ** -0.5")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p={dropout_p!r} must be in [0, 1)")
    if isinstance(seed, Tensor):
        if seed.dim() != 0 or seed.is_floating_point() or seed.is_complex() or seed.dtype == torch.bool:
            raise ValueError(f"seed must be an integer or a 0-dim integer tensor, got {seed.dtype} {_of(seed)}")
    elif seed is not None and not (isinstance(seed, int) and 0 <= seed < 1 << 63):
        raise ValueError(f"seed={seed!r} must be an integer in [0, 2**63)")


def _check_bias(bias: Bias, q: Tensor, q_layout: Layout, kv_layout: Layout) -> None:
    if bias.weight.device != q.device:
        raise ValueError(f"bias is on {bias.weight.device} but q is on {q.device}; move one of them")
    packed = (q_layout.is_packed, kv_layout.is_packed)
    bias.check(q_layout.batch, q.shape[-2], q_layout.length, kv_layout.length, packed=packed)


def _of(x: Tensor) -> str:
    return f"of shape {tuple(x.shape)}"
