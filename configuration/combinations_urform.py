# Copyright 2026 The Urform authors. Licensed under the Apache License, Version 2.0.
"""Which fields of `UrformConfig` go together: `check_combinations`, a part of its validation.

A function checks the fields of one part of the model and raises a ValueError with the fields, their values and what to
do. What a field may be by itself is checked in `checks_urform.py`.
"""

from typing import Any, NamedTuple

DECODER_SIZES = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size")


class StackSizes(NamedTuple):
    """The sizes of one stack (encoder or decoder), resolved."""

    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    layer_types: list[str]


def need(condition: bool, message: str) -> None:
    """Raise a ValueError with `message` unless `condition` holds."""
    if not condition:
        raise ValueError(message)


def check_combinations(config: Any) -> None:
    """Check what may go with what in a `UrformConfig` whose sizes are resolved."""
    _check_decoder_fields(config)
    for decoder in {False, config.is_encoder_decoder}:
        _check_stack(config, "decoder_" if decoder else "", config.stack_sizes(decoder))
    _check_input(config)
    _check_relative_buckets(config)
    _check_position_counting(config)
    _check_outputs(config)


def _check_decoder_fields(config: Any) -> None:
    if config.architecture == "encoder-decoder":
        need(
            config.position_encoding != "rope" or config.decoder_head_dim == config.head_dim,
            f"decoder_head_dim={config.decoder_head_dim} must equal head_dim={config.head_dim} under "
            'position_encoding="rope": the rotary table is one',
        )
        return
    for name in (*DECODER_SIZES, "layer_types"):
        value = getattr(config, f"decoder_{name}")
        need(
            value is None,
            f"decoder_{name}={value} is for architecture='encoder-decoder'; this is "
            f"architecture={config.architecture!r}: use {name}",
        )


def _check_stack(config: Any, prefix: str, sizes: StackSizes) -> None:
    heads, groups = sizes.num_attention_heads, sizes.num_key_value_heads
    need(
        heads % groups == 0,
        f"{prefix}num_key_value_heads={groups} must divide {prefix}num_attention_heads={heads}",
    )
    need(
        len(sizes.layer_types) == sizes.num_hidden_layers
        and set(sizes.layer_types) <= {"full_attention", "sliding_attention"},
        f"{prefix}layer_types={sizes.layer_types} must name 'full_attention' or 'sliding_attention' for each of "
        f"the {sizes.num_hidden_layers} layers of {prefix}num_hidden_layers",
    )
    need(
        "sliding_attention" not in sizes.layer_types or (config.sliding_window or 0) > 0,
        f"{prefix}layer_types has 'sliding_attention', but sliding_window={config.sliding_window}; set it to a "
        "positive number of tokens",
    )
    if config.position_encoding == "rope":
        need(
            sizes.head_dim % 2 == 0,
            f"{prefix}head_dim={sizes.head_dim} must be even under position_encoding='rope': it rotates pairs",
        )
        if config.rope_is_per_layer_type:
            missing = set(sizes.layer_types) - set(config.rope_parameters or {})
            need(not missing, f"rope_parameters lacks an entry for the layer types {sorted(missing)}")
    if config.position_encoding == "sinusoidal":
        need(
            config.hidden_size % 2 == 0,
            f"hidden_size={config.hidden_size} must be even under position_encoding='sinusoidal': sine and cosine "
            "come in pairs",
        )


def _check_input(config: Any) -> None:
    need(
        config.type_vocab_size == 0 or config.architecture == "encoder",
        f"type_vocab_size={config.type_vocab_size} is for architecture='encoder'; set it to 0",
    )
    need(
        config.first_norm or config.norm_position in ("pre", "sandwich"),
        f"first_norm=False leaves the norm before the first layer out, which norm_position={config.norm_position!r} "
        "does not allow; set it to True",
    )


def _check_relative_buckets(config: Any) -> None:
    if config.position_encoding != "t5":
        return
    least = 2 if config.architecture == "decoder" else 4
    buckets, farthest = config.relative_attention_num_buckets, config.relative_attention_max_distance
    need(
        buckets >= least and farthest > buckets // (4 if config.architecture == "encoder" else 2),
        f"relative_attention_num_buckets={buckets} and relative_attention_max_distance={farthest} leave no "
        f"logarithmic buckets; use at least {least} buckets and a larger distance",
    )


def _check_position_counting(config: Any) -> None:
    need(
        config.position_counting == "mask" or config.position_encoding in ("learned", "sinusoidal"),
        f"position_counting={config.position_counting!r} is for learned and sinusoidal positions; this is "
        f'position_encoding={config.position_encoding!r}: set it to "mask"',
    )
    need(
        config.position_counting != "tokens" or config.pad_token_id is not None,
        'position_counting="tokens" counts tokens other than pad_token_id, which is None; set it',
    )
    need(
        config.position_counting != "tokens" or config.position_encoding != "learned" or config.position_offset > 0,
        'position_counting="tokens" puts the pad token at position_offset - 1; '
        f"position_offset={config.position_offset} must be positive",
    )


def _check_outputs(config: Any) -> None:
    need(
        config.classifier_activation is not None or not (config.classifier_norm or config.token_classifier_dense),
        "classifier_norm and token_classifier_dense belong to a dense layer, but classifier_activation is None; "
        "set it to an activation",
    )
    need(
        not config.lm_head_transform or config.architecture == "encoder",
        "lm_head_transform=True is the masked-LM head of architecture='encoder'; set it to False",
    )
