"""transformers' masks by their parts: no L x S tensor where causality, a window, padding and packing say it all.

The library describes a mask as a composition of small functions of (batch, head, query index, key index) and lets
every attention implementation make of it what it needs. `urform_mask` recognises the compositions that stock models
use and returns a `CompactMask`: it looks like the bool tensor `[B, 1, L, S]` and becomes one as soon as anything but
our attention function looks inside. What it does not recognise is built in full, as for sdpa.

Shapes: B batch, L queries, S keys.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from transformers import masking_utils
from transformers.utils import logging
from transformers.utils.import_utils import is_tracing

logger = logging.get_logger(__name__)
T = TypeVar("T")


@dataclass(eq=False)
class KnownMask:
    """What a mask says: a key is seen if it is real, of the query's document, and where causality and window allow.

    Attributes:
        shape: `(B, 1, L, S)`.
        causal: the last query meets the last of the first `keys` keys.
        window: distances `(left, right)` among a row's indices, or None. Where it is set, the real tokens of a row
            are neighbours, so that distances among real tokens are the same.
        keys: how many keys there are to see; those after them are not written yet (static caches).
        q_start: index of the first query among the keys.
        padding: bool `[B, keys]`, True at real keys; None where all are.
        documents: `[B, L]`, numbers that go up from document to document; None where a row is one document.
        device: of the mask.
        build: makes the full bool tensor.
        full: the full tensor, once somebody has looked inside; from then on it is the mask.
        made: what the attention function has made of the mask, once for all layers.
    """

    shape: tuple[int, int, int, int]
    causal: bool
    window: tuple[int | None, int | None] | None
    keys: int
    q_start: int
    padding: Tensor | None
    documents: Tensor | None
    device: torch.device
    build: Callable[[], Tensor]
    full: Tensor | None = None
    made: list[tuple[tuple[Any, ...], Any]] = field(default_factory=list)

    def to(self, device: torch.device) -> KnownMask:
        """Say the same on another device."""
        padding, documents = (None if x is None else x.to(device) for x in (self.padding, self.documents))
        full = None if self.full is None else self.full.to(device)
        return replace(
            self, device=device, padding=padding, documents=documents, build=lambda: self.build().to(device), full=full,
            made=[],
        )  # fmt: skip

    @property
    def is_square(self) -> bool:
        """Return whether queries and keys are the same tokens."""
        return self.q_start == 0 and self.shape[2] == self.keys

    def once(self, given: tuple[Any, ...], make: Callable[[], T]) -> T:
        """Make something of the mask and these objects, or give what was made of the same ones before."""
        for others, result in self.made:
            if all(a is b for a, b in zip(given, others, strict=True)):
                return cast(T, result)
        self.made.append((given, make()))
        return cast(T, self.made[-1][1])


_ADDITIONS = (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor)


class CompactMask(Tensor):
    """A bool mask `[B, 1, L, S]` without storage. Any operation on it is done on the full tensor, made there and then.

    A model that slices, combines or moves the mask thus gets what it would get from the library's own mask; one that
    only hands it on (all the common ones) never pays for it.
    """

    known: KnownMask
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, known: KnownMask) -> CompactMask:
        """Wrap what is known as a tensor."""
        mask: CompactMask = Tensor._make_wrapper_subclass(cls, known.shape, dtype=torch.bool, device=known.device)
        mask.known = known
        return mask

    def __init__(self, known: KnownMask):
        pass

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]  # torch's keyword has no name in its stubs
        """Say what is known."""
        return f"CompactMask({self.known})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch annotates its placeholder, a plain function
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run `func` on the full tensor, which is the mask from here on (it may be written to)."""
        if func is torch.ops.aten.detach.default:  # what checkpointing does to everything it stores
            return cls(args[0].known)
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and kwargs.get("dtype", torch.bool) == torch.bool:
            return cls(args[0].known.to(kwargs.get("device", args[0].device)))  # between the devices of a split model
        if func in _ADDITIONS and any(isinstance(x, Tensor) and x.is_floating_point() for x in args):
            raise ValueError(
                "a bool attention mask is being added to scores: this model computes its attention itself, past "
                "attn_implementation='urform'; set 'eager'"
            )
        args, kwargs = tree_map_only(CompactMask, CompactMask.to_full, (args, kwargs))
        return func(*args, **kwargs)

    def to_full(self) -> Tensor:
        """Give the full tensor, always the same."""
        if self.known.full is None:
            self.known.full = self.known.build().contiguous()
        return self.known.full


def urform_mask(
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = masking_utils.causal_mask_function,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor:
    """Say what the library's bool mask `[B, 1, L, S]` says.

    Args:
        batch_size: B.
        q_length: L.
        kv_length: S.
        q_offset: index of the first query; a tensor for static caches.
        kv_offset: index of the first key.
        mask_function: says whether (batch, head, query index, key index) may attend.
        attention_mask: `[B, S]`, bool or integer, nonzero at real tokens.
        allow_is_causal_skip: the library lets None stand for causality. Never done: what it means is then up to the
            `is_causal` of each module, not always set, and a `CompactMask` costs nothing.
        allow_is_bidirectional_skip: the same for no mask at all.
        device: of the mask.
        kwargs: what other implementations read.

    Returns:
        A `CompactMask`; the full tensor under tracing and for what is not recognised.
    """
    full: Callable[[], Tensor] = partial(
        cast(Any, masking_utils.sdpa_mask),
        batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset,
        kv_offset=kv_offset, mask_function=mask_function, attention_mask=attention_mask, allow_is_causal_skip=False,
        allow_is_bidirectional_skip=False, device=device, **kwargs,
    )  # fmt: skip
    # One query's mask is small, and with a static cache it is made outside of a compiled graph that then takes it.
    if is_tracing(attention_mask) or (isinstance(q_offset, Tensor) and (q_length == 1 or is_tracing(q_offset))):
        return full()
    try:
        return CompactMask(_known(
            _recognise(mask_function), (batch_size, 1, q_length, kv_length), torch.device(device),
            int(q_offset) - kv_offset, kv_offset, attention_mask, full,
        ))  # fmt: skip
    except _Unknown as reason:
        logger.warning_once(f"attn_implementation='urform' builds a full attention mask: {reason}")
        return full()


class _Unknown(Exception):
    """The mask cannot be said by its parts; the text is the reason."""


@dataclass(frozen=True)
class _Pattern:
    """What a mask function says, in indices of rows; None: nothing."""

    causal: bool = False
    left: int | None = None
    right: int | None = None
    padding: Tensor | None = None
    documents: Tensor | None = None
    positions: Tensor | None = None  # what causality and window compare instead of indices

    def __and__(self, other: _Pattern) -> _Pattern:
        for name in ("padding", "documents", "positions"):
            if getattr(self, name) is not None and getattr(other, name) is not None:
                raise _Unknown(f"two {name} in one mask")
        left, right = (
            min((side for side in sides if side is not None), default=None)
            for sides in ((self.left, other.left), (self.right, other.right))
        )
        return _Pattern(
            self.causal or other.causal,
            left,
            right,
            *(
                getattr(self, name) if getattr(self, name) is not None else getattr(other, name)
                for name in ("padding", "documents", "positions")
            ),
        )


def _recognise(function: Callable[..., Any]) -> _Pattern:
    """Read a composition of the library's mask functions, which are known by their code and their closures."""
    if function is masking_utils.causal_mask_function:
        return _Pattern(causal=True)
    if function is masking_utils.bidirectional_mask_function:
        return _Pattern()
    kind = _KINDS.get(getattr(function, "__code__", None))
    if kind is None:
        name = f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', type(function).__name__)}"
        raise _Unknown(f"mask function {name} is not known")
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    held = {name: cell.cell_contents for name, cell in cells}
    if kind == "and":
        whole = _Pattern()
        for part in held["mask_functions"]:
            whole &= _recognise(part)
        return whole
    if kind == "remap":
        inner = _recognise(held["mask_function"])
        if not inner.padding is inner.documents is inner.positions is None:
            raise _Unknown("padding or documents inside remapped positions")
        return inner & _Pattern(positions=held["position_ids"])
    if kind == "left":
        return _Pattern(left=held["sliding_window"] - 1)
    if kind == "both":
        return _Pattern(left=held["sliding_window"], right=held["sliding_window"])
    if kind == "padding":
        return _Pattern(padding=held["padding_mask"])
    return _Pattern(documents=held["packed_sequence_mask"])


def _kinds() -> dict[Any, str]:
    """Return what each of the library's closures is, by its code object."""
    none = cast(Tensor, None)
    made = {
        "and": masking_utils.and_masks(),
        "left": masking_utils.sliding_window_overlay(1),
        "both": masking_utils.sliding_window_bidirectional_overlay(1),
        "padding": masking_utils.padding_mask_function(none),
        "documents": masking_utils.packed_sequence_mask_function(none),
    }
    if remap := getattr(masking_utils, "remap_positions_for_packed_sequence", None):  # later than transformers 5.17
        made["remap"] = remap(masking_utils.causal_mask_function, none)
    return {function.__code__: kind for kind, function in made.items()}


_KINDS = _kinds()


def _known(
    pattern: _Pattern,
    shape: tuple[int, int, int, int],
    device: torch.device,
    q_start: int,
    kv_offset: int,
    attention_mask: Tensor | None,
    build: Callable[[], Tensor],
) -> KnownMask:
    """Put pattern, 2D mask and offsets together, with one host read, or raise `_Unknown`."""
    batch, _, length, kv_length = shape
    keys = q_start + length if pattern.causal else kv_length
    in_reach = all(side is None or side >= max(keys, q_start + length) - 1 for side in (pattern.left, pattern.right))
    _check_extent(pattern, shape, q_start, keys, in_reach)
    padding = _padding(_both(attention_mask, pattern.padding), batch, kv_offset, keys)
    documents = None if pattern.documents is None else pattern.documents.expand(batch, -1)
    if is_tracing(padding) or is_tracing(documents):
        raise _Unknown("it is being traced")
    if pattern.positions is not None and documents is None:
        raise _Unknown("positions that do not follow the documents")
    has_padding = _read(padding, documents, pattern.positions, in_reach)
    return KnownMask(
        shape=shape,
        causal=pattern.causal,
        window=None if in_reach else (pattern.left, pattern.right),
        keys=keys,
        q_start=q_start,
        padding=padding if has_padding else None,
        documents=documents,
        device=device,
        build=build,
    )


def _check_extent(pattern: _Pattern, shape: tuple[int, int, int, int], q_start: int, keys: int, in_reach: bool) -> None:
    """Raise `_Unknown` where queries and keys do not lie as layouts can say; `in_reach`: the window hides nothing."""
    _, _, length, kv_length = shape
    square = q_start == 0 and length == keys
    if pattern.causal and (q_start < 0 or keys > kv_length):
        raise _Unknown("queries outside of the keys")
    if pattern.documents is not None and not square:
        raise _Unknown("packed documents with a past")
    if not in_reach and not pattern.causal and not square:
        raise _Unknown("a window between unequal queries and keys")


def _padding(mask: Tensor | None, batch: int, kv_offset: int, keys: int) -> Tensor | None:
    """Return which of the keys are real, bool `[B, keys]`, or raise `_Unknown`."""
    if mask is None:
        return None
    if mask.dim() != 2 or mask.shape[0] not in (1, batch):
        raise _Unknown("a padding mask that is not [batch, length]")
    if mask.shape[1] < kv_offset + keys:
        raise _Unknown("a padding mask shorter than the tokens")
    return mask[:, kv_offset : kv_offset + keys].expand(batch, -1) != 0


def _read(padding: Tensor | None, documents: Tensor | None, positions: Tensor | None, in_reach: bool) -> bool:
    """Return whether there is padding at all, or raise `_Unknown` for what layouts cannot say; one host read.

    Documents must be in one piece each, positions must restart where documents begin, and under a window the real
    tokens of a row must be neighbours.
    """
    answers: dict[str, Tensor] = {}
    if documents is not None:
        answers["whole"] = (documents.diff(dim=-1) >= 0).all()
    if documents is not None and positions is not None:
        steps = positions.expand(documents.shape[0], -1).diff(dim=-1) == 1
        answers["restart"] = ((documents.diff(dim=-1) == 0) == steps).all()
    if padding is not None:
        begins = padding[:, 1:] & ~padding[:, :-1]
        answers["all real"] = padding.all()
        answers["neighbours"] = (begins.sum(-1) + padding[:, 0] <= 1).all()
    if not answers:
        return False
    told = dict(zip(answers, torch.stack(list(answers.values())).tolist(), strict=True))
    if not told.get("restart", True):
        raise _Unknown("positions that do not follow the documents")
    if not told.get("whole", True):
        raise _Unknown("documents in pieces")
    if not in_reach and not told.get("neighbours", True):
        raise _Unknown("a window over padding between real tokens")
    return not told.get("all real", True)


def _both(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return a if b is None else b
    if a.shape != b.shape:
        raise _Unknown("two padding masks of unequal shapes")
    return (a != 0) & (b != 0)
