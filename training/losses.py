"""The label-smoothed loss of models that do not smooth their own, and the inputs that a loss outside the model needs.

Trainer takes the labels away before the model sees them whenever the loss is computed outside the model. An
encoder-decoder makes its decoder's inputs from the labels, so `with_decoder_inputs` makes them first.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ..modeling.modeling_urform import UrformLanguageModel
from ..modeling.teacher_forcing_urform import decoder_inputs, real_targets

__all__ = ["SmoothedCrossEntropy", "predicts_next_token", "with_decoder_inputs", "without_adapters"]


class SmoothedCrossEntropy:
    """Label-smoothed cross-entropy (Szegedy et al. 2016, arXiv:1512.00567, section 7), a mean over the update's tokens.

    Under `torch.no_grad` (evaluation) it is the plain negative log-likelihood: smoothing regularises training, and a
    validation loss that contains it cannot be compared between runs.

    Args:
        smoothing: Probability mass spread evenly over the whole vocabulary, as `torch.nn.functional.cross_entropy`
            defines it.
        shift: True for a causal model, where position i predicts label i+1.
    """

    def __init__(self, smoothing: float, shift: bool = False) -> None:
        if not 0 <= smoothing < 1:
            raise ValueError(f"label_smoothing_factor must be in [0, 1), got {smoothing}")
        self.smoothing = smoothing
        self.shift = shift

    def __call__(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        logits: Tensor = outputs["logits"] if isinstance(outputs, dict) else outputs[0]  # [B, L, V]
        if self.shift:
            logits, labels = logits[:, :-1], labels[:, 1:]
        labels = labels.to(logits.device).flatten()
        total = F.cross_entropy(
            logits.flatten(0, -2).to(torch.promote_types(logits.dtype, torch.float32)),
            labels,
            reduction="sum",
            label_smoothing=self.smoothing if torch.is_grad_enabled() else 0.0,
        )
        count = labels.ne(-100).sum() if num_items_in_batch is None else num_items_in_batch
        return total / torch.as_tensor(count, device=logits.device)


def without_adapters(model: Any) -> Any:
    """Return the model inside PEFT's wrapper, or the model itself if it has no adapters."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def predicts_next_token(model: Any) -> bool:
    """Return whether position i of the model's logits predicts label i+1."""
    name = type(model).__name__
    is_causal = "CausalLM" in name or name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    return is_causal and not model.config.is_encoder_decoder


def with_decoder_inputs(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """Return the inputs with the decoder inputs that an encoder-decoder makes from its labels.

    Args:
        model: Any model, with or without adapters. Only an encoder-decoder's inputs change.
        inputs: A batch. It stays as it is if it has no labels, or has decoder inputs already.

    Raises:
        ValueError: If the model has no method that makes decoder inputs from labels.
    """
    model = without_adapters(model)
    labels = inputs.get("labels")
    if labels is None or not getattr(model.config, "is_encoder_decoder", False):
        return inputs
    if any(inputs.get(name) is not None for name in ("decoder_input_ids", "decoder_inputs_embeds")):
        return inputs
    if isinstance(model, UrformLanguageModel):
        mask = inputs.get("decoder_attention_mask")
        mask = real_targets(labels, given=False, all_logits=True) if mask is None else mask
        made = {"decoder_input_ids": decoder_inputs(model.config, labels, mask), "decoder_attention_mask": mask}
    elif hasattr(model, "prepare_decoder_input_ids_from_labels"):
        made = {"decoder_input_ids": model.prepare_decoder_input_ids_from_labels(labels=labels)}
    else:
        raise ValueError(
            f"{type(model).__name__} cannot make decoder_input_ids from its labels, which label_smoothing_factor and "
            "compute_loss_func need: use a data collator that adds decoder_input_ids"
        )
    return {**inputs, **made}
