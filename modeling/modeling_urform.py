# Copyright 2026 The Urform authors. Licensed under the Apache License, Version 2.0.
"""Urform's models: the backbone and its heads.

`UrformModel` holds an encoder, a decoder or both, as `config.architecture` says; a head is the backbone, one layer and
a loss. The stacks are in `stack_urform.py`, their blocks in `layers_urform.py`.

Shapes: B batch, L (target) length, S source length, E hidden, V vocabulary.
"""

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, StaticCache
from transformers.generation import GenerationMixin
from transformers.loss.loss_utils import fixed_cross_entropy
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithPastAndCrossAttentions,
    CausalLMOutputWithPast,
    MaskedLMOutput,
    ModelOutput,
    MultipleChoiceModelOutput,
    QuestionAnsweringModelOutput,
    Seq2SeqLMOutput,
    Seq2SeqModelOutput,
    Seq2SeqQuestionAnsweringModelOutput,
    Seq2SeqSequenceClassifierOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.utils import can_return_tuple

from ..configuration.configuration_urform import UrformConfig
from .caches_urform import CACHE, cache_field, cache_of, given_cache
from .kernels.loss_linear_cross_entropy import linear_cross_entropy
from .layers_urform import SourceWeights, UrformClassifier, UrformTransform, keep_logits, pool, real_tokens
from .sequences_urform import Sequences
from .stack_urform import UrformDecoder, UrformEncoder, UrformPreTrainedModel


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
    if config.decoder_start_from_labels:
        places = torch.arange(ids.shape[1], device=ids.device)
        last = (places * (real & (ids != -100) & (ids != pad))).amax(-1, keepdim=True)
        start = ids.gather(1, last)
    is_first = real & (real.cumsum(-1) == 1)
    shifted = torch.where(is_first, start, ids.roll(1, dims=-1)).masked_fill(~real, pad)
    return shifted.masked_fill(shifted == -100, pad)


def real_targets(labels: Tensor, given: bool, all_logits: bool) -> Tensor:
    """Return which target tokens are real, `[B, L]`: none after a row's last label, unless `all_logits` are read.

    No loss depends on what comes there. Unless the decoder's input is `given` with the labels, none before a row's
    first label is real either: left padding.
    """
    labelled = labels != -100
    real = torch.ones_like(labelled) if all_logits else labelled.flip(-1).cummax(-1).values.flip(-1)
    return (real if given else real & labelled.cummax(-1).values).long()


def as_output(encoder_outputs: ModelOutput | tuple) -> ModelOutput:
    """Return an encoder's output, which may come as a tuple, by its names."""
    if isinstance(encoder_outputs, ModelOutput):
        return encoder_outputs
    names = ("last_hidden_state", "hidden_states", "attentions")
    return BaseModelOutput(**dict(zip(names, encoder_outputs, strict=False)))


def _rest(outputs: ModelOutput) -> dict[str, Any]:
    """All but the hidden state, to hand on."""
    return {name: value for name, value in outputs.items() if name != "last_hidden_state"}


class UrformModel(UrformPreTrainedModel):
    """The backbone: an encoder, a decoder or both, without a head.

    What its forward pass and those of the heads take; arguments that begin with `decoder_` are for an encoder-decoder.

    - `input_ids` `[B, S]` or `inputs_embeds` `[B, S, E]`: tokens of the source or of the only stack.
    - `attention_mask` `[B, S]`: 1 for real tokens, 0 for padding on any side; also 4D, or one per layer type.
    - `position_ids` `[B, S]`: None counts real tokens. A packed document begins where the position of a real token is
      not the one before plus one, and documents do not see each other.
    - `cu_seq_lens_q`, `cu_seq_lens_k` (int `[documents + 1]`), `max_length_q`, `max_length_k`: the documents of one
      packed row, instead of `position_ids`. In an encoder-decoder q is the target's row and k the source's.
    - `token_type_ids` `[B, S]`: for configs with `type_vocab_size`.
    - `decoder_input_ids` `[B, L]` or `decoder_inputs_embeds` `[B, L, E]`: None takes the source, shifted right.
    - `decoder_attention_mask` `[B, L]` and `decoder_position_ids` `[B, L]`: as those of the source.
    - `encoder_outputs`: the encoder's output, to run the decoder alone.
    - `past_key_values`, `use_cache`: a cache to read and fill, an `EncoderDecoderCache` for an encoder-decoder; `cache`
      is its name from transformers 5.24 on, and both are served.
    - `output_hidden_states`, `output_attentions`: what to return of every layer.
    """

    def __init__(self, config: UrformConfig):
        super().__init__(config)
        if config.architecture != "decoder":
            self.encoder = UrformEncoder(config)
        if config.architecture != "encoder":
            self.decoder = UrformDecoder(config)
        if config.source_weights:
            self.source_weights = SourceWeights(config.source_weights)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The table that reads `input_ids`."""
        return (self.decoder if self.config.architecture == "decoder" else self.encoder).embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace that table, on both sides where they share it."""
        if self.config.architecture != "decoder":
            self.encoder.embed_tokens = value
        if self.config.architecture == "decoder" or (self.config.is_encoder_decoder and self.config.share_embeddings):
            self.decoder.embed_tokens = value

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        decoder_position_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        encoder_outputs: ModelOutput | tuple | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> Seq2SeqModelOutput | BaseModelOutput | BaseModelOutputWithPastAndCrossAttentions:
        """Run the Transformer; the class says what the arguments are.

        Raises:
            ValueError: Ids outside the vocabulary, positions beyond the learned table, empty or missing inputs,
                packed sides that disagree.
        """
        if past_key_values is not None:
            cache = given_cache(past_key_values, cache)
        source = (input_ids, inputs_embeds, attention_mask, position_ids)
        target = (decoder_input_ids, decoder_inputs_embeds, decoder_attention_mask, decoder_position_ids)
        if not self.config.is_encoder_decoder:
            self._refuse(*target, encoder_outputs)
            kwargs = kwargs if token_type_ids is None else {**kwargs, "token_type_ids": token_type_ids}
            return self._one_stack(*source, use_cache, cache=cache, **kwargs)
        if encoder_outputs is None:
            memory = Sequences.of(self.config, *source, kwargs, side="k")
            encoded = self.encoder(
                input_ids, inputs_embeds=inputs_embeds, token_type_ids=token_type_ids, sequences=memory, **kwargs
            )
            memory = replace(memory, tokens=encoded.last_hidden_state)
        else:
            encoded = as_output(encoder_outputs)
            states = encoded.last_hidden_state
            memory = Sequences.of(self.config, None, states, attention_mask, position_ids, kwargs, side="k")
        if decoder_input_ids is None and decoder_inputs_embeds is None:
            target = (*self._shift_source(*source[:3], decoder_attention_mask), decoder_position_ids)
        names = ("input_ids", "inputs_embeds", "attention_mask", "position_ids")
        given = dict(zip(names, target, strict=True))
        outputs = self.decoder(**given, memory=memory, cache=cache, use_cache=use_cache, **kwargs)
        return Seq2SeqModelOutput(
            last_hidden_state=outputs.last_hidden_state,
            **cache_field(cache_of(outputs)),
            decoder_hidden_states=outputs.hidden_states,
            decoder_attentions=outputs.attentions,
            cross_attentions=outputs.cross_attentions,
            encoder_last_hidden_state=memory.tokens,
            encoder_hidden_states=encoded.hidden_states,
            encoder_attentions=encoded.attentions,
        )

    def _one_stack(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        attention_mask: Any,
        position_ids: Tensor | None,
        use_cache: bool | None,
        **kwargs: Any,
    ) -> BaseModelOutput | BaseModelOutputWithPastAndCrossAttentions:
        given = {"inputs_embeds": inputs_embeds, "attention_mask": attention_mask, "position_ids": position_ids}
        if self.config.architecture == "encoder":
            return self.encoder(input_ids, **given, **kwargs)
        return self.decoder(input_ids, **given, use_cache=use_cache, **kwargs)

    def _refuse(self, *arguments: Any) -> None:
        """Raise ValueError for what only an encoder-decoder takes."""
        names = ("input_ids", "inputs_embeds", "attention_mask", "position_ids")
        for name, value in zip((*(f"decoder_{name}" for name in names), "encoder_outputs"), arguments, strict=True):
            if value is not None:
                raise ValueError(f"{name} is for an encoder-decoder; this is architecture={self.config.architecture!r}")

    def _shift_source(
        self, input_ids: Tensor | None, embeds: Tensor | None, mask: Tensor | None, decoder_mask: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return ids, embeddings and mask for a decoder without input: the source after the start token (as BART)."""
        mask_of_both = mask if decoder_mask is None else decoder_mask
        if input_ids is not None:
            return decoder_inputs(self.config, input_ids, mask), None, mask_of_both
        if embeds is None:
            raise ValueError("decoder_input_ids is missing; give it, decoder_inputs_embeds or labels")
        real = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device) if mask is None else mask.long()
        start_ids = decoder_inputs(self.config, real[:, :1])  # embeddings name no token to start from instead
        is_first = (real != 0) & (real.cumsum(-1) == 1)
        shifted = torch.where(real[..., None] != 0, embeds.roll(1, dims=1), embeds[:, :1])
        start = self.decoder.embed_tokens(start_ids)
        return None, torch.where(is_first[..., None], start, shifted), mask_of_both


class UrformEncoderModel(UrformPreTrainedModel):
    """The encoder alone, of an encoder or of an encoder-decoder: text to vectors."""

    _architectures = ("encoder", "encoder-decoder")
    _keys_to_ignore_on_load_unexpected = [r"decoder\..*", r"lm_head\..*", r"source_weights\..*"]

    def __init__(self, config: UrformConfig):
        super().__init__(config)
        self.encoder = UrformEncoder(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The table that reads `input_ids`."""
        return self.encoder.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace that table."""
        self.encoder.embed_tokens = value

    @can_return_tuple
    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutput:
        """As `UrformModel.forward`, with the encoder's arguments."""
        return self.encoder(input_ids=input_ids, attention_mask=attention_mask, **kwargs)


class UrformLanguageModel(UrformPreTrainedModel):
    """A backbone and its output projection; use one of the three heads below."""

    _tp_plan = {"lm_head": "colwise_gather_output"}
    _fsdp_plan = {"lm_head": "keep_full_weight"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}

    def __init__(self, config: UrformConfig):
        super().__init__(config)
        self.model = UrformModel(config)
        activation = config.lm_head_activation or config.hidden_act
        self.transform = UrformTransform(config, activation) if config.lm_head_transform else None
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.lm_head_bias)
        self.post_init()

    def project(self, hidden: Tensor, logits_to_keep: int | Tensor = 0) -> Tensor:
        """Hidden states `[B, L, E]` to logits `[B, kept, V]`."""
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
        """The loss of hidden states `[B, L, E]`, without ever holding all logits, and the logits if they are wanted.

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
            ValueError: Smoothing or z-loss beside `logits_to_keep`, `shift_labels` or a `loss_function` of the user's.
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
        """Whether hidden states may meet the projection's weight outside of `lm_head` (no adapter, shard or hook)."""
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
    """What `linear_cross_entropy` computes, of logits `[B, L, V]`; also where no label is kept."""
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


class UrformForConditionalGeneration(UrformLanguageModel, GenerationMixin):
    """Sequence to sequence: translation, summarization, dialogue."""

    _architectures = ("encoder-decoder",)

    def __init__(self, config: UrformConfig):
        super().__init__(config)
        self.loss_type = "ForMaskedLM"  # the labels are not shifted again

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        """Labels `[B, L]` shifted right, for collators and label smoothing."""
        return decoder_inputs(self.config, labels)

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """As the library's, but the cross-attention's cache slides in no layer."""
        given = model_kwargs.get(CACHE) is not None
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        cache = model_kwargs.get(CACHE)
        if given or "sliding_attention" not in self.config.decoder_layer_types or cache is None:
            return
        if isinstance(cache.cross_attention_cache, StaticCache):
            full = copy.deepcopy(self.config)
            full.decoder_layer_types = ["full_attention"] * full.decoder_num_hidden_layers
            length = model_kwargs["encoder_outputs"][0].shape[1]
            cache.cross_attention_cache = StaticCache(config=full, max_cache_len=length)
        else:
            cache.cross_attention_cache = DynamicCache()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        decoder_position_ids: Tensor | None = None,
        encoder_outputs: ModelOutput | tuple | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        skip_logits: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> Seq2SeqLMOutput:
        """See `UrformModel.forward`; `position_ids` are the source's here and go with the other keywords.

        Args:
            labels: `[B, L]`, -100 where there is no loss; the decoder's input is made of them if none is given.
            logits_to_keep: Compute logits of the last so many positions only (0: all), or of those indexed.
            skip_logits: Return a loss without logits; None: in training. See `loss_and_logits` for the loss's options.
        """
        if past_key_values is not None:
            cache = given_cache(past_key_values, cache)
        given = decoder_input_ids is not None or decoder_inputs_embeds is not None
        trains = self.training and torch.is_grad_enabled()
        if labels is None and not given:
            refuse_training(trains or kwargs.get("num_items_in_batch") is not None)
        if labels is not None:
            use_cache = False
            skip_logits = trains if skip_logits is None else skip_logits
            if decoder_attention_mask is None and (skip_logits or not given) and kwargs.get("cu_seq_lens_q") is None:
                decoder_attention_mask = real_targets(labels, given, all_logits=not skip_logits)
            if not given:
                decoder_input_ids = decoder_inputs(self.config, labels, decoder_attention_mask)
            if cache is not None:
                decoder_attention_mask = cover_prefix(decoder_attention_mask, cache, labels.shape[1])
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            decoder_position_ids=decoder_position_ids,
            encoder_outputs=encoder_outputs,
            inputs_embeds=inputs_embeds,
            decoder_inputs_embeds=decoder_inputs_embeds,
            use_cache=use_cache,
            cache=cache,
            **kwargs,
        )
        loss, logits = self.loss_and_logits(
            outputs.last_hidden_state, labels, logits_to_keep, skip_logits, **_of_loss(kwargs)
        )
        return Seq2SeqLMOutput(loss=loss, logits=logits, **_rest(outputs))


class UrformForCausalLM(UrformLanguageModel, GenerationMixin):
    """Left-to-right language model."""

    _architectures = ("decoder",)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        skip_logits: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """See `UrformModel.forward`.

        Args:
            labels: `[B, L]`, the ids themselves (the loss shifts them), -100 where there is no loss.
            logits_to_keep: Compute logits of the last so many positions only (0: all), or of those indexed.
            skip_logits: Return a loss without logits; None: in training. See `loss_and_logits` for the loss's options.
        """
        if past_key_values is not None:
            cache = given_cache(past_key_values, cache)
        if labels is not None and use_cache is None and cache is None:
            use_cache = False
        sequences = Sequences.of(
            self.config, input_ids, inputs_embeds, attention_mask, position_ids, kwargs, cache=cache
        )
        outputs = self.model(
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            sequences=sequences,
            cache=cache,
            **kwargs,
        )
        predicted = None if labels is None else sequences.predicted(labels.device)
        if predicted is not None:
            labels = labels.masked_fill(~predicted, -100)
        loss, logits = self.loss_and_logits(
            outputs.last_hidden_state, labels, logits_to_keep, skip_logits, shift=True, **_of_loss(kwargs)
        )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            **cache_field(cache_of(outputs)),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class UrformForMaskedLM(UrformLanguageModel):
    """Masked language model (Devlin et al. 2019)."""

    _architectures = ("encoder",)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        skip_logits: bool | None = None,
        **kwargs: Any,
    ) -> MaskedLMOutput:
        """See `UrformModel.forward` and `loss_and_logits`; `labels` `[B, S]` are -100 where there is no loss."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        loss, logits = self.loss_and_logits(
            outputs.last_hidden_state, labels, skip_logits=skip_logits, **_of_loss(kwargs)
        )
        return MaskedLMOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


_LOSS_OPTIONS = ("num_items_in_batch", "shift_labels", "label_smoothing", "z_loss", "ignore_index")


def _of_loss(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in kwargs.items() if key in _LOSS_OPTIONS}


class UrformForSequenceClassification(UrformPreTrainedModel):
    """One label, several labels or numbers for a text."""

    def __init__(self, config: UrformConfig):
        super().__init__(config)
        self.model = UrformModel(config)
        self.classifier = UrformClassifier(config, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        decoder_position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput | Seq2SeqSequenceClassifierOutput:
        """See `UrformModel.forward`; `labels` `[B]` are classes or numbers, `[B, num_labels]` several of them."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            inputs_embeds=inputs_embeds,
            decoder_inputs_embeds=decoder_inputs_embeds,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            decoder_position_ids=decoder_position_ids,
            past_key_values=past_key_values,
            use_cache=False if labels is not None else use_cache,
            **kwargs,
        )
        hidden, ids, mask = outputs.last_hidden_state, input_ids, attention_mask
        if decoder_input_ids is not None or decoder_inputs_embeds is not None:
            ids, mask = decoder_input_ids, decoder_attention_mask
        if mask is not None and mask.ndim == 2:
            mask = mask[:, -hidden.shape[1] :]  # without the prefix that a cache holds
        logits = self.classifier(pool(hidden, real_tokens(hidden, ids, mask, self.config), self.config))
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config, **kwargs)
            items = kwargs.get("num_items_in_batch")
            if items is not None and self.config.problem_type != "single_label_classification":
                loss = loss * labels.numel() / items  # the library's loss is a mean here
        if self.config.is_encoder_decoder:
            return Seq2SeqSequenceClassifierOutput(loss=loss, logits=logits, **_rest(outputs))
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class UrformForTokenClassification(UrformPreTrainedModel):
    """A label for each token: entities, semantic roles."""

    _architectures = ("encoder", "decoder")

    def __init__(self, config: UrformConfig):
        super().__init__(config)
        self.model = UrformModel(config)
        self.classifier = UrformClassifier(config, config.num_labels, dense=config.token_classifier_dense)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> TokenClassifierOutput:
        """See `UrformModel.forward`; `labels` `[B, S]` are -100 where there is no loss."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            past_key_values=past_key_values,
            **kwargs,
        )
        logits = self.classifier(outputs.last_hidden_state)
        loss = None if labels is None else self.loss_function(logits, labels, self.config, **kwargs)
        return TokenClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class UrformForQuestionAnswering(UrformPreTrainedModel):
    """Where the answer begins and ends in the text."""

    def __init__(self, config: UrformConfig):
        super().__init__(config)
        self.model = UrformModel(config)
        self.transform = None
        if config.token_classifier_dense:
            self.transform = UrformTransform(config, config.classifier_activation, config.classifier_norm)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        use_cache: bool | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        decoder_position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> QuestionAnsweringModelOutput | Seq2SeqQuestionAnsweringModelOutput:
        """See `UrformModel.forward`; positions `[B]` outside the text carry no loss."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            decoder_position_ids=decoder_position_ids,
            inputs_embeds=inputs_embeds,
            decoder_inputs_embeds=decoder_inputs_embeds,
            past_key_values=past_key_values,
            use_cache=False if start_positions is not None else use_cache,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        hidden = hidden if self.transform is None else self.transform(hidden)
        start_logits, end_logits = self.qa_outputs(hidden).unbind(-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = self.loss_function(start_logits, end_logits, start_positions, end_positions, **kwargs)
        logits = {"start_logits": start_logits.contiguous(), "end_logits": end_logits.contiguous()}
        if self.config.is_encoder_decoder:
            return Seq2SeqQuestionAnsweringModelOutput(loss=loss, **logits, **_rest(outputs))
        return QuestionAnsweringModelOutput(
            loss=loss, **logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class UrformForMultipleChoice(UrformPreTrainedModel):
    """Which of several texts fits best."""

    _architectures = ("encoder", "decoder")

    def __init__(self, config: UrformConfig):
        super().__init__(config)
        self.model = UrformModel(config)
        self.classifier = UrformClassifier(config, 1)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> MultipleChoiceModelOutput:
        """See `UrformModel.forward`, with a dimension of choices behind the batch's; `labels` `[B]` say which."""
        choices = (input_ids if input_ids is not None else inputs_embeds).shape[1]

        def flat(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.flatten(0, 1)

        ids, mask = flat(input_ids), flat(attention_mask)
        outputs = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=flat(position_ids),
            token_type_ids=flat(token_type_ids),
            inputs_embeds=flat(inputs_embeds),
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        real = real_tokens(hidden, ids, mask, self.config)
        logits = self.classifier(pool(hidden, real, self.config)).view(-1, choices)
        loss = None
        if labels is not None:
            loss = fixed_cross_entropy(logits.float(), labels.to(logits.device), **kwargs)
        return MultipleChoiceModelOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )
