# Copyright 2026 The Urform authors. Licensed under the Apache License, Version 2.0.
"""Urform's models: the backbone and its heads.

`UrformModel` holds an encoder, a decoder or both, as `config.architecture` says; a head is the backbone, one layer and
a loss. The stacks are in `stack_urform.py`, their blocks in `layers_urform.py`.

Shapes: B batch, L (target) length, S source length, E hidden, V vocabulary.
"""

import copy
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
from .packing_urform import find_documents, follows_its_own
from .stack_urform import UrformDecoder, UrformEncoder, UrformPreTrainedModel


def shift_right(ids: Tensor, start: int | Tensor, pad: int, mask: Tensor | None = None) -> Tensor:
    """Teacher forcing: `[start, x_0 .. x_{L-2}]`, where `mask` `[B, L]` says which tokens are real (None: all).

    `start` is a token, or one for each row, `[B, 1]`. In a left-padded row it stands at the first real place, so the
    row is what it is without padding.
    """
    shifted = ids.roll(1, dims=-1)
    if mask is None:
        first = torch.zeros_like(ids, dtype=torch.bool)
        first[:, 0] = True
    else:
        mask = mask.bool()
        first = mask & (mask.cumsum(-1) == 1)
    shifted = torch.where(first, start, shifted)
    shifted = shifted if mask is None else shifted.masked_fill(~mask, pad)
    return shifted.masked_fill(shifted == -100, pad)


def real_targets(labels: Tensor, given: bool, seen: bool) -> Tensor:
    """Which target tokens are real, `[B, L]`: unless their logits are `seen`, none behind a row's last label.

    No loss depends on what comes there. Unless the decoder's input is `given` beside the labels, none before a row's
    first label either: left padding.
    """
    labelled = labels != -100
    real = torch.ones_like(labelled) if seen else labelled.flip(-1).cummax(-1).values.flip(-1)
    return (real if given else real & labelled.cummax(-1).values).long()


def start_and_pad(config: UrformConfig) -> tuple[int, int]:
    """`decoder_start_token_id` and `pad_token_id`, which teacher forcing needs."""
    for name in ("decoder_start_token_id", "pad_token_id"):
        if getattr(config, name) is None:
            raise ValueError(f"config.{name} is None, but the decoder's input is shifted with it; set it")
    return config.decoder_start_token_id, config.pad_token_id


def decoder_inputs(config: UrformConfig, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """What the decoder reads to predict `ids` `[B, L]`: them, shifted right behind the token that it starts with."""
    start: int | Tensor
    start, pad = start_and_pad(config)
    if config.decoder_start_from_labels:
        real = (ids != -100) & (ids != pad) & (True if mask is None else mask.bool())
        last = (torch.arange(ids.shape[1], device=ids.device) * real).amax(-1, keepdim=True)
        start = ids.gather(1, last)
    return shift_right(ids, start, pad, mask)


def _rest(outputs: ModelOutput) -> dict[str, Any]:
    """All but the hidden state, to hand on."""
    return {name: value for name, value in outputs.items() if name != "last_hidden_state"}


class UrformModel(UrformPreTrainedModel):
    """The backbone: an encoder, a decoder or both, without a head."""

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
        """Run the Transformer; arguments that begin with `decoder_` are for an encoder-decoder.

        Args:
            input_ids: `[B, S]`, tokens of the source or of the only stack.
            attention_mask: `[B, S]`, 1 for real tokens, 0 for padding on any side; also 4D, or one per layer type.
            decoder_input_ids: `[B, L]`; None: `input_ids` shifted right.
            decoder_attention_mask: `[B, L]`.
            position_ids: `[B, S]`; None: real tokens are counted. Where they begin anew, a new document begins, and
                documents do not see each other (packing).
            decoder_position_ids: The same for the target.
            token_type_ids: `[B, S]`, for configs with `type_vocab_size`.
            encoder_outputs: The encoder's output, to run the decoder alone.
            past_key_values: A cache; an `EncoderDecoderCache` for an encoder-decoder. `cache` is its name from
                transformers 5.24 on; both are served.
            inputs_embeds: `[B, S, E]` instead of `input_ids`.
            decoder_inputs_embeds: `[B, L, E]` instead of `decoder_input_ids`.
            use_cache: Whether to fill and return a cache. None: as configured.
            cache: See `past_key_values`.
            **kwargs: `output_hidden_states`, `output_attentions`; `cu_seq_lens_q`, `cu_seq_lens_k` (int `[documents +
                1]`), `max_length_q`, `max_length_k` for one packed row (an encoder-decoder's targets are q, its
                sources k).

        Raises:
            ValueError: Ids outside the vocabulary, positions beyond the learned table, empty or missing inputs,
                packed sides that disagree.
        """
        config = self.config
        source = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
        }
        target = {
            "input_ids": decoder_input_ids,
            "attention_mask": decoder_attention_mask,
            "position_ids": decoder_position_ids,
            "inputs_embeds": decoder_inputs_embeds,
        }
        cache = given_cache(past_key_values, cache)
        caching = {**cache_field(cache), "use_cache": use_cache}
        if config.is_encoder_decoder:
            source["token_type_ids"] = token_type_ids
            return self._encode_decode(source, {**target, **caching}, encoder_outputs, **kwargs)
        for name, value in {**target, "outputs": encoder_outputs}.items():
            if value is not None:
                name = "encoder_outputs" if name == "outputs" else f"decoder_{name}"
                raise ValueError(f"{name} is for an encoder-decoder; this is architecture={config.architecture!r}")
        if config.architecture == "decoder":
            return self.decoder(**source, **caching, **kwargs)
        return self.encoder(**source, token_type_ids=token_type_ids, **cache_field(cache), **kwargs)

    def _encode_decode(
        self,
        source: dict[str, Any],
        target: dict[str, Any],
        encoder_outputs: Any,
        **kwargs: Any,
    ) -> Seq2SeqModelOutput:
        for side, letter in ((target, "q"), (source, "k")):  # each stack attends to itself: its queries are its keys
            lengths, longest = kwargs.get(f"cu_seq_lens_{letter}"), kwargs.get(f"max_length_{letter}")
            if lengths is not None:
                side.update(cu_seq_lens_q=lengths, cu_seq_lens_k=lengths, max_length_q=longest, max_length_k=longest)
        kwargs = {key: value for key, value in kwargs.items() if not key.startswith(("cu_seq_lens_", "max_length_"))}
        if encoder_outputs is None:
            encoder_outputs = self.encoder(**source, **kwargs)
        elif not isinstance(encoder_outputs, ModelOutput):
            names = ("last_hidden_state", "hidden_states", "attentions")
            encoder_outputs = BaseModelOutput(**dict(zip(names, encoder_outputs, strict=False)))
        states, mask = encoder_outputs.last_hidden_state, source["attention_mask"]
        if target["input_ids"] is None and target["inputs_embeds"] is None:
            self._shift_source(source, target)
        outputs = self.decoder(
            **target,
            encoder_hidden_states=states,
            encoder_attention_mask=mask,
            encoder_documents=find_documents(
                states.shape[1],
                source["position_ids"],
                mask if mask is not None and mask.ndim == 2 else None,
                source.get("cu_seq_lens_q"),
            ),
            **kwargs,
        )
        return Seq2SeqModelOutput(
            last_hidden_state=outputs.last_hidden_state,
            **cache_field(cache_of(outputs)),
            decoder_hidden_states=outputs.hidden_states,
            decoder_attentions=outputs.attentions,
            cross_attentions=outputs.cross_attentions,
            encoder_last_hidden_state=states,
            encoder_hidden_states=encoder_outputs.hidden_states,
            encoder_attentions=encoder_outputs.attentions,
        )

    def _shift_source(self, source: dict[str, Any], target: dict[str, Any]) -> None:
        """Give the decoder, where it has no input, the source behind the start token (as BART does)."""
        input_ids, embeds, mask = source["input_ids"], source["inputs_embeds"], source["attention_mask"]
        if input_ids is None and embeds is None:
            raise ValueError("decoder_input_ids is missing; give it, decoder_inputs_embeds or labels")
        if target["attention_mask"] is None:
            target["attention_mask"] = mask
        if input_ids is not None:
            target["input_ids"] = decoder_inputs(self.config, input_ids, mask)
            return
        start, _ = start_and_pad(self.config)
        places = torch.arange(embeds.shape[1], device=embeds.device).expand(embeds.shape[:2])
        places = shift_right(places, -1, 0, mask)  # which embedding comes here; -1 is the start token's
        first = self.decoder.embed_tokens(torch.full_like(places[:, :1], start))
        shifted = torch.take_along_dim(embeds, places.clamp(min=0)[..., None], dim=1)
        target["inputs_embeds"] = torch.where((places < 0)[..., None], first, shifted)


class UrformEncoderModel(UrformPreTrainedModel):
    """The encoder alone, of an encoder or of an encoder-decoder: text to vectors."""

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
        skip_logits = self.skips_logits(skip_logits)
        extra = label_smoothing != 0.0 or z_loss != 0.0
        asked = not isinstance(logits_to_keep, int) or logits_to_keep != 0 or kwargs.get("shift_labels") is not None
        if asked or not self.fuses_loss() or self.lm_head.weight.device != hidden.device:
            if extra and (asked or hasattr(self, "_loss_function")):
                raise ValueError(
                    f"label_smoothing={label_smoothing} and z_loss={z_loss} are for the model's own loss of all "
                    "positions, but loss_function is set, or logits_to_keep or shift_labels is given; drop one of them"
                )
            if extra:  # an adapter or a shard on lm_head: the logits have to be made
                logits = self.project(hidden)
                return _loss_of_logits(logits, labels, shift, label_smoothing, z_loss, **kwargs), logits
            skip_logits = False
        elif skip_logits or extra:
            logits = None if skip_logits else self.project(hidden, logits_to_keep)
            return self._fused_loss(hidden, labels, shift, label_smoothing, z_loss, **kwargs), logits
        logits = self.project(hidden, logits_to_keep)
        loss = self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
        labelled = (kwargs.get("shift_labels", labels) != kwargs.get("ignore_index", -100)).any()
        return torch.where(labelled.to(loss.device), loss, torch.zeros_like(loss)), logits  # a mean over nothing is 0

    def skips_logits(self, asked: bool | None) -> bool:
        """Whether a loss comes without logits: as `asked`, else in training."""
        return self.training and torch.is_grad_enabled() if asked is None else asked

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


class UrformForConditionalGeneration(UrformLanguageModel, GenerationMixin):
    """Sequence to sequence: translation, summarization, dialogue."""

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
        cache = given_cache(past_key_values, cache)
        given = decoder_input_ids is not None or decoder_inputs_embeds is not None
        trains = kwargs.get("num_items_in_batch") is not None or (self.training and torch.is_grad_enabled())
        if labels is None and not given and trains:
            raise ValueError(
                "neither labels nor decoder_input_ids came to a training step: Trainer takes the labels away under "
                "label_smoothing_factor or compute_loss_func; use DataCollatorForSeq2Seq(tokenizer, model=model), "
                "which makes decoder_input_ids of the labels, or UrformTrainer"
            )
        if labels is not None:
            use_cache = False
            skip_logits = self.skips_logits(skip_logits)
            if decoder_attention_mask is None and (skip_logits or not given) and kwargs.get("cu_seq_lens_q") is None:
                decoder_attention_mask = real_targets(labels, given, seen=not skip_logits)
            if not given:
                decoder_input_ids = decoder_inputs(self.config, labels, decoder_attention_mask)
            if cache is not None and decoder_attention_mask is not None:  # a trained prefix (PEFT) is real
                missing = cache.get_seq_length() + labels.shape[1] - decoder_attention_mask.shape[1]
                decoder_attention_mask = nn.functional.pad(decoder_attention_mask, (max(missing, 0), 0), value=1)
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
            **cache_field(cache),
            **_without_loss(kwargs),
        )
        loss, logits = self.loss_and_logits(
            outputs.last_hidden_state, labels, logits_to_keep, skip_logits, **_of_loss(kwargs)
        )
        return Seq2SeqLMOutput(loss=loss, logits=logits, **_rest(outputs))


class UrformForCausalLM(UrformLanguageModel, GenerationMixin):
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
        cache = given_cache(past_key_values, cache)
        if labels is not None and use_cache is None and cache is None:
            use_cache = False
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **cache_field(cache),
            **_without_loss(kwargs),
        )
        if labels is not None:
            mask = attention_mask if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2 else None
            length, starts = labels.shape[1], kwargs.get("cu_seq_lens_q")
            documents = find_documents(length, None if cache is not None else position_ids, mask, starts)
            follows = follows_its_own(length, mask, documents, labels.device)
            labels = labels if follows is None else labels.masked_fill(~follows, -100)
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
            **_without_loss(kwargs),
        )
        loss, logits = self.loss_and_logits(
            outputs.last_hidden_state, labels, skip_logits=skip_logits, **_of_loss(kwargs)
        )
        return MaskedLMOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


_LOSS_OPTIONS = ("num_items_in_batch", "shift_labels", "label_smoothing", "z_loss", "ignore_index")


def _without_loss(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in kwargs.items() if key not in _LOSS_OPTIONS}


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
            **_without_loss(kwargs),
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
            **_without_loss(kwargs),
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
            **_without_loss(kwargs),
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
            **_without_loss(kwargs),
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
