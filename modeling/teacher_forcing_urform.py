# Copyright 2026 The Urform authors. Licensed under the Apache License, Version 2.0.
"""Teacher forcing: what the decoder of an encoder-decoder reads in training, and which of it is real.

Shapes: B batch, L target length.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutput, ModelOutput

from ..configuration.configuration_urform import UrformConfig


def decoder_inputs(config: UrformConfig, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return what the decoder reads to predict `ids` `[B, L]`: `[start, x_0 .. x_{L-2}]` (teacher forcing).

    `mask` `[B, L]` says which tokens are real (None: all). In a left-padded row the start token stands at the first
    real place, so that the row is what it is without padding.

    Raises:
        ValueError: `decoder_start_token_id` or `pad_token_id` is None.
    """
    start, pad = config.decoder_start_token_id, config.pad_token_id
    if start is None or pad is None:
        name = "decoder_start_token_id" if start is None else "pad_token_id"
        raise ValueError(f"config.{name} is None, but the decoder's input is shifted with it; set it")
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    first: int | Tensor = start
    if config.decoder_start_from_labels:
        places = torch.arange(ids.shape[1], device=ids.device)
        last = (places * (real & (ids != -100) & (ids != pad))).amax(-1, keepdim=True)
        first = ids.gather(1, last)
    is_first = real & (real.cumsum(-1) == 1)
    shifted = torch.where(is_first, first, ids.roll(1, dims=-1)).masked_fill(~real, pad)
    return shifted.masked_fill(shifted == -100, pad)


def real_targets(labels: Tensor, given: bool, all_logits: bool) -> Tensor:
    """Return which target tokens are real, `[B, L]`: none after a row's last label, unless `all_logits` are read.

    No loss depends on what comes there. Unless the decoder's input is `given` with the labels, none before a row's
    first label is real either: left padding.
    """
    labelled = labels != -100
    real = torch.ones_like(labelled) if all_logits else labelled.flip(-1).cummax(-1).values.flip(-1)
    return (real if given else real & labelled.cummax(-1).values).long()


def as_output(encoder_outputs: ModelOutput | tuple[Any, ...]) -> Any:
    """Return an encoder's output, which may come as a tuple, by its names."""
    if isinstance(encoder_outputs, ModelOutput):
        return encoder_outputs
    names = ("last_hidden_state", "hidden_states", "attentions")
    return BaseModelOutput(**dict(zip(names, encoder_outputs, strict=False)))


def cover_prefix(mask: Tensor | None, cache: Cache, length: int) -> Tensor | None:
    """Return a mask of `length` targets that covers a trained prefix (PEFT) in the cache too, which is real."""
    if mask is None:
        return None
    missing = cache.get_seq_length() + length - mask.shape[1]
    return nn.functional.pad(mask, (max(missing, 0), 0), value=1)


def refuse_training(trains: bool) -> None:
    """Raise ValueError in a training step to which neither labels nor the decoder's input came."""
    if trains:
        raise ValueError(
            "neither labels nor decoder_input_ids came to a training step: Trainer takes the labels away under "
            "label_smoothing_factor or compute_loss_func; use DataCollatorForSeq2Seq(tokenizer, model=model), "
            "which makes decoder_input_ids of the labels, or UrformTrainer"
        )
