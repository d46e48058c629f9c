# Copyright 2026 The Urform authors. Licensed under the Apache License, Version 2.0.
"""What a field of `UrformConfig` may be, before anything is made of it: bounds, finite numbers, ids, rotary parameters.

A function checks one kind of field and raises a ValueError with the field, its value and what to do. `Filled` is the
type of a field that may be given as None and is never read as None.
"""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch

T = TypeVar("T")
if TYPE_CHECKING:

    class Filled(Generic[T]):
        """A field that may be given as None and that the config fills in: a reader never finds None."""

        def __get__(self, config: Any, owner: Any) -> T: ...
        def __set__(self, config: Any, value: T | None) -> None: ...

else:

    class Filled:
        """What `@strict` checks: `Filled[int]` is `int | None`."""

        def __class_getitem__(cls, kind: Any) -> Any:
            return kind | None


# At least ten times the largest that was ever published, so that a typing error or a forged file costs neither memory
# nor time: DeepNet has 1,000 layers (Wang et al. 2022), XLM-V 10**6 tokens (Liang et al. 2023), MT-NLG 20,480 features
# and 128 heads (Smith et al. 2022), Gemma 3 heads of 256, Llama 4 trains for 10**7 positions.
LARGEST = {
    "num_hidden_layers": 10**4,
    "num_attention_heads": 10**4,
    "num_key_value_heads": 10**4,
    "head_dim": 10**4,
    "intermediate_size": 10**7,
    "hidden_size": 10**6,
    "vocab_size": 10**7,
    "max_position_embeddings": 10**8,
    "position_offset": 10**8,
    "sliding_window": 10**8,
    "type_vocab_size": 10**6,
    "relative_attention_num_buckets": 10**6,
    "relative_attention_max_distance": 10**8,
    "num_labels": 10**7,
}
_LEAST = {"position_offset": 0, "type_vocab_size": 0}
_WEIGHTS = 10**5  # of `source_weights`: ten for each layer of the deepest model
_NESTED = 50  # of JSON: a config's deepest is four
_FLOAT32 = torch.finfo(torch.float32)
_ROPE_NEEDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "proportional": (),
    "yarn": ("factor", "original_max_position_embeddings"),
    "longrope": ("short_factor", "long_factor", "original_max_position_embeddings"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
_ROPE_POSITIVE = (
    "rope_theta factor attention_factor original_max_position_embeddings low_freq_factor high_freq_factor "
    "beta_fast beta_slow"
).split()


def filled(value: T | None) -> T:
    """Return the value of a field that is None only where the config's other fields make it meaningless.

    Raises:
        ValueError: It is None: the config was not made by its class.
    """
    if value is None:
        raise ValueError("a field that UrformConfig fills in is None; make the config with UrformConfig(...)")
    return value


def check_object(value: Any, where: str) -> None:
    """Check that a value is a dict, at most as deep as a config or an index may be."""
    if not isinstance(value, dict):
        raise ValueError(f"{where} holds a {type(value).__name__} where an object is expected; repair it")
    check_nesting(value, where)


def check_nesting(value: Any, where: str) -> None:
    """Check that dicts and lists in each other are at most 50 deep; without recursion."""
    level = [value]
    for _ in range(_NESTED):
        inner = [part.values() if isinstance(part, dict) else part for part in level if isinstance(part, dict | list)]
        level = [entry for part in inner for entry in part]
        if not level:
            return
    raise ValueError(f"{where} is nested more than {_NESTED} deep; repair it")


def check_architectures(names: Any) -> None:
    """Check a list of names of classes, or None."""
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise ValueError(f'architectures={names!r} must be a list of names of classes, e.g. ["UrformForCausalLM"]')


def check_size(name: str, value: Any) -> None:
    """Check an integer from 1 (0 where it means none) to the largest of its kind; None passes."""
    largest = LARGEST[name.removeprefix("decoder_")]
    least = _LEAST.get(name, 1)
    if value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= largest:
        kind = "a positive integer" if least else "an integer that is not negative"
        raise ValueError(f"{name}={value!r} must be {kind}, at most {largest:,}; correct it")


def check_number(name: str, value: Any, least: float | None = None, below: float | None = None) -> None:
    """Check a number that float32 holds; None passes.

    It has to be at least `least` and less than `below`. `least=0.0` without `below` asks for a positive number.
    """
    if value is None:
        return
    wide = isinstance(value, int | float) and abs(value) <= _FLOAT32.max  # so no NaN
    if not wide:
        raise ValueError(f"{name}={value!r} must be a finite number that float32 holds; correct it")
    if below is not None and not (least or 0.0) <= value < below:
        raise ValueError(f"{name}={value!r} must be at least {least} and less than {below}; correct it")
    if below is None and least is not None and value < _FLOAT32.tiny:
        raise ValueError(f"{name}={value!r} must be positive and no less than {_FLOAT32.tiny:.2g}; correct it")


def check_token_id(name: str, value: Any, vocab_size: int) -> None:
    """Check one id, or for `eos_token_id` several; each of them has to be a row of the table."""
    ids = value if isinstance(value, list) else [value]
    if not ids or any(not isinstance(i, int) or not 0 <= i < vocab_size for i in ids if value is not None):
        raise ValueError(
            f"{name}={value!r} must be from 0 to {vocab_size - 1} (vocab_size={vocab_size}), or None; correct it or "
            "vocab_size"
        )


def check_source_weights(tensors: Mapping[str, Any]) -> None:
    """Check a table from names of tensors to the name of a dtype and a shape."""
    if len(tensors) > _WEIGHTS:
        raise ValueError(f"source_weights names {len(tensors):,} tensors, at most {_WEIGHTS:,} are kept; leave it out")
    for name, entry in tensors.items():
        dtype, shape = entry if len(entry) == 2 else (None, None)
        known = isinstance(dtype, str) and isinstance(getattr(torch, dtype, None), torch.dtype)
        sizes = [n for n in shape if isinstance(n, int) and n >= 0] if isinstance(shape, list) else None
        if not known or sizes != shape or math.prod(sizes or [1]) > LARGEST["vocab_size"] * LARGEST["hidden_size"]:
            raise ValueError(f"source_weights[{name!r}]={entry!r} must be [dtype, shape]; leave source_weights out")


def check_dtype(dtype: Any) -> None:
    """Check a dtype: one in which a model can be trained, or None."""
    known = {str(d).removeprefix("torch."): d for d in (torch.float64, torch.float32, torch.float16, torch.bfloat16)}
    if dtype is not None and dtype not in known.values() and str(dtype).removeprefix("torch.") not in known:
        raise ValueError(f"dtype={dtype!r} is no dtype of a model; use one of {', '.join(known)}")


def check_rope(parameters: Any, where: str, head_dim: int) -> None:
    """Check the rotary parameters of one layer type: known, complete, positive, as many factors as frequencies."""
    kind = parameters.get("rope_type", parameters.get("type", "default")) if isinstance(parameters, dict) else None
    if kind not in _ROPE_NEEDS:
        raise ValueError(f"{where}={parameters!r} must be a dict whose rope_type is one of {', '.join(_ROPE_NEEDS)}")
    lacks = [name for name in _ROPE_NEEDS[kind] if name not in parameters]
    if lacks:
        raise ValueError(f"{where} of rope_type={kind!r} lacks {', '.join(lacks)}; add it")
    for name in _ROPE_POSITIVE:
        check_number(f"{where}[{name!r}]", parameters.get(name), 0.0)
    rotated = _rotated_features(parameters, where, kind, head_dim)
    if kind == "longrope":
        _check_longrope(parameters, where, (rotated + 1) // 2)
    if kind == "yarn" and parameters.get("rope_theta") == 1.0:
        raise ValueError(f"{where}['rope_theta']=1.0 gives rope_type='yarn' no frequencies; use more than 1")
    if kind == "llama3" and parameters["high_freq_factor"] <= parameters["low_freq_factor"]:
        raise ValueError(f"{where}['high_freq_factor'] must be more than its low_freq_factor; correct one of them")


def _rotated_features(parameters: dict[str, Any], where: str, kind: str, head_dim: int) -> int:
    """Return how many of a head's features are rotated; ValueError where there are too few or too many."""
    part = parameters.get("partial_rotary_factor", 1.0)
    check_number(f"{where}['partial_rotary_factor']", part, 0.0)
    rotated = int(head_dim * part)
    if not (1 if kind in ("default", "linear") else 2) <= rotated <= head_dim:
        raise ValueError(f"{where}['partial_rotary_factor']={part} rotates {rotated} of head_dim={head_dim} features")
    if kind == "dynamic" and rotated < 4:
        raise ValueError(f"{where} of rope_type='dynamic' needs at least 4 rotated features; there are {rotated}")
    return rotated


def _check_longrope(parameters: dict[str, Any], where: str, frequencies: int) -> None:
    for name in ("short_factor", "long_factor"):
        factors = parameters[name]
        if not isinstance(factors, list) or len(factors) != frequencies:
            length = len(factors) if isinstance(factors, list) else repr(factors)
            raise ValueError(
                f"{where}[{name!r}] must be a list of {frequencies} numbers, one for each pair of rotated features, "
                f"and is {length}; correct it"
            )
        for i, factor in enumerate(factors):
            check_number(f"{where}[{name!r}][{i}]", factor, 0.0)
    if parameters["original_max_position_embeddings"] < 2 and parameters.get("attention_factor") is None:
        raise ValueError(
            f"{where}['original_max_position_embeddings']={parameters['original_max_position_embeddings']} must be at "
            "least 2 under rope_type='longrope'"
        )
