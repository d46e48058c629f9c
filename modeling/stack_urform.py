# Copyright 2026 The Urform authors. Licensed under the Apache License, Version 2.0.
"""The stack: embeddings, positions, masks, the layers of `layers_urform.py`, final norm.

Padding and packing are settled here, once per stack and before its layers: positions count real tokens only,
documents never see each other, source and target have masks of their own.

Shapes: B batch, L length, S source length, E hidden.
"""

import copy
import math
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.masking_utils import (
    create_bidirectional_mask,
    create_bidirectional_sliding_window_mask,
    create_causal_mask,
    create_sliding_window_causal_mask,
)
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPastAndCrossAttentions
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import logging
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.import_utils import is_tracing
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from ..configuration.bundle_urform import BundledCodeMixin
from ..configuration.configuration_urform import UrformConfig
from ..configuration.heads_urform import architectures_of
from .caches_urform import CACHE, cache_field, given_cache
from .kernels.attention_layouts import Layout
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
    turns,
)
from .packing_urform import (
    Packing,
    check_pairs,
    check_starts,
    find_documents,
    find_packing,
    find_positions,
    refuse_unpaired,
    same_document,
    sequence_lengths,
    source_layout,
    takes_layouts,
)
from .parallel_urform import refuse_uneven
from .stock_models.attention_interface import register_attention

logger = logging.get_logger(__name__)
register_attention()  # remote code never runs the package's __init__

_MASKS: dict[tuple[str, bool], Callable] = {
    ("full_attention", True): create_causal_mask,
    ("full_attention", False): create_bidirectional_mask,
    ("sliding_attention", True): create_sliding_window_causal_mask,
    ("sliding_attention", False): create_bidirectional_sliding_window_mask,
}


class UrformPreTrainedModel(BundledCodeMixin, PreTrainedModel):
    """What every Urform model shares: flags for the library, weight init, tied embeddings."""

    config: UrformConfig
    base_model_prefix = "model"
    input_modalities = ("text",)
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
    def _supports_sdpa(self) -> bool:
        return self.config.attn_logit_softcapping is None  # PyTorch's kernels have no softcap

    @property
    def _supports_flash_attn(self) -> bool:
        """Whether transformers' flash attention is right here.

        It un-pads cross-attention's queries with the keys' mask, and has no position bias.
        """
        return not self.config.is_encoder_decoder and self.config.position_encoding not in ("alibi", "t5")

    def set_attn_implementation(self, attn_implementation: str | dict, *args: Any, **kwargs: Any) -> None:
        """As the library's, which takes a name equal to the default's for no change."""
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
        """As the library's; refuses sizes that tensor parallelism cannot split, before weights are loaded."""
        if distributed_config is not None and distributed_config.tp_size > 1 and distributed_config.tp_plan != {}:
            refuse_uneven(model.config, distributed_config.tp_size)
        return super().maybe_distribute_model(model, distributed_config, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
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
    def _tied_weights_keys(self) -> dict[str, str]:
        """Which parameter is which, as the config says: shared embeddings, tied output projection, both."""
        config, tied = self.config, {}
        if config.is_encoder_decoder and config.share_embeddings and hasattr(self, "decoder"):
            tied["decoder.embed_tokens.weight"] = "encoder.embed_tokens.weight"
        if config.tie_word_embeddings and hasattr(self, "lm_head"):
            first = config.architecture == "encoder" or (config.is_encoder_decoder and config.share_embeddings)
            tied["lm_head.weight"] = f"model.{'encoder' if first else 'decoder'}.embed_tokens.weight"
        return tied

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        """As the library's, but sharing between encoder and decoder does not depend on `tie_word_embeddings`."""
        return super().get_expanded_tied_weights_keys(all_submodels=True) if all_submodels else self._tied_weights_keys

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """As the library's; a decoder with a table of its own grows along."""
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        if self.config.is_encoder_decoder and not self.config.share_embeddings and (decoder := self.get_decoder()):
            own = decoder.embed_tokens
            if own.num_embeddings != embeddings.num_embeddings:
                decoder.embed_tokens = self._get_resized_embeddings(own, embeddings.num_embeddings)
                self.tie_weights()  # an output projection tied to it follows with its bias
        return embeddings


def _bool_mask(mask: Any) -> Any:
    """A padding mask `[B, S]` in a float type, as PEFT's prefixes make it, in bool; any other mask as it is."""
    return mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 and mask.is_floating_point() else mask


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

    def _check_inputs(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> None:
        if (input_ids is None) == (inputs_embeds is None):
            side = "decoder_" if self.is_decoder and self.config.is_encoder_decoder else ""
            raise ValueError(f"Give exactly one of {side}input_ids and {side}inputs_embeds")
        if inputs_embeds is None:
            self._check_ids(input_ids)
        elif inputs_embeds.ndim != 3 or inputs_embeds.shape[-1] != self.config.hidden_size or 0 in inputs_embeds.shape:
            raise ValueError(
                f"inputs_embeds must be [batch, length, hidden_size={self.config.hidden_size}] with at least one "
                f"token, got {list(inputs_embeds.shape)}"
            )

    def _embed(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        token_type_ids: Tensor | None,
        packing: Packing | None,
    ) -> Tensor:
        def take(x: Tensor) -> Tensor:
            return x if packing is None else packing.pack(x)

        if inputs_embeds is not None:
            embeds = take(inputs_embeds)
        else:
            # What a hook adds (NEFTune's noise) may depend on the batch's shape.
            hooked = bool(self.embed_tokens._forward_hooks)
            ids = input_ids if hooked else take(input_ids)
            if hasattr(self.embed_tokens.weight, "placements") and not is_tracing(ids):
                self._check_vocabulary(ids)  # a lookup in a sharded table gives zeros for what no shard has
            try:
                embeds = self.embed_tokens(ids)
            except IndexError:
                self._check_vocabulary(ids)
                raise
            embeds = take(embeds) if hooked else embeds
        if self.embed_token_types is not None:
            if token_type_ids is None:
                types = torch.zeros(embeds.shape[:2], dtype=torch.long, device=embeds.device)
            else:
                types = take(token_type_ids)
            embeds = embeds + self.embed_token_types(types)
        return embeds

    def _check_past(self, mask: Tensor | None, past: int | Tensor, length: int) -> None:
        """Refuse a 2D mask that does not cover what the cache holds: which keys it means would be a guess."""
        if mask is not None and isinstance(past, int) and past > 0 and mask.shape[1] < past + length:
            name = "decoder_attention_mask" if self.is_decoder and self.config.is_encoder_decoder else "attention_mask"
            raise ValueError(
                f"{name} covers {mask.shape[1]} tokens, but the cache holds {past} and {length} more come; give a mask "
                f"of {past + length}, or none"
            )

    def _check_vocabulary(self, input_ids: Tensor) -> None:
        rows = self.embed_tokens.num_embeddings
        low, high = (int(x) for x in input_ids.aminmax()) if input_ids.numel() else (0, 0)
        if low < 0 or high >= rows:
            raise ValueError(
                f"input_ids holds {low if low < 0 else high}, outside 0..{rows - 1}; "
                "the tokenizer is larger than vocab_size: call model.resize_token_embeddings(len(tokenizer))"
            )

    def _check_ids(self, input_ids: Tensor) -> None:
        if input_ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"input_ids must be int64 or int32 token ids, got {input_ids.dtype}; call .long() on ids")
        if input_ids.ndim != 2 or 0 in input_ids.shape:
            raise ValueError(f"input_ids must be [batch, length] with at least one token, got {list(input_ids.shape)}")

    def _waves(self, position_ids: Tensor, dtype: torch.dtype) -> Tensor:
        """The sinusoids of positions `[B, L]`; on a CPU those of each position are computed once."""
        config, places, index = self.config, position_ids, None
        if position_ids.device.type == "cpu" and not is_tracing(position_ids):
            first, last = (int(x) for x in position_ids.aminmax())
            if last - first < position_ids.numel():
                places, index = torch.arange(first, last + 1), position_ids - first
        waves = sinusoidal_positions(
            places + config.position_offset, config.hidden_size, dtype, config.sinusoidal_layout
        )
        if config.position_counting == "tokens":  # padding, at -1, has none
            waves = waves * (places >= 0)[..., None]
        return waves if index is None else waves[index]

    def _add_positions(self, embeds: Tensor, position_ids: Tensor) -> Tensor:
        config = self.config
        if config.position_encoding == "sinusoidal":
            return embeds + self._waves(position_ids, embeds.dtype)
        if self.embed_positions is None:
            return embeds
        try:
            return embeds + self.embed_positions(position_ids + config.position_offset)
        except IndexError as error:
            first, last = (int(x) for x in position_ids.aminmax())
            raise ValueError(
                f"position {first if first < 0 else last} is beyond the learned table of max_position_embeddings="
                f"{config.max_position_embeddings}; truncate the input (tokenizer: truncation=True, max_length="
                f"{config.max_position_embeddings}) or configure a longer table"
            ) from error

    def _rope_lengths(self, position_ids: Tensor, documents: Tensor | None) -> Tensor | None:
        """The lengths `[B, L]` on which rotary frequencies depend, where there are such."""
        if self.rotary_emb is None or not any(module.depends_on_length for module in self.rotary_emb.values()):
            return None
        if self.config.rope_length == "batch":
            return (position_ids.amax() + 1).expand_as(position_ids)
        return sequence_lengths(position_ids, documents)

    def _masks(
        self, config: UrformConfig, embeds: Tensor, attention_mask: Any, cache: Cache | None, documents: Tensor | None
    ) -> dict[str, Any]:
        """One mask per layer type, in the form that the attention implementation wants."""
        if isinstance(attention_mask, dict):
            return attention_mask
        own = None if documents is None else same_document(documents, documents)
        return {
            kind: _MASKS[kind, self.is_decoder](
                config=config,
                inputs_embeds=embeds,
                attention_mask=attention_mask,
                and_mask_function=own,
                **{CACHE: cache},
            )
            for kind in set(self.layer_types)
        }

    def _biases(self, embeds: Tensor, cache: Cache | None, past_length: int | Tensor) -> dict[str, Tensor]:
        """The position bias `[B, H, L, S]` per layer type (a sliding cache holds fewer keys); none: an empty dict."""
        if self.position_bias is None:
            return {}
        batch, length = embeds.shape[:2]
        queries = torch.arange(length, device=embeds.device) + past_length
        biases = {}
        for kind in set(self.layer_types):
            keys, offset = length, 0
            if cache is not None:
                keys, offset = cache.get_mask_sizes(length, self.layer_types.index(kind))
            places = torch.arange(keys, device=embeds.device) + offset
            biases[kind] = self.position_bias(queries[None], places[None], embeds.dtype).expand(batch, -1, -1, -1)
        return biases

    def _records(self, kwargs: dict[str, Any], *names: str) -> bool:
        """Whether the caller or the config asks for these outputs of every layer."""
        flags = (f"output_{name}" for name in names)
        wanted = (kwargs.get(flag, getattr(self.config, flag, None)) for flag in flags)
        return any(want is not None and want is not False for want in wanted)

    def _needs_eager(self, kwargs: dict[str, Any]) -> bool:
        """Whether this call takes eager attention, which alone returns weights, instead of what is configured."""
        if not self._records(kwargs, "attentions", "cross_attentions"):
            return False
        named = str(self.config._attn_implementation)
        if named == "eager":
            return False
        if not takes_layouts(self.config) and named != "sdpa":
            logger.warning_once(f"attn_implementation={named!r} returns no attention weights; set 'eager' to see them")
            return False
        logger.warning_once("output_attentions=True: this call uses eager attention, which alone returns weights")
        return True

    def _packing(
        self, given: Tensor, attention_mask: Any, cache: Cache | None, documents: Tensor | None, **kwargs: Any
    ) -> Packing | None:
        """The batch without padding, where the attention takes layouts and nobody reads padded tensors on the way."""
        if cache is not None or not takes_layouts(self.config) or is_tracing(given):
            return None
        if self._records(kwargs, "hidden_states", "attentions", "cross_attentions"):
            return None
        mask, packed = attention_mask, kwargs.get("cu_seq_lens_q")
        if mask is not None and (not isinstance(mask, Tensor) or mask.shape != given.shape[:2] or packed is not None):
            return None
        packing = find_packing(tuple(given.shape[:2]), mask, documents, packed, given.device)
        return None if packing.is_empty else packing

    def _run(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        attention_mask: Any,
        position_ids: Tensor | None,
        token_type_ids: Tensor | None = None,
        cache: Cache | None = None,
        cross: tuple[Tensor, Tensor | None, Tensor | None] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Inputs to final hidden states; `cross` holds the encoder's states, padding mask and documents."""
        self._check_inputs(input_ids, inputs_embeds)
        given = input_ids if inputs_embeds is None else inputs_embeds
        attention_mask = _bool_mask(attention_mask)
        if cross is not None:
            cross = (cross[0], _bool_mask(cross[1]), cross[2])
        mask = attention_mask if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2 else None
        past = cache.get_seq_length() if cache is not None else 0
        packed = kwargs.get("cu_seq_lens_q")
        if packed is not None:
            check_starts(packed, *given.shape[:2])
        self._check_past(mask, past, given.shape[1])
        has_past = isinstance(past, Tensor) or past > 0
        documents = find_documents(given.shape[1], None if has_past else position_ids, mask, packed)
        packing = self._packing(given, attention_mask, cache, documents, **kwargs)
        source = None
        if packing is not None and cross is not None:
            source = self._source_packing(packing, *cross)
            packing = None if source is None else packing

        embeds = self._embed(input_ids, inputs_embeds, token_type_ids, packing)
        laid_out = packing is not None and (self.config.position_counting == "mask" or packed is not None)
        if position_ids is None and not laid_out:
            position_ids = find_positions(given, mask, packed, documents, past, input_ids, self.config)
        if packing is not None and position_ids is None:
            position_ids = packing.layout.positions[None]
        elif packing is not None:
            position_ids = packing.pack(position_ids.expand(packing.shape))
        hidden_states = self._add_positions(embeds, position_ids)
        if self.embed_norm is not None:
            hidden_states = self.embed_norm(hidden_states)
        hidden_states = dropout(hidden_states, self.config.hidden_dropout_prob, self.training)

        rotary = self.rotary_emb.items() if self.rotary_emb is not None else ()
        lengths = self._rope_lengths(position_ids, documents if packing is None else packing.layout.sequences[None])
        angles = {kind: turns(*module(hidden_states, position_ids, lengths)) for kind, module in rotary}
        encoder_hidden_states = None if cross is None else cross[0]
        masks: dict[str, Any] = {}
        biases: dict[str, Any] = {}
        if packing is not None:
            packed_keywords = ("cu_seq_lens_", "max_length_")
            kwargs = {key: value for key, value in kwargs.items() if not key.startswith(packed_keywords)}
            kwargs["q_layout"] = packing.layout
            if self.position_bias is not None:
                biases = dict.fromkeys(self.layer_types, self.position_bias.bias(embeds.device))
            if source is not None:
                kwargs["encoder_layout"] = source.layout
                encoder_hidden_states = source.pack(encoder_hidden_states)
        else:
            biases = self._biases(embeds, cache, past)
            layouts = None
            if not self._records(kwargs, "attentions", "cross_attentions"):
                layouts = self._cached_layouts(embeds, attention_mask, cache, documents, cross)
            if layouts is not None:
                kwargs.update(layouts)
            else:
                config = self.config
                if self._needs_eager(kwargs):
                    kwargs["implementation"] = "eager"
                    config = copy.copy(config)
                    config._attn_implementation_internal = "eager"
                masks = self._masks(config, embeds, attention_mask, cache, documents)
                if cross is not None:
                    states, cross_mask = cross[0], cross[1:]
                    kwargs["encoder_attention_mask"] = self._cross_mask(config, embeds, states, documents, *cross_mask)
                if documents is not None:
                    kwargs["position_ids"] = position_ids  # by these flash attention tells documents apart
        for layer in self.layers:  # what needs gradients goes by position: reentrant checkpointing sees only those
            hidden_states = layer(
                hidden_states,
                masks.get(layer.layer_type),
                encoder_hidden_states,
                biases.get(layer.layer_type),
                position_embeddings=angles.get(layer.layer_type),
                **kwargs,
            )
        if self.norm is not None:
            hidden_states = self.norm(hidden_states)
        if packing is not None:
            return packing.unpack(hidden_states)
        if cache is None and mask is not None and mask.shape == given.shape[:2] and takes_layouts(self.config):
            return hidden_states.masked_fill(
                mask[..., None].to(hidden_states.device) == 0, 0.0
            )  # as where it is packed
        return hidden_states

    def _cached_layouts(
        self,
        embeds: Tensor,
        attention_mask: Any,
        cache: Cache | None,
        documents: Tensor | None,
        cross: tuple[Tensor, Tensor | None, Tensor | None] | None,
    ) -> dict[str, Layout] | None:
        """What a decoding step needs instead of masks, where a growing cache holds every key; else None."""
        mask = attention_mask
        if type(cache) is not DynamicCache or set(self.layer_types) != {"full_attention"} or documents is not None:
            return None
        if not takes_layouts(self.config) or is_tracing(embeds):
            return None
        (batch, length), keys = embeds.shape[:2], cache.get_seq_length() + embeds.shape[1]
        if mask is not None and (not isinstance(mask, Tensor) or mask.shape != (batch, keys)):
            return None
        if mask is None or length == 1:  # a single query stands at the end of its row
            layouts = {"q_layout": Layout.full(batch, length, embeds.device)}
        elif bool((mask[:, -1] == 0).any()):  # padding on the right, from which generation would go on
            return None
        else:
            layouts = {"q_layout": Layout.padded(mask[:, -length:], finite=True)}
        if mask is None:
            layouts["kv_layout"] = Layout.full(batch, keys, embeds.device)
        else:
            layouts["kv_layout"] = Layout.padded(mask, finite=True)
        if cross is not None:
            states, source_mask, source_documents = cross
            if source_documents is not None or (source_mask is not None and source_mask.shape != states.shape[:2]):
                return None
            layouts["encoder_layout"] = source_layout(states, source_mask)
        return layouts

    def _source_packing(
        self,
        packing: Packing,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor | None,
        encoder_documents: Tensor | None,
    ) -> Packing | None:
        """The encoder's states without padding, paired with the target's sequences; None: their mask is no 2D one."""
        shape = encoder_hidden_states.shape[:2]
        if encoder_attention_mask is not None and encoder_attention_mask.shape != shape:
            return None
        device = encoder_hidden_states.device
        source = find_packing(tuple(shape), encoder_attention_mask, encoder_documents, None, device)
        check_pairs(packing, source)
        return None if source.is_empty else source

    def _cross_mask(
        self,
        config: UrformConfig,
        embeds: Tensor,
        encoder_hidden_states: Tensor,
        documents: Tensor | None,
        encoder_attention_mask: Tensor | None,
        encoder_documents: Tensor | None,
    ) -> Any:
        """The mask of cross-attention: padding of the source, and each target document its own source document."""
        same = None
        if documents is not None or encoder_documents is not None:
            sides = [documents, encoder_documents]
            for i, states in enumerate((embeds, encoder_hidden_states)):
                if sides[i] is None:
                    sides[i] = torch.zeros(states.shape[:2], dtype=torch.long, device=states.device)
            ends = [side[:, -1] + 1 for side in sides]
            if not is_tracing(ends[0]):
                refuse_unpaired(*ends)
            same = same_document(*sides)
        return create_bidirectional_mask(
            config=config,
            inputs_embeds=embeds,
            attention_mask=encoder_attention_mask,
            encoder_hidden_states=encoder_hidden_states,
            and_mask_function=same,
        )


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
        **kwargs: Any,
    ) -> BaseModelOutput:
        """See `UrformModel.forward`; `past_key_values` is a prefix that every token sees (Li & Liang 2021)."""
        cache = given_cache(past_key_values, cache)
        if cache is not None:
            kwargs.update(past_key_values=cache, cache=cache)
        states = self._run(input_ids, inputs_embeds, attention_mask, position_ids, token_type_ids, **kwargs)
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
        encoder_documents: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        """See `UrformModel.forward`; `encoder_documents` `[B, S]` numbers the documents of packed sources."""
        if self.config.is_encoder_decoder and encoder_hidden_states is None:
            raise ValueError("encoder_hidden_states is None; the decoder of an encoder-decoder needs them")
        past_key_values = given_cache(past_key_values, cache)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
            if self.config.is_encoder_decoder:  # the cross-attention's cache slides for no layer
                past_key_values = EncoderDecoderCache(past_key_values, DynamicCache())
        if self.config.is_encoder_decoder and not isinstance(past_key_values, EncoderDecoderCache | None):
            raise ValueError(
                f"past_key_values is a {type(past_key_values).__name__}; an encoder-decoder needs an "
                "EncoderDecoderCache(self_attention_cache, cross_attention_cache)"
            )
        cache = past_key_values
        if isinstance(past_key_values, EncoderDecoderCache):
            cache = past_key_values.self_attention_cache
        cross = None
        if encoder_hidden_states is not None:
            cross = (encoder_hidden_states, encoder_attention_mask, encoder_documents)
        kwargs.update(past_key_values=past_key_values, use_cache=use_cache)
        hidden_states = self._run(
            input_ids, inputs_embeds, attention_mask, position_ids, cache=cache, cross=cross, **kwargs
        )
        return BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=hidden_states, **cache_field(past_key_values if use_cache else None)
        )
