"""`urform doctor isolation`: does a model of transformers keep padding and packed documents out of its outputs?

The model is run, its code is not read: tokens that must not matter are replaced, and the outputs of the tokens that
must not notice are compared. Three numbers go with each answer:

- movement: how far those outputs moved (largest absolute difference);
- tolerance: what rounding explains, from the dtype and from running the same input twice;
- power: how far the same outputs move when a token changes that they are meant to see. A model that moves for nothing
  (zeroed, constant) is not called isolated: without power an answer is "inconclusive".

Rows are also compared with the same tokens run alone, which finds masks that are wrong without any content leaking.
The questions themselves are in `isolation_probe.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AutoModel, PreTrainedModel

from ..publishing.checkpoint_source import need_source
from .isolation_probe import CHECKS, ISOLATED, LEAKS, NOT_APPLICABLE, STATUSES, IsolationCheck, Probe, configs_of
from .reports import jsonable, table


@dataclass(frozen=True)
class IsolationReport:
    """What `check_isolation` found; `kind` is "encoder", "decoder" or "encoder-decoder"."""

    model: str
    kind: str
    attn_implementation: str
    dtype: str
    device: str
    checks: tuple[IsolationCheck, ...]

    @property
    def leaks(self) -> tuple[IsolationCheck, ...]:
        """The checks that found a leak."""
        return tuple(check for check in self.checks if check.status == LEAKS)

    @property
    def ok(self) -> bool:
        """Whether nothing leaks."""
        return not self.leaks

    def __getitem__(self, name: str) -> IsolationCheck:
        return next(check for check in self.checks if check.name == name)

    def to_dict(self) -> dict[str, Any]:
        """Return the report for JSON; an infinite movement (NaN in the outputs) becomes a string."""
        return jsonable({"ok": self.ok, **asdict(self)})

    def to_text(self) -> str:
        """Return the table and, below it, what was found and what to do."""
        rows = [["check", "status", "movement", "tolerance", "power", ""]]
        for c in self.checks:
            numbers = ("-" if x is None else f"{x:.1e}" for x in (c.movement, c.tolerance, c.power))
            rows.append([c.name, c.status, *numbers, c.detail if c.status == NOT_APPLICABLE else ""])
        lines = [
            f"{self.model}: {self.kind}, attn_implementation={self.attn_implementation!r}, {self.dtype} on "
            f"{self.device}",
            "",
            *table(rows),
        ]
        for c in self.checks:
            if c.status not in (ISOLATED, NOT_APPLICABLE):
                lines += ["", f"{c.name}: {c.status}: " + "; ".join(note for note in (c.where, c.detail) if note)]
                lines += [f"  -> {c.advice}"] if c.advice else []
        count = {s: sum(c.status == s for c in self.checks) for s in STATUSES}
        return "\n".join([*lines, "", ", ".join(f"{n} {status}" for status, n in count.items() if n)])


def check_isolation(
    model: PreTrainedModel | str,
    *,
    attn_implementation: str | None = None,
    checks: Sequence[str] | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    trust_remote_code: bool = False,
) -> IsolationReport:
    """Test whether padding, packed documents or later tokens change a model's outputs.

    An object comes back as it was: mode, attention implementation, weights. It is run where and as it is.

    Args:
        model: a model of transformers that reads `input_ids`, or the folder or Hub id of one.
        attn_implementation: the implementation to look at; None: the model's own.
        checks: names from `CHECKS`; None: all.
        dtype: for a folder or Hub id, "float32" (default), "bfloat16", "float16", or a torch dtype.
        device: for a folder or Hub id; None: the CPU.
        trust_remote_code: run the code that comes with a folder or Hub id.

    Raises:
        ValueError: an argument is wrong, the model cannot be loaded, does not take this attention implementation, or
            gives no hidden states or logits per token. Names argument, value, remedy.
    """
    for name in checks or ():
        if name not in CHECKS:
            raise ValueError(f"check {name!r} is unknown; use one of {sorted(CHECKS)}")
    _check_name(attn_implementation)
    if isinstance(model, PreTrainedModel):
        if dtype is not None or device is not None:
            raise ValueError("dtype and device are for a folder or a Hub id; an object is run as it is: use model.to()")
        name = type(model).__name__
    elif isinstance(model, nn.Module):
        raise ValueError(f"model is a {type(model).__name__}, not a PreTrainedModel of transformers; pass one of those")
    else:
        name, model = str(model), _load(str(model), attn_implementation, dtype, device, trust_remote_code)
    with _as_probed(model, attn_implementation), torch.no_grad():
        probe = Probe(model)
        answers = probe.answers(list(CHECKS) if checks is None else checks)
        return IsolationReport(
            name,
            probe.kind,
            str(model.config._attn_implementation),
            str(model.dtype).removeprefix("torch."),
            str(probe.device),
            answers,
        )


def _check_name(attn_implementation: str | None) -> None:
    known = sorted({"eager", *AttentionInterface().valid_keys()})
    if attn_implementation is not None and attn_implementation not in known and "/" not in attn_implementation:
        raise ValueError(
            f"attn_implementation={attn_implementation!r} is not known to transformers; use one of "
            f"{known}, or the Hub id of a kernel"
        )


def _load(
    name: str,
    attn_implementation: str | None,
    dtype: str | torch.dtype | None,
    device: str | torch.device | None,
    trust_remote_code: bool,
) -> PreTrainedModel:
    wanted = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype or torch.float32
    if not isinstance(wanted, torch.dtype) or not wanted.is_floating_point:
        raise ValueError(f"dtype={dtype!r} is not a floating dtype of torch; use 'float32', 'bfloat16' or 'float16'")
    try:
        place = torch.device(device or "cpu")
    except RuntimeError as error:
        raise ValueError(f"device={device!r} is not a device of torch; use 'cpu' or 'cuda'") from error
    try:
        need_source(name)
        model = AutoModel.from_pretrained(
            name, attn_implementation=attn_implementation, dtype=wanted, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, ImportError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        asked = "" if attn_implementation is None else f" with attn_implementation={attn_implementation!r}"
        raise ValueError(
            f"model={name!r} could not be loaded{asked} ({' '.join(lines[:2])}); give the folder of a "
            "saved model (with its config.json) or a Hub id"
        ) from error
    return model.to(place)


@contextmanager
def _as_probed(model: PreTrainedModel, attn_implementation: str | None) -> Iterator[None]:
    """Set evaluation mode and the wanted attention; restore both afterwards."""
    modes = {module: module.training for module in model.modules()}
    before = [(config, config._attn_implementation_internal) for config in configs_of(model)]
    try:
        if attn_implementation is not None:
            _set_attention(model, attn_implementation)
        model.eval()
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation_internal = implementation
        for module, training in modes.items():
            module.training = training


def _set_attention(model: PreTrainedModel, attn_implementation: str) -> None:
    """Set the attention; refuse where it has no effect: older classes bring their own attention and ignore others."""
    old, own = model.config._attn_implementation, ("eager", "sdpa", "flash_attention_2")
    try:
        if attn_implementation != old:
            model.set_attn_implementation(attn_implementation)
    except (ValueError, ImportError, OSError) as error:
        raise ValueError(
            f"attn_implementation={attn_implementation!r} cannot be set on {type(model).__name__}: {error}"
        ) from error
    fixed = attn_implementation not in own and not model._can_set_attn_implementation()
    if fixed or (attn_implementation != old and model.config._attn_implementation == old):
        raise ValueError(
            f"attn_implementation={attn_implementation!r} has no effect on {type(model).__name__}, whose "
            "code does not use AttentionInterface; leave the argument out to look at its own "
            "attention"
        )
