# Copyright 2026 The Urform authors. Licensed under the Apache License, Version 2.0.
"""Urform's models: the backbone and its heads.

`UrformModel` holds an encoder, a decoder or both, as `config.architecture` says; a head is the backbone, one layer and
a loss. The stacks are in `stack_urform.py`, their blocks in `layers_urform.py`.

Shapes: B batch, L (target) length, S source length, E hidden, V vocabulary.
"""

import copy
from dataclasses import replace
from typing import Any, cast

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
from .language_loss_urform import LanguageModelLoss
from .layers_urform import SourceWeights, UrformClassifier, UrformTransform, pool, real_tokens
from .sequences_urform import SOURCE, Sequences
from .stack_urform import UrformDecoder, UrformEncoder, UrformPreTrainedModel
from .teacher_forcing_urform import as_output, cover_prefix, decoder_inputs, real_targets, refuse_training


def _rest(outputs: ModelOutput) -> dict[str, Any]:
    """Return all but the hidden state, to hand on."""
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
        """Return the table that reads `input_ids`."""
        return (self.decoder if self.config.architecture == "decoder" else self.encoder).embed_tokens

    def set_input_embeddings(self, value: Any) -> None:
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
        encoder_outputs: ModelOutput | tuple[Any, ...] | None = None,
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
            return self._one_stack(*source, token_type_ids, use_cache, cache=cache, **kwargs)
        if encoder_outputs is None:
            memory = Sequences.of(self.config, *source, kwargs, SOURCE)
            encoded = self.encoder(
                input_ids, inputs_embeds=inputs_embeds, token_type_ids=token_type_ids, sequences=memory, **kwargs
            )
            memory = replace(memory, tokens=encoded.last_hidden_state)
        else:
            encoded = as_output(encoder_outputs)
            states = encoded.last_hidden_state
            memory = Sequences.of(self.config, None, states, attention_mask, position_ids, kwargs, SOURCE)
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
        token_type_ids: Tensor | None,
        use_cache: bool | None,
        **kwargs: Any,
    ) -> BaseModelOutput | BaseModelOutputWithPastAndCrossAttentions:
        given = {"inputs_embeds": inputs_embeds, "attention_mask": attention_mask, "position_ids": position_ids}
        if self.config.architecture == "encoder":
            return self.encoder(input_ids, token_type_ids=token_type_ids, **given, **kwargs)
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

    _keys_to_ignore_on_load_unexpected = [r"decoder\..*", r"lm_head\..*", r"source_weights\..*"]

    def __init__(self, config: UrformConfig):
        super().__init__(config)
        self.encoder = UrformEncoder(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the table that reads `input_ids`."""
        return self.encoder.embed_tokens

    def set_input_embeddings(self, value: Any) -> None:
        """Replace that table."""
        self.encoder.embed_tokens = value

    @can_return_tuple
    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutput:
        """Run the encoder; see `UrformModel` for its arguments."""
        return self.encoder(input_ids=input_ids, attention_mask=attention_mask, **kwargs)


class UrformLanguageModel(LanguageModelLoss, UrformPreTrainedModel):  # type: ignore[misc]
    """A backbone and its output projection; use one of the three heads below."""

    _tp_plan = {"lm_head": "colwise_gather_output"}
    _fsdp_plan = {"lm_head": "keep_full_weight"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}  # type: ignore[dict-item]  # annotated as two names

    def __init__(self, config: UrformConfig):
        super().__init__(config)
        self.model = UrformModel(config)
        activation = config.lm_head_activation or config.hidden_act
        self.transform = UrformTransform(config, activation) if config.lm_head_transform else None
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.lm_head_bias)
        self.post_init()


class UrformForConditionalGeneration(UrformLanguageModel, GenerationMixin):  # type: ignore[misc]
    """Sequence to sequence: translation, summarization, dialogue."""

    def __init__(self, config: UrformConfig):
        super().__init__(config)
        self.loss_type = "ForMaskedLM"  # the labels are not shifted again

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        """Return labels `[B, L]` shifted right, for collators and label smoothing."""
        return decoder_inputs(self.config, labels)

    def _prepare_cache_for_generation(  # type: ignore[override]  # annotated with bool, returns None
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """Make the cache as the library does, but let the cross-attention's slide in no layer."""
        given = model_kwargs.get(CACHE) is not None
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)  # type: ignore[misc]
        cache = model_kwargs.get(CACHE)
        sizes = self.config.stack_sizes(decoder=True)
        if given or "sliding_attention" not in sizes.layer_types or cache is None:
            return
        if isinstance(cache.cross_attention_cache, StaticCache):
            full = copy.deepcopy(self.config)
            full.decoder_layer_types = ["full_attention"] * sizes.num_hidden_layers
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
        encoder_outputs: ModelOutput | tuple[Any, ...] | None = None,
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


class UrformForCausalLM(UrformLanguageModel, GenerationMixin):  # type: ignore[misc]
    """Left-to-right language model."""

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
        if labels is not None:
            predicted = sequences.predicted(labels.device)
            labels = labels if predicted is None else labels.masked_fill(~predicted, -100)
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
            self.transform = UrformTransform(config, cast(str, config.classifier_activation), config.classifier_norm)
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
        """See `UrformModel.forward`, with a dimension of choices after the batch's; `labels` `[B]` say which."""
        tokens = input_ids if input_ids is not None else inputs_embeds
        if tokens is None:
            raise ValueError("give input_ids or inputs_embeds")
        choices = tokens.shape[1]

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
