# Copyright 2026 The Urform authors. Licensed under the Apache License, Version 2.0.
"""The stacks: `UrformStack.forward` is embed, layers, norm; `UrformEncoder` and `UrformDecoder` are its two doors.

A door decides once what its inputs are (`Sequences`) and the stack chooses once how its layers attend (`choose_route`).

Shapes: B batch, L length, S source length, E hidden.
"""

import math
import re
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPastAndCrossAttentions
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import logging
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.import_utils import is_tracing
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from ..configuration.bundle_urform import BundledCodeMixin
from ..configuration.configuration_urform import UrformConfig
from ..configuration.heads_urform import architectures_of
from .caches_urform import cache_field, given_cache
from .kernels.attention_biases import Bias
from .kernels.dropout_bits import dropout
from .layers_urform import (
    SourceWeights,
    UrformAttention,
    UrformEmbedding,
    UrformLayer,
    UrformPositionBias,
    UrformRotaryEmbedding,
    build_norm,
    sinusoidal_positions,
)
from .parallel_urform import refuse_uneven
from .plan_urform import Masked, Packed, Plan, Route, choose_route
from .sequences_urform import ALONE, SOURCE, TARGET, Sequences, self_attention_cache, sequence_lengths
from .stock_models.attention_interface import register_attention

logger = logging.get_logger(__name__)
register_attention()  # remote code never runs the package's __init__


class UrformPreTrainedModel(BundledCodeMixin, PreTrainedModel):  # type: ignore[misc]  # push_to_hub takes what the three libraries' take
    """What every Urform model shares: flags for the library, weight init, tied embeddings."""

    config: UrformConfig
    base_model_prefix = "model"
    input_modalities = ("text",)  # type: ignore[assignment]  # as the library's own models
    supports_gradient_checkpointing = True
    _no_split_modules = ["UrformLayer"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    def __init__(self, config: UrformConfig, *args: Any, **kwargs: Any):
        served = architectures_of(type(self))
        if getattr(config, "architecture", None) not in served:
            raise ValueError(
                f"{type(self).__name__} serves architecture {' or '.join(map(repr, served))}, "
                f"but config.architecture={getattr(config, 'architecture', None)!r}; "
                "choose another head or another architecture"
            )
        super().__init__(config, *args, **kwargs)

    @property
    def _supports_sdpa(self) -> bool:  # type: ignore[override]  # the library only reads these
        return self.config.attn_logit_softcapping is None  # PyTorch's kernels have no softcap

    @property
    def _supports_flash_attn(self) -> bool:  # type: ignore[override]
        """Return whether transformers' flash attention is right here.

        It un-pads cross-attention's queries with the keys' mask, and has no position bias.
        """
        return not self.config.is_encoder_decoder and self.config.position_encoding not in ("alibi", "t5")

    def set_attn_implementation(self, attn_implementation: str | dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """Set the attention as the library does, and remember that it was named: the default's own name counts too."""
        before = self.config._attn_implementation
        super().set_attn_implementation(attn_implementation, *args, **kwargs)
        named = attn_implementation.get("") if isinstance(attn_implementation, dict) else attn_implementation
        if named is not None and (named == before or self.config._attn_implementation != before):
            self.config._names_attention = True

    def init_parallel_plans(self) -> None:
        """Keep of the config's plans, which serve every stack, what matches a module of this model."""
        super().init_parallel_plans()
        names = {re.sub(r"\.\d+(?=\.|$)", ".*", name) for name, _ in self.named_modules()}
        for plan in ("_tp_plan", "_pp_plan", "_fsdp_plan"):
            entries = getattr(self, plan) or {}
            kept = {k: v for k, v in entries.items() if names.issuperset((k,) if isinstance(k, str) else k)}
            setattr(self, plan, kept)

    @classmethod
    def maybe_distribute_model(cls, model: Any, distributed_config: Any, *args: Any, **kwargs: Any) -> Any:
        """Distribute as the library does; refuse sizes that cannot be split before weights are loaded."""
        if distributed_config is not None and distributed_config.tp_size > 1 and distributed_config.tp_plan != {}:
            refuse_uneven(model.config, distributed_config.tp_size)
        return super().maybe_distribute_model(model, distributed_config, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: Any) -> None:
        super()._init_weights(module)
        config = self.config
        std = getattr(module, "_init_std", None)
        if std is not None:
            init.normal_(module.weight, mean=0.0, std=std)
        elif isinstance(module, nn.Linear) and config.initializer == "xavier":
            init.xavier_uniform_(module.weight)
        elif isinstance(module, UrformEmbedding):
            if config.initializer in ("xavier", "t5"):
                init.normal_(module.weight, 0.0, 1.0 if config.initializer == "t5" else config.hidden_size**-0.5)
                if module.padding_idx is not None and not getattr(module.weight, "_is_hf_initialized", False):
                    init.zeros_(module.weight[module.padding_idx])
        elif getattr(module, "offset", 0.0):
            init.constant_(module.weight, 1.0 - module.offset)
        elif isinstance(module, SourceWeights):
            for buffer in module.buffers():
                init.zeros_(buffer)

    @property
    def _tied_weights_keys(self) -> dict[str, str]:  # type: ignore[override]
        """Return which parameters are one: shared embeddings, a tied output projection, or both, as the config says."""
        config, tied = self.config, {}
        if config.is_encoder_decoder and config.share_embeddings and hasattr(self, "decoder"):
            tied["decoder.embed_tokens.weight"] = "encoder.embed_tokens.weight"
        if config.tie_word_embeddings and hasattr(self, "lm_head"):
            first = config.architecture == "encoder" or (config.is_encoder_decoder and config.share_embeddings)
            tied["lm_head.weight"] = f"model.{'encoder' if first else 'decoder'}.embed_tokens.weight"
        return tied

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        """Return the tied parameters; sharing between the stacks does not depend on `tie_word_embeddings`."""
        return super().get_expanded_tied_weights_keys(all_submodels=True) if all_submodels else self._tied_weights_keys

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """Resize as the library does; a decoder with a table of its own grows along."""
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        if self.config.is_encoder_decoder and not self.config.share_embeddings and (decoder := self.get_decoder()):
            own = decoder.embed_tokens
            if own.num_embeddings != embeddings.num_embeddings:
                decoder.embed_tokens = self._get_resized_embeddings(own, embeddings.num_embeddings)
                self.tie_weights()  # an output projection tied to it follows with its bias
        return embeddings


class UrformStack(UrformPreTrainedModel):
    """Embeddings, layers and final norm: the encoder or the decoder. Use `UrformEncoder` or `UrformDecoder`."""

    is_decoder: bool
    _tp_plan = {"embed_tokens": "embedding_rowwise", **UrformConfig.base_model_tp_plan}

    def __init__(self, config: UrformConfig):
        super().__init__(config)
        sizes = config.stack_sizes(self.is_decoder)
        self.layer_types = sizes.layer_types
        scale = math.sqrt(config.hidden_size) if config.scale_embedding else 1.0
        pad = config.pad_token_id if config.freeze_pad_embedding else None
        self.embed_tokens = UrformEmbedding(config.vocab_size, config.hidden_size, pad, scale)
        self.embed_positions = self.embed_token_types = self.embed_norm = None
        self.rotary_emb = self.position_bias = self.norm = None
        if config.position_encoding == "learned":
            rows = config.max_position_embeddings + config.position_offset
            of_pad = config.position_offset - 1 if config.position_counting == "tokens" and pad is not None else None
            self.embed_positions = nn.Embedding(rows, config.hidden_size, of_pad)
        if config.type_vocab_size:
            self.embed_token_types = nn.Embedding(config.type_vocab_size, config.hidden_size)
        if config.embedding_norm:
            self.embed_norm = build_norm(config)
        if config.position_encoding == "rope":
            kinds = sorted(set(sizes.layer_types))
            self.rotary_emb = nn.ModuleDict({kind: UrformRotaryEmbedding(config, kind) for kind in kinds})
        if config.position_encoding in ("alibi", "t5"):
            self.position_bias = UrformPositionBias(config, self.is_decoder)
        self.layers = nn.ModuleList([UrformLayer(config, i, self.is_decoder) for i in range(sizes.num_hidden_layers)])
        if config.final_norm or (config.final_norm is None and config.norm_position != "post"):
            self.norm = build_norm(config)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        sequences: Sequences,
        token_type_ids: Tensor | None,
        memory: Sequences | None,
        cache: Cache | None,
        keywords: dict[str, Any],
    ) -> Tensor:
        """Compute final hidden states `[B, L, E]`: embed, layers, norm; `memory` holds the encoder's states."""
        kinds = frozenset(self.layer_types)
        route = choose_route(self.config, kinds, self.is_decoder, sequences, memory, keywords)
        hidden = self.embed(sequences, token_type_ids, route)
        states = None if memory is None else route.enter_source(memory.tokens)
        plans = self.plans(hidden, sequences, states, route)
        biases = {} if self.position_bias is None else self.position_biases(hidden, sequences, route)
        for layer in self.layers:
            kind = cast(str, layer.layer_type)
            hidden = layer(hidden, plans[kind], states, biases.get(kind), cache=cache)
        if self.norm is not None:
            hidden = self.norm(hidden)
        return route.leave(hidden)

    def embed(self, sequences: Sequences, token_type_ids: Tensor | None, route: Route) -> Tensor:
        """Embed tokens, their types and absolute positions."""
        tokens = sequences.tokens
        if tokens.ndim == 3:
            hidden = route.enter(tokens)
        elif self.embed_tokens._forward_hooks:  # what a hook adds (NEFTune's noise) may depend on the batch's shape
            hidden = route.enter(self.embed_tokens(tokens))
        else:
            hidden = self.embed_tokens(route.enter(tokens))
        if self.embed_token_types is not None:
            zeros = torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)
            hidden = hidden + self.embed_token_types(zeros if token_type_ids is None else route.enter(token_type_ids))
        if self.config.position_encoding in ("sinusoidal", "learned"):
            hidden = self._add_positions(hidden, route.enter(sequences.positions))
        if self.embed_norm is not None:
            hidden = self.embed_norm(hidden)
        return dropout(hidden, self.config.hidden_dropout_prob, self.training)

    def sinusoids(self, position_ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Compute the sinusoids of positions `[B, L]`; on a CPU those of each position once."""
        config, places, index = self.config, position_ids, None
        if position_ids.device.type == "cpu" and not is_tracing(position_ids):
            first, last = (int(x) for x in position_ids.aminmax())
            if last - first < position_ids.numel():
                places, index = torch.arange(first, last + 1), position_ids - first
        sinusoids = sinusoidal_positions(
            places + config.position_offset, config.hidden_size, dtype, config.sinusoidal_layout
        )
        if config.position_counting == "tokens":  # padding, at -1, has none
            sinusoids = sinusoids * (places >= 0)[..., None]
        return sinusoids if index is None else sinusoids[index]

    def _add_positions(self, hidden: Tensor, position_ids: Tensor) -> Tensor:
        """Add absolute positions `[B, L]`; raise ValueError for those beyond a learned table."""
        if self.embed_positions is None:
            return hidden + self.sinusoids(position_ids, hidden.dtype)
        try:
            return hidden + self.embed_positions(position_ids + self.config.position_offset)
        except IndexError as error:
            first, last = (int(x) for x in position_ids.aminmax())
            longest = self.config.max_position_embeddings
            raise ValueError(
                f"position {first if first < 0 else last} is beyond the learned table of max_position_embeddings="
                f"{longest}; truncate the input (tokenizer: truncation=True, max_length={longest}) or configure a "
                "longer table"
            ) from error

    def plans(self, hidden: Tensor, sequences: Sequences, states: Tensor | None, route: Route) -> dict[str, Plan]:
        """Return what each type of layer is told."""
        kinds, cos_sin, lengths = sorted(set(self.layer_types)), {}, None
        own, cross = route.masks(hidden, states, kinds) if isinstance(route, Masked) else (route.own, route.cross)
        if self.rotary_emb is not None:
            positions = route.enter(sequences.positions)
            if any(module.depends_on_length for module in self.rotary_emb.values()):
                lengths = self.rope_lengths(positions, sequences, route)
            for kind, rotary in self.rotary_emb.items():
                cos, sin = rotary(hidden, positions, lengths)
                low, high = sin.chunk(2, dim=-1)
                cos_sin[kind] = (cos[:, None], torch.cat((-low, high), dim=-1)[:, None])
        return {kind: Plan(own[kind], cross, cos_sin.get(kind)) for kind in kinds}

    def rope_lengths(self, positions: Tensor, sequences: Sequences, route: Route) -> Tensor:
        """Return the lengths `[B, L]` on which the rotary frequencies of each token depend."""
        if self.config.rope_length == "batch":
            return (positions.amax() + 1).expand_as(positions)
        documents = route.layout.sequences[None] if isinstance(route, Packed) else sequences.documents
        return sequence_lengths(positions, documents)

    def position_biases(self, hidden: Tensor, sequences: Sequences, route: Route) -> dict[str, Tensor | Bias]:
        """Return the position bias for each type of layer: an object where packed, else `[B, H, L, S]`."""
        bias = self.position_bias
        if bias is None:
            return {}
        if isinstance(route, Packed):
            return dict.fromkeys(self.layer_types, bias.bias(hidden.device))
        batch, length = hidden.shape[:2]
        queries = torch.arange(length, device=hidden.device) + sequences.past
        biases: dict[str, Tensor | Bias] = {}
        for kind in set(self.layer_types):
            keys, offset = length, 0
            if sequences.cache is not None:  # a sliding cache holds fewer keys
                keys, offset = sequences.cache.get_mask_sizes(length, self.layer_types.index(kind))
            places = torch.arange(keys, device=hidden.device) + offset
            biases[kind] = bias(queries[None], places[None], hidden.dtype).expand(batch, -1, -1, -1)
        return biases

    def layers_cache(self, cache: Cache) -> Cache | None:
        """Return the cache that the layers get: none under activation checkpointing, which would fill it twice.

        Raises:
            ValueError: the cache holds tokens, which would be lost.
        """
        if not (self.gradient_checkpointing and self.training):
            return cache
        if cache.get_seq_length() > 0:
            raise ValueError(
                "past_key_values holds tokens, which activation checkpointing cannot read; call model.eval(), or "
                "model.gradient_checkpointing_disable()"
            )
        logger.warning_once("activation checkpointing fills no cache: past_key_values stays empty")
        return None


class UrformEncoder(UrformStack):
    """Bidirectional stack."""

    is_decoder = False
    _can_record_outputs = {
        "hidden_states": UrformLayer,
        "attentions": OutputRecorder(UrformAttention, index=1, layer_name="self_attn"),
    }

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        sequences: Sequences | None = None,
        **kwargs: Any,
    ) -> BaseModelOutput:
        """See `UrformModel.forward`; `past_key_values` is a prefix that every token sees (Li & Liang 2021).

        `sequences` is what the masks and positions say, where a model has decided it already.
        """
        if past_key_values is not None:
            cache = given_cache(past_key_values, cache)
        if cache is not None:
            cache = self.layers_cache(cache)
        if sequences is None:
            sequences = Sequences.of(
                self.config, input_ids, inputs_embeds, attention_mask, position_ids, kwargs, cache=cache
            )
        states = super().forward(sequences, token_type_ids, None, cache, kwargs)
        return BaseModelOutput(last_hidden_state=states)


class UrformDecoder(UrformStack):
    """Causal stack; with an encoder it reads the encoder's states through cross-attention."""

    is_decoder = True
    _can_record_outputs = {
        "hidden_states": UrformLayer,
        "attentions": OutputRecorder(UrformAttention, index=1, layer_name="self_attn"),
        "cross_attentions": OutputRecorder(UrformAttention, index=1, layer_name="cross_attn"),
    }

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        sequences: Sequences | None = None,
        memory: Sequences | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        """See `UrformModel`; `sequences` and `memory` (the encoder's states) are for a model that has decided them."""
        config = self.config
        if past_key_values is not None:
            cache = given_cache(past_key_values, cache)
        if cache is not None or use_cache:
            cache = self.prepare_cache(cache)
        layers_cache = None if cache is None else self.layers_cache(cache)
        if config.is_encoder_decoder and memory is None:
            if encoder_hidden_states is None:
                raise ValueError("encoder_hidden_states is None; the decoder of an encoder-decoder needs them")
            memory = Sequences.of(config, None, encoder_hidden_states, encoder_attention_mask, None, {}, SOURCE)
        if sequences is None:
            role = TARGET if config.is_encoder_decoder else ALONE
            sequences = Sequences.of(
                config, input_ids, inputs_embeds, attention_mask, position_ids, kwargs, role, layers_cache
            )
        elif cache is not None:  # made here, or kept from the layers
            own = None if layers_cache is None else self_attention_cache(layers_cache)
            sequences = replace(sequences, cache=own)
        states = super().forward(sequences, None, memory, layers_cache, kwargs)
        return BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=states, **cache_field(cache if use_cache else None)
        )

    def prepare_cache(self, cache: Cache | None) -> Cache:
        """Return the cache to fill: the given one, or a new one.

        Raises:
            ValueError: an encoder-decoder was given a cache for one stack.
        """
        pairs = self.config.is_encoder_decoder
        if cache is None:
            own = DynamicCache(config=self.config)  # the cross-attention's cache slides for no layer
            return EncoderDecoderCache(own, DynamicCache()) if pairs else own
        if pairs and not isinstance(cache, EncoderDecoderCache):
            raise ValueError(
                f"past_key_values is a {type(cache).__name__}; an encoder-decoder needs an "
                "EncoderDecoderCache(self_attention_cache, cross_attention_cache)"
            )
        return cache
