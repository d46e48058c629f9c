# Copyright 2026 The Urform authors. Licensed under the Apache License, Version 2.0.
"""What is given to `UrformConfig` besides its fields: `check_unknown` tells the library's own keys from mistakes."""

import difflib
from collections.abc import Collection
from typing import Any

from transformers import GenerationConfig
from transformers.utils import logging

logger = logging.get_logger(__name__)

# What transformers itself may pass to or write into any config besides the fields.
LIBRARY_KEYS = frozenset(
    "model_type name_or_path torch_dtype num_labels output_attentions attn_implementation experts_implementation "
    "rope_theta rope_scaling partial_rotary_factor auto_map tokenizer_class quantization_config custom_pipelines "
    "task_specific_params finetuning_task trust_remote_code tie_last_hidden_states per_layer_config".split()
)

# What transformers reads of any config that has it, which no field of Urform's means: refused, never taken for a field
# without effect.
READ_BY_LIBRARY = frozenset(
    "is_causal attention_chunk_size kv_sharing_modes num_kv_shared_layers original_max_position_embeddings "
    "token_classification_bias text_config text_encoder".split()
)


def check_unknown(given: dict[str, Any], fields: Collection[str]) -> None:
    """Check what is given besides the fields; keys of `READ_BY_LIBRARY` without a value are taken out of `given`.

    A field that does not exist is an error from a caller, and a warning from a saved file, which a newer Urform may
    have written.

    Args:
        given: The keyword arguments that are no fields.
        fields: The names of the fields.

    Raises:
        ValueError: A field that does not exist, or that transformers would read and Urform does not have.
    """
    for key in sorted(READ_BY_LIBRARY & given.keys()):
        value = given.pop(key)
        if value is not None:
            remedy = " and set it in rope_parameters" if key.startswith("original") else ""
            raise ValueError(
                f"{key}={value!r} is no field of UrformConfig, but transformers reads it; leave it out{remedy}"
            )
    generation = GenerationConfig._get_default_generation_params()
    unknown = [k for k in given if not k.startswith("_") and k not in LIBRARY_KEYS and k not in generation]
    if unknown and "model_type" in given:
        logger.warning_once(f"UrformConfig knows no field {', '.join(sorted(unknown))}; kept, but without effect")
    elif unknown:
        near = difflib.get_close_matches(unknown[0], fields, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "see help(UrformConfig) for the fields there are"
        raise ValueError(f"UrformConfig has no field {unknown[0]!r} (given {given[unknown[0]]!r}); {hint}")
