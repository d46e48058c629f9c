# Copyright 2026 The Urform authors. Licensed under the Apache License, Version 2.0.
"""Tensors by the tables of `families.py`, both ways: which become which, from the names and shapes of both sides.

A tensor without a rule, and a rule without its tensor, is an error.
"""

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..configuration.configuration_urform import UrformConfig
from .family import COPY, TWICE, Family, Fill, Head, Op, Rule, Shapes, Tensors

SOURCE_WEIGHTS = "source_weights."  # the module of ours that holds what is only kept

Transform = Callable[[Tensors, Shapes, UrformConfig], Tensors]
Instance = tuple[Rule, tuple[str, ...], tuple[str, ...]]  # a rule for one layer, names there, names here


class Step(NamedTuple):
    """One rule for one layer: read `sources`, apply `op`, write `targets` of these shapes.

    One side may be empty: `targets` are filled with `fill`, or `sources` must be full of it and are left behind.
    """

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    op: Transform
    fill: Fill | None = None


class Side(NamedTuple):
    """The tensors of a model.

    Name to shape; name to the names that share its storage (itself among them); the prefix of the backbone; and, where
    a checkpoint differs, name to the name under which it is saved (None: not at all).
    """

    shapes: dict[str, torch.Size]
    tied: dict[str, tuple[str, ...]]
    prefix: str
    saved: Mapping[str, str | None] = {}

    def shapes_of(self, names: Sequence[str]) -> tuple[torch.Size, ...]:
        """Return the shapes of tensors in the order of their names."""
        return tuple(self.shapes[name] for name in names)

    def holding(self, tensors: Mapping[str, torch.Size]) -> "Side":
        """Return the side with further tensors, which a checkpoint has and the class lacks."""
        alone = {name: (name,) for name in tensors if name not in self.tied}
        return self._replace(shapes={**tensors, **self.shapes}, tied={**alone, **self.tied})

    @classmethod
    def of(cls, model: PreTrainedModel, untied: Collection[str] = ()) -> "Side":
        """Return the side of a model on any device, meta too; `untied` names tensors that count as not shared."""
        tensors = model.state_dict(keep_vars=True)
        groups: dict[Any, list[str]] = {}
        for name, tensor in tensors.items():
            groups.setdefault(name if name in untied else id(tensor), []).append(name)
        prefix = model.base_model_prefix
        saved = {name: source for name, source in model.all_tied_weights_keys.items() if name not in untied}
        return cls(
            {name: tensor.shape for name, tensor in tensors.items()},
            {name: tuple(group) for group in groups.values() for name in group},
            f"{prefix}." if prefix and hasattr(model, prefix) else "",
            {**saved, **dict.fromkeys(model._keys_to_ignore_on_save or ())},
        )


def is_dropped(head: Head, name: str) -> bool:
    """Check whether a stock tensor has no place here, by the table."""
    return any(re.fullmatch(pattern, name) for pattern in head.dropped)


def _instances(family: Family, head: Head, config: UrformConfig, stock: Side, ours: Side) -> Iterator[Instance]:
    """Yield every rule for every layer."""
    layers = max(config.num_hidden_layers, config.decoder_num_hidden_layers or 0)
    for rules, there, here in ((family.weights, stock.prefix, ours.prefix), (head.weights, "", "")):
        for rule in rules:
            for layer in range(layers if rule.names(0) != rule.names(1) else 1):
                theirs, own = rule.names(layer)
                yield rule, tuple(there + name for name in theirs), tuple(here + name for name in own)


def _that_apply(
    instances: Iterator[Instance],
    stock: Side,
    ours: Side,
    kept: Collection[str],
    reorder: bool,
) -> Iterator[Instance]:
    """Yield the rules whose tensors both sides have. Where ours lacks them and they can be filled, its names are ().

    Args:
        instances: Every rule for every layer.
        stock: The tensors there.
        ours: The tensors here.
        kept: Names there of tensors that are only kept here.
        reorder: Whether the features of the residual stream change their order.
    """
    for rule, theirs, own in instances:
        if rule.op is TWICE and theirs[1] in kept:
            rule, theirs = replace(rule, op=COPY), theirs[:1]
        if reorder:
            rule = replace(rule, op=_reordered(rule.op, own))
        here = all(name in ours.shapes for name in own)
        if all(name in stock.shapes for name in theirs) and (here or rule.fill is not None):
            yield rule, theirs, own if here else ()


def _copy(source: str, target: str, side: Side) -> Step:
    return Step((source,), (target,), side.shapes_of((target,)), COPY.to_ours)


def plan(
    family: Family,
    head: Head,
    config: UrformConfig,
    stock: Side,
    ours: Side,
    *,
    back: bool,
    kept: Mapping[str, str],
) -> list[Step]:
    """Return which tensors become which; `back` is the way from Urform to the stock class.

    Args:
        family: The family.
        head: The class.
        config: Our config.
        stock: The tensors there.
        ours: The tensors here.
        back: The direction.
        kept: {name there: name here} of tensors that are only kept here.

    Raises:
        ValueError: A tensor of either side has no rule: the table is incomplete.
    """
    dropped = {name for name in stock.shapes if is_dropped(head, name)}
    left_theirs = stock.shapes.keys() - dropped
    left_ours = {name for name in ours.shapes if SOURCE_WEIGHTS not in name}
    steps: list[Step] = []
    rules = _instances(family, head, config, stock, ours)
    for rule, theirs, own in _that_apply(rules, stock, ours, kept, family.reorders(config)):
        if back:
            step, left = Step(own, theirs, stock.shapes_of(theirs), rule.op.to_stock, rule.fill), left_theirs
        else:
            step, left = Step(theirs, own, ours.shapes_of(own), rule.op.to_ours, rule.fill), left_ours
        if not step.targets or left.intersection(step.targets):  # else written already, under a tied tensor's name
            steps.append(step)
        left_theirs.difference_update(*(stock.tied[name] for name in theirs))
        left_ours.difference_update(*(ours.tied[name] for name in own))
    placed = stock.shapes.keys() - left_theirs - dropped  # by a rule
    for name in sorted(kept.keys() - placed):
        steps.append(_copy(kept[name], name, stock) if back else _copy(name, kept[name], ours))
    left_theirs -= kept.keys()
    if left_theirs or left_ours:
        raise ValueError(
            f"the table of the family {family.model_type!r} has no rule for {sorted(left_theirs)} of {head.stock} and "
            f"{sorted(left_ours)} of {head.ours}"
        )
    return steps


_FEATURES = (  # which axis of our tensors is the residual stream's
    (re.compile(r"(embed_tokens|lm_head|[qkv]_proj|up_proj|gate_proj)\.weight"), 1),
    (re.compile(r"(o_proj|down_proj|norm)\.(weight|bias)"), 0),
)


def _reordered(op: Op, names: Sequence[str]) -> Op:
    """Return the op between our tensors (`names`), whose features alternate, and stock ones with features in halves."""
    axes = [next((axis for name, axis in _FEATURES if name.search(own)), None) for own in names]

    def halve(tensors: Tensors, shapes: Shapes, config: UrformConfig) -> Tensors:
        order = torch.arange(config.hidden_size).reshape(-1, 2).T.flatten()
        return op.to_stock(_select(tensors, axes, order), shapes, config)

    def alternate(tensors: Tensors, shapes: Shapes, config: UrformConfig) -> Tensors:
        order = torch.arange(config.hidden_size).reshape(2, -1).T.flatten()
        return _select(op.to_ours(tensors, shapes, config), axes, order)

    return Op(alternate, halve)


def _select(tensors: Tensors, axes: Sequence[int | None], order: Tensor) -> Tensors:
    return [
        tensor if axis is None else tensor.index_select(axis, order.to(tensor.device))
        for tensor, axis in zip(tensors, axes, strict=True)
    ]


def run_step(step: Step, read: Callable[[str], Tensor], config: UrformConfig) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a step by name. Its rule makes them of the sources, which `read` returns by name.

    Raises:
        ValueError: A tensor has another shape than the config says, or should be constant and is not.
    """
    sources = [read(name) for name in step.sources]
    if step.fill is not None and not (sources and step.targets):
        for name, tensor in zip(step.sources, sources, strict=False):
            if not torch.allclose(tensor.float(), _full(tensor.shape, step.fill), atol=torch.finfo(tensor.dtype).eps):
                what = step.fill if isinstance(step.fill, float) else "what its class makes of it"
                raise ValueError(f"{name} is not {what} throughout, but Urform's config has no such tensor")
        yield from ((name, _full(shape, step.fill)) for name, shape in zip(step.targets, step.shapes, strict=True))
        return
    for name, shape, tensor in zip(step.targets, step.shapes, step.op(sources, step.shapes, config), strict=True):
        if tensor.shape != shape:
            raise ValueError(f"{name} comes out as {list(tensor.shape)}, the config says {list(shape)}")
        yield name, tensor


def _full(shape: torch.Size, fill: Fill) -> Tensor:
    return torch.full(shape, fill) if isinstance(fill, float) else fill(shape)


def reader(state: Mapping[str, Tensor], side: Side) -> Callable[[str], Tensor]:
    """Return a function that reads a tensor of a side from `state`, under any of the tied names."""

    def read(name: str) -> Tensor:
        found = [twin for twin in dict.fromkeys((name, *side.tied[name])) if twin in state]
        if not found:
            raise ValueError(f"the weights lack {name}; the checkpoint is incomplete or of another class")
        tensor = state[found[0]]
        for twin, other in ((twin, state[twin]) for twin in found[1:]):
            if other.data_ptr() != tensor.data_ptr() and not torch.equal(other, tensor):
                raise ValueError(
                    f"{found[0]} and {twin} are one tensor by the config but differ; make them equal, or set "
                    "tie_word_embeddings=False if they are meant to differ"
                )
        return tensor

    return read
