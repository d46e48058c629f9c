# Copyright 2026 The Urform authors. Licensed under the Apache License, Version 2.0.
"""transformers' caches, under both of their names: `past_key_values` up to 5.23, `cache` from 5.24 on."""

import warnings
from typing import Any

import torch
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast, ModelOutput

#: The name of the library's own keyword and output field.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


def given_cache(past_key_values: Cache | None, cache: Cache | None) -> Cache | None:
    """Return the cache that a caller gave under either name.

    Raises:
        ValueError: both names hold a cache, and not the same one.
    """
    if past_key_values is not None and cache is not None and past_key_values is not cache:
        raise ValueError("past_key_values and cache are two names of one argument; give one of them")
    if past_key_values is not None and CACHE == "cache" and not torch.compiler.is_compiling():
        warnings.warn(
            "`past_key_values` is deprecated in transformers. Use `cache` instead.", FutureWarning, stacklevel=3
        )
    return cache if past_key_values is None else past_key_values


def cache_field(cache: Cache | None) -> dict[str, Any]:
    """Return the output field that holds the cache, by the name that this transformers gives it."""
    return {CACHE: cache}


def cache_of(outputs: ModelOutput) -> Cache | None:
    """Return the cache in a model's outputs."""
    return getattr(outputs, CACHE, None)
