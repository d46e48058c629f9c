"""The varlen backend: PyTorch's variable-length flash attention (`torch.nn.attention.varlen`), for plain cases on GPUs.

It takes packed sequences in half precision: full, causal or windowed attention, with grouped heads. Padded tensors are
packed first, once for each layout. What it does not serve is in the capability table (biases, softcap, dropout, lse,
whose gradient PyTorch drops) or is refused by `varlen_refuses`.

PyTorch's window is `(left, right)` around the query's position, and its positions always meet at the last query and
key (`(-1, 0)` is causal); ours do so only when `causal`. A window without causality therefore needs queries and keys of
equal lengths. Its backward pass adds in varying order unless `torch.use_deterministic_algorithms(True)` is set.

No GPU has run this backend yet: it is written against the documented signature of PyTorch 2.11 to 2.14, and
`attention()` proves it against the reference before its first use (`attention_proof`).

Shapes: B sequences, N and M packed queries and keys, H heads, G key/value heads, D head dim.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention_layouts import Layout
from .attention_reference import reference_attention
from .attention_settings import AttentionSettings

FEATURES = frozenset(("causal", "window", "gqa", "padded", "packed", "mixed"))
MIN_CAPABILITY = (8, 0)  #: PyTorch's flash attention needs Ampere or later


class _Kernel(NamedTuple):
    """PyTorch's function, and whether it takes `enable_gqa` (2.11 does not)."""

    attend: Callable[..., Any]
    takes_groups: bool


_LOADED: dict[str, _Kernel | None] = {}


def _load() -> _Kernel | None:
    """Import PyTorch's function on first use, for it brings torch's compiler along; None before PyTorch 2.10."""
    if "kernel" not in _LOADED:
        try:
            from torch.nn.attention.varlen import varlen_attn
        except ImportError:
            _LOADED["kernel"] = None
        else:
            _LOADED["kernel"] = _Kernel(varlen_attn, "enable_gqa" in inspect.signature(varlen_attn).parameters)
    return _LOADED["kernel"]


def varlen_why_not(device: torch.device) -> str | None:
    """Return why the backend cannot run on a device, or None."""
    if device.type != "cuda":
        return f"it needs a GPU and the tensors are on {device.type}"
    if _load() is None:
        return f"torch {torch.__version__} has no torch.nn.attention.varlen (torch 2.10 or later has)"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < MIN_CAPABILITY:
        return f"it needs compute capability {MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]} or higher"
    return None


def varlen_refuses(
    q: Tensor, k: Tensor, v: Tensor, q_layout: Layout, kv_layout: Layout, settings: AttentionSettings
) -> str | None:
    """Return why the backend does not serve these tensors, or None."""
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"it serves float16 and bfloat16, not {q.dtype}"
    if q.shape[-1] != v.shape[-1] or q.shape[-1] % 8:
        return f"it serves one head dim that is a multiple of 8, not {q.shape[-1]} of q and k and {v.shape[-1]} of v"
    if settings.window is not None and not settings.causal and not _same_lengths(q_layout, kv_layout):
        return "it serves a window without causality only where queries and keys have the same lengths"
    if torch.compiler.is_compiling() and (q_layout.mask is not None or kv_layout.mask is not None):
        return "it packs padded tensors, whose sizes a compiled graph does not know"
    return None


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_layout: Layout,
    kv_layout: Layout,
    settings: AttentionSettings,
) -> tuple[Tensor, Tensor | None]:
    """Compute attention by `torch.nn.attention.varlen.varlen_attn`; the dispatcher refuses what it does not serve."""
    if 0 in q.shape or 0 in k.shape:
        return reference_attention(q, k, v, q_layout, kv_layout, settings)
    kernel = _load()
    if kernel is None:
        raise ValueError(f"backend='varlen' cannot run here: {varlen_why_not(q.device)}; use 'auto'")
    q_tokens, kv_tokens = _packed_tokens(q_layout), _packed_tokens(kv_layout)
    q_NHD, k_MGD, v_MGD = q_tokens.pack(q), kv_tokens.pack(k), kv_tokens.pack(v)
    options: dict[str, Any] = {}
    if q_NHD.shape[1] != k_MGD.shape[1]:
        if kernel.takes_groups:
            options["enable_gqa"] = True
        else:
            groups = q_NHD.shape[1] // k_MGD.shape[1]
            k_MGD, v_MGD = k_MGD.repeat_interleave(groups, dim=1), v_MGD.repeat_interleave(groups, dim=1)
    left, right = (-1 if side is None else side for side in settings.reach)
    out_NHD = kernel.attend(
        q_NHD, k_MGD, v_MGD, q_tokens.cu_seqlens, kv_tokens.cu_seqlens, q_layout.length, kv_layout.length,
        scale=settings.scale, window_size=(left, right), **options,
    )  # fmt: skip
    return q_tokens.unpack(out_NHD, q_layout), None


class _PackedTokens(NamedTuple):
    """Where the real tokens of a layout are.

    Attributes:
        cu_seqlens: int32 `[B + 1]`, as PyTorch wants them.
        places: int64 `[N]`, the tokens' places in the flattened padded tensor; None: all, in order.
    """

    cu_seqlens: Tensor
    places: Tensor | None

    def pack(self, x: Tensor) -> Tensor:
        """Return a packed or padded tensor as `[N, heads, D]`, dense in its last dimension."""
        x_NHD = x.flatten(0, 1) if x.dim() == 4 else x
        x_NHD = x_NHD if self.places is None else x_NHD.index_select(0, self.places)
        return x_NHD if x_NHD.stride(-1) == 1 else x_NHD.contiguous()

    def unpack(self, out_NHD: Tensor, layout: Layout) -> Tensor:
        """Return `[N, heads, D]` in the form of the layout, zeros at padding."""
        if layout.is_packed:
            return out_NHD
        if self.places is not None:
            rows = out_NHD.new_zeros(layout.batch * layout.length, *out_NHD.shape[1:])
            out_NHD = rows.index_copy(0, self.places, out_NHD)
        return out_NHD.unflatten(0, (layout.batch, layout.length))


def _packed_tokens(layout: Layout) -> _PackedTokens:
    """Return where a layout's tokens are; made once for all layers. A mask waits for the device once."""

    def find() -> _PackedTokens:
        if layout.cu_seqlens is not None:
            return _PackedTokens(layout.cu_seqlens.to(torch.int32), None)
        cu_seqlens = F.pad(layout.lengths.cumsum(0), (1, 0)).to(torch.int32)
        places = None if layout.mask is None else layout.mask.flatten().nonzero()[:, 0]
        return _PackedTokens(cu_seqlens, places)

    return layout.once("varlen", find)


def _same_lengths(q_layout: Layout, kv_layout: Layout) -> bool:
    """Return whether queries and keys surely have the same lengths; nothing waits for the device."""
    if q_layout is kv_layout or (q_layout.mask is not None and q_layout.mask is kv_layout.mask):
        return True
    if q_layout.cu_seqlens is not None and q_layout.cu_seqlens is kv_layout.cu_seqlens:
        return True
    return q_layout.known_sizes is not None and q_layout.known_sizes == kv_layout.known_sizes
