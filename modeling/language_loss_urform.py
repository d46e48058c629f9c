# Copyright 2026 The Urform authors. Licensed under the Apache License, Version 2.0.
"""The loss of a language model, computed from hidden states without ever holding all logits.

Shapes: B batch, L length, E hidden, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ..configuration.configuration_urform import UrformConfig
from .kernels.loss_linear_cross_entropy import linear_cross_entropy
from .layers_urform import UrformTransform, keep_logits


class LanguageModelLoss:
    """Logits and loss of a model with an output projection; a base of `UrformLanguageModel`."""

    config: UrformConfig
    lm_head: nn.Linear
    transform: UrformTransform | None
    training: bool
    loss_function: Any

    def project(self, hidden: Tensor, logits_to_keep: int | Tensor = 0) -> Tensor:
        """Compute logits `[B, kept, V]` from hidden states `[B, L, E]`."""
        hidden = keep_logits(hidden, logits_to_keep)
        if self.transform is not None:
            hidden = self.transform(hidden)
        logits = self.lm_head(hidden)
        if self.config.logit_scale != 1.0:
            logits = logits * self.config.logit_scale
        cap = self.config.final_logit_softcapping
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def loss_and_logits(
        self,
        hidden: Tensor,
        labels: Tensor | None,
        logits_to_keep: int | Tensor = 0,
        skip_logits: bool | None = None,
        shift: bool = False,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        **kwargs: Any,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Compute the loss without ever holding all logits; return it with the logits, if they are wanted.

        Args:
            hidden: `[B, L, E]`.
            labels: `[B, L]`, -100 where there is no loss; None: no loss.
            logits_to_keep: see `forward`.
            skip_logits: return no logits; None: skip them in training, where only the loss is read.
            shift: labels are the ids themselves; position i predicts label i + 1.
            label_smoothing: share of the target spread over the vocabulary (Szegedy et al. 2016, section 7).
            z_loss: weight of the squared log of the softmax's denominator (Chowdhery et al. 2022, section 5).
            kwargs: `num_items_in_batch`, and what a `loss_function` set by the user takes.

        Raises:
            ValueError: Smoothing or z-loss with `logits_to_keep`, `shift_labels` or a `loss_function` of the user's.
        """
        if labels is None:
            return None, self.project(hidden, logits_to_keep)
        skip_logits = self.training and torch.is_grad_enabled() if skip_logits is None else skip_logits
        extra = label_smoothing != 0.0 or z_loss != 0.0
        asked = not isinstance(logits_to_keep, int) or logits_to_keep != 0 or kwargs.get("shift_labels") is not None
        fuses = not asked and self.fuses_loss() and self.lm_head.weight.device == hidden.device
        if fuses and (skip_logits or extra):
            logits = None if skip_logits else self.project(hidden, logits_to_keep)
            return self._fused_loss(hidden, labels, shift, label_smoothing, z_loss, **kwargs), logits
        logits = self.project(hidden, logits_to_keep)
        if extra:  # an adapter or a shard on lm_head
            self._refuse_smoothing(asked, label_smoothing, z_loss)
            return _loss_of_logits(logits, labels, shift, label_smoothing, z_loss, **kwargs), logits
        loss = self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
        labelled = (kwargs.get("shift_labels", labels) != kwargs.get("ignore_index", -100)).any()
        return torch.where(labelled.to(loss.device), loss, torch.zeros_like(loss)), logits  # a mean over nothing is 0

    def _refuse_smoothing(self, asked: bool, label_smoothing: float, z_loss: float) -> None:
        if asked or hasattr(self, "_loss_function"):
            raise ValueError(
                f"label_smoothing={label_smoothing} and z_loss={z_loss} are for the model's own loss of all "
                "positions, but loss_function is set, or logits_to_keep or shift_labels is given; drop one of them"
            )

    def fuses_loss(self) -> bool:
        """Return whether the loss may use the projection's weight outside of `lm_head` (no adapter, shard, hook)."""
        head = self.lm_head
        plain = type(head) is nn.Linear and type(head.weight) is nn.Parameter and not hasattr(self, "_loss_function")
        hooked = bool(head._forward_hooks or head._forward_pre_hooks) or hasattr(head, "_hf_hook")
        return plain and not hooked and head.weight.shape[0] == self.config.vocab_size

    def _fused_loss(
        self,
        hidden: Tensor,
        labels: Tensor,
        shift: bool,
        label_smoothing: float,
        z_loss: float,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = -100,
        **kwargs: Any,
    ) -> Tensor:
        labels = labels.to(hidden.device)
        if shift:
            labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        if self.transform is not None:  # of the masked positions alone
            kept = (labels != ignore_index).flatten().nonzero()[:, 0]
            labels, hidden = labels.flatten()[kept], self.transform(hidden.flatten(0, 1)[kept])
        return linear_cross_entropy(
            hidden,
            self.lm_head.weight,
            labels,
            bias=self.lm_head.bias,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            softcap=self.config.final_logit_softcapping,
            logit_scale=self.config.logit_scale,
            ignore_index=ignore_index,
            num_items=num_items_in_batch,
        )


def _loss_of_logits(
    logits: Tensor,
    labels: Tensor,
    shift: bool,
    label_smoothing: float,
    z_loss: float,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    **kwargs: Any,
) -> Tensor:
    """Compute what `linear_cross_entropy` does from logits `[B, L, V]`, also where no label is kept."""
    if shift:
        labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    labels = labels.to(logits.device).flatten()
    logits = logits.flatten(0, -2).to(torch.promote_types(logits.dtype, torch.float32))
    total = nn.functional.cross_entropy(
        logits, labels, ignore_index=ignore_index, reduction="sum", label_smoothing=label_smoothing
    )
    kept = labels != ignore_index
    if z_loss:
        total = total + z_loss * (logits.logsumexp(-1).square() * kept).sum()
    return total / (kept.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch)
