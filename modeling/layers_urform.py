# Copyright 2026 The Urform authors. Licensed under the Apache License, Version 2.0.
"""The parts of the Transformer: norms, positions, attention, feed-forward, block; and what heads are made of.

One `UrformAttention`, one `UrformMLP` and one `UrformLayer` serve encoder, decoder and encoder-decoder. They read
their axes from the config. Who may see whom comes with the `Plan` that the stack hands to each layer.

Shapes: B batch, L queries, S keys, H heads, G key/value heads, D head dim, E hidden.
"""

import copy
import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.import_utils import is_tracing

from ..configuration.checks_urform import filled
from ..configuration.configuration_urform import UrformConfig
from .kernels.attention_biases import ALiBi, Bias, DenseBias, T5Bias
from .kernels.attention_dispatch import attention
from .kernels.dropout_bits import dropout, dropout_add
from .plan_urform import ByMask, How, Plan


class UrformLayerNorm(nn.Module):
    """LayerNorm (Ba et al. 2016), optionally without bias; the weight is stored less `offset`."""

    def __init__(self, size: int, eps: float, offset: float = 0.0, bias: bool = True):
        super().__init__()
        self.eps, self.offset = eps, offset
        self.weight = nn.Parameter(torch.full((size,), 1.0 - offset))
        self.bias = nn.Parameter(torch.zeros(size)) if bias else None

    def forward(self, hidden: Tensor) -> Tensor:
        weight = self.weight + self.offset if self.offset else self.weight
        return nn.functional.layer_norm(hidden, weight.shape, weight, self.bias, self.eps)


class UrformRMSNorm(nn.Module):
    """RMSNorm (Zhang & Sennrich 2019), computed in at least float32; the weight is stored less `offset`."""

    def __init__(self, size: int, eps: float, offset: float = 0.0):
        super().__init__()
        self.eps, self.offset = eps, offset
        self.weight = nn.Parameter(torch.full((size,), 1.0 - offset))

    def forward(self, hidden: Tensor) -> Tensor:
        if not self.offset:
            return nn.functional.rms_norm(hidden, self.weight.shape, None, self.eps) * self.weight
        wide = torch.promote_types(hidden.dtype, torch.float32)  # Gemma multiplies before it rounds
        weight = self.weight.to(wide) + self.offset
        return nn.functional.rms_norm(hidden.to(wide), weight.shape, weight, self.eps).to(hidden.dtype)


def build_norm(config: UrformConfig) -> nn.Module:
    """Build the norm that the config asks for, over the residual stream."""
    if config.norm_type == "rmsnorm":
        return UrformRMSNorm(config.hidden_size, config.norm_eps, config.norm_offset)
    return UrformLayerNorm(config.hidden_size, config.norm_eps, config.norm_offset, config.norm_bias)


class UrformEmbedding(nn.Embedding):
    """Token embeddings, multiplied by `embed_scale` (Vaswani et al. 2017, section 3.4)."""

    def __init__(self, num_embeddings: int, embedding_dim: int, padding_idx: int | None, embed_scale: float):
        super().__init__(num_embeddings, embedding_dim, padding_idx)
        self.embed_scale = embed_scale

    def forward(self, input_ids: Tensor) -> Tensor:
        if hasattr(self.weight, "placements") and not is_tracing(input_ids):
            self.refuse_unknown(input_ids)  # a lookup in a sharded table gives zeros for what no shard has
        try:
            embeds = super().forward(input_ids)
        except IndexError:
            self.refuse_unknown(input_ids)
            raise
        return embeds if self.embed_scale == 1.0 else embeds * self.embed_scale

    def refuse_unknown(self, input_ids: Tensor) -> None:
        """Raise ValueError for ids outside the table."""
        low, high = (int(x) for x in input_ids.aminmax()) if input_ids.numel() else (0, 0)
        if low < 0 or high >= self.num_embeddings:
            raise ValueError(
                f"input_ids holds {low if low < 0 else high}, outside 0..{self.num_embeddings - 1}; "
                "the tokenizer is larger than vocab_size: call model.resize_token_embeddings(len(tokenizer))"
            )


def sinusoidal_positions(position_ids: Tensor, size: int, dtype: torch.dtype, layout: str = "interleaved") -> Tensor:
    """Compute sinusoids of integer positions `[B, L]`: `[B, L, size]` (Vaswani et al. 2017, section 3.5).

    No table is stored, so no length is too long. `layout` is `config.sinusoidal_layout`. Tensor2tensor and fairseq
    compute in float32.
    """
    half, device = size // 2, position_ids.device
    steps, wide = half, torch.float32 if device.type == "mps" else torch.float64
    if layout == "tensor2tensor":
        steps, wide = half - 1, torch.promote_types(dtype, torch.float32)
    rate = torch.exp(torch.arange(half, device=device, dtype=wide) * -(math.log(10000.0) / steps))
    angle = position_ids[..., None].to(wide) * rate
    if layout == "interleaved":
        return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(-2).to(dtype)
    return torch.cat((angle.sin(), angle.cos()), dim=-1).to(dtype)


class UrformRotaryEmbedding(nn.Module):
    """Cosines and sines of rotary positions (Su et al. 2021), with every scaling that transformers knows.

    The frequencies of "dynamic" and "longrope" depend on a length: of each sequence, or of the batch's longest, as
    `config.rope_length` says. They stay in float32 in whatever dtype the module is.

    Args:
        config: the model's config.
        layer_type: which entry of `rope_parameters` to read where it has one per layer type.
    """

    inv_freq: Tensor
    original_inv_freq: Tensor

    def __init__(self, config: UrformConfig, layer_type: str = "full_attention"):
        super().__init__()
        if config.rope_is_per_layer_type:  # transformers' functions then see the flat form
            config = copy.deepcopy(config)
            config.rope_parameters = filled(config.rope_parameters)[layer_type]
        self.config = config
        self.rope_type = filled(config.rope_parameters)["rope_type"]
        self.frequencies = ROPE_INIT_FUNCTIONS.get(self.rope_type, self.compute_default_rope_parameters)
        self.depends_on_length = self.rope_type in ("dynamic", "longrope")
        inv_freq, self.attention_scaling = self.frequencies(config)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config: UrformConfig, *_: Any, **__: Any) -> tuple[Tensor, float]:
        """Return inverse frequencies of the unscaled form, over the rotated part of the head."""
        rope = filled(config.rope_parameters)
        size = int(config.head_dim * rope.get("partial_rotary_factor", 1.0))
        exponent = torch.arange(0, size, 2, dtype=torch.int64).float() / size
        return 1.0 / rope["rope_theta"] ** exponent, 1.0

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> nn.Module:
        """Move to a device as PyTorch does, but keep the dtype: another one would round the frequencies."""
        exact = {name: getattr(self, name) for name in ("inv_freq", "original_inv_freq")}
        super()._apply(fn, recurse)
        for name, value in exact.items():
            moved = getattr(self, name)
            if moved.dtype != value.dtype:
                setattr(self, name, value.to(moved.device))
        return self

    def _of_length(self, lengths: Tensor) -> Tensor:
        """Return inverse frequencies `[B, L, R / 2]` of tokens whose sequences have these `lengths` `[B, L]`."""
        device = lengths.device
        if self.rope_type == "longrope":
            longest = filled(self.config.rope_parameters)["original_max_position_embeddings"]
            extended, _ = self.frequencies(self.config, device, seq_len=longest + 1)
            return torch.where(lengths[..., None] > longest, extended, self.original_inv_freq.to(device))
        scaled, _ = self.frequencies(self.config, device, seq_len=lengths[..., None])
        within = lengths[..., None] <= self.config.max_position_embeddings  # to the last bit as without scaling
        return torch.where(within, self.original_inv_freq.to(device), scaled)

    @torch.no_grad()
    def forward(self, x: Tensor, position_ids: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Compute cosines and sines `[B, L, R]` of integer positions `[B, L]`, in the dtype of `x`.

        `lengths` `[B, L]` are those of each token's sequence, on which frequencies may depend; None: a row is one.
        """
        wide = torch.promote_types(x.dtype, torch.float32)
        frequencies = self.inv_freq
        if self.depends_on_length:
            rows = (position_ids.amax(-1, keepdim=True) + 1).expand_as(position_ids)
            frequencies = self._of_length(rows if lengths is None else lengths)
        angle = position_ids[..., None].to(wide) * frequencies.to(x.device, wide)
        angle = torch.cat((angle, angle), dim=-1)
        return (angle.cos() * self.attention_scaling).to(x.dtype), (angle.sin() * self.attention_scaling).to(x.dtype)


def rotate(x_BHLD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (i, i + R / 2) of the first R features; the sines of the first half are negative."""
    size = cos.shape[-1]
    if size < x_BHLD.shape[-1]:
        return torch.cat((rotate(x_BHLD[..., :size], cos, sin), x_BHLD[..., size:]), dim=-1)
    return x_BHLD * cos + x_BHLD.roll(size // 2, -1) * sin


def alibi_slopes(num_heads: int) -> list[float]:
    """Return the geometric slopes of Press et al. 2022, section 3, for any number of heads."""
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    if power < num_heads:  # the odd ones of the next power of two fill up
        slopes += [2 ** (-4 * (i + 1) / power) for i in range(0, 2 * (num_heads - power), 2)]
    return slopes


class UrformPositionBias(nn.Module):
    """What a stack adds to its self-attention scores by relative position: ALiBi's slopes or T5's table."""

    def __init__(self, config: UrformConfig, is_decoder: bool):
        super().__init__()
        self.num_heads = config.stack_sizes(is_decoder).num_attention_heads
        self.share = (0, 1)  # which part of the heads, of how many: tensor parallelism splits them
        self.bidirectional = not is_decoder
        self.max_distance = config.relative_attention_max_distance
        self.table = None
        if config.position_encoding == "t5":
            self.table = nn.Embedding(config.relative_attention_num_buckets, self.num_heads)
            self.table._init_std = config.hidden_size**-0.5 if config.initializer == "t5" else None  # type: ignore[assignment]

    def bias(self, device: torch.device) -> ALiBi | T5Bias:
        """Return the bias as an object, as `attention()` takes it."""
        rank, parts = self.share
        if self.table is None:
            return ALiBi(torch.tensor(alibi_slopes(self.num_heads), device=device).chunk(parts)[rank])
        table: Any = self.table.weight
        table = table if parts == 1 else table.to_local()
        return T5Bias(table, bidirectional=self.bidirectional, max_distance=self.max_distance)

    def forward(self, query_positions: Tensor, key_positions: Tensor, dtype: torch.dtype) -> Tensor:
        """Compute the dense bias `[1, H, L, S]` of integer positions `[1, L]` and `[1, S]`."""
        return self.bias(query_positions.device).dense(query_positions, key_positions).to(dtype)


def eager_attention_forward(  # noqa: PLR0913  # transformers' attention interface
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Compute plain attention under transformers' interface; the only one that returns weights.

    Args:
        module: the attention module; read for `training`.
        query: `[B, H, L, D]`.
        key: `[B, G, S, D]`.
        value: `[B, G, S, D]`.
        attention_mask: `[B, 1, L, S]`, additive or bool (True attends), or None.
        scaling: factor on the scores.
        dropout: probability of dropping an attention weight.
        softcap: `softcap * tanh(score / softcap)` before mask and bias.
        position_bias: added to the scores, `[1 or B, H, L, S]`.
        **kwargs: what other implementations need.

    Returns:
        The output `[B, L, H, D]` and the attention weights `[B, H, L, S]`.
    """
    batch, heads, length, _ = query.shape
    groups = key.shape[1]  # the heads of a group stand one after the other: rows of one product
    grouped = query.reshape(batch, groups, -1, query.shape[-1])
    scores = (grouped @ key.transpose(2, 3) * scaling).view(batch, heads, length, -1)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if position_bias is not None:
        scores = scores + position_bias
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if attention_mask is None:
        weights = torch.softmax(scores, dim=-1).to(query.dtype)
    else:  # a row that may attend nothing gets zeros, as in the other implementations
        if attention_mask.dtype == torch.bool:
            attention_mask = torch.where(attention_mask, 0.0, torch.finfo(scores.dtype).min)
        forbidden = attention_mask <= torch.finfo(attention_mask.dtype).min
        weights = torch.softmax(scores + attention_mask, dim=-1).masked_fill(forbidden, 0.0).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    output = (weights.view(batch, groups, -1, weights.shape[-1]) @ value).view(batch, heads, length, -1)
    return output.transpose(1, 2).contiguous(), weights


def cast_once(hidden: Tensor) -> Tensor:
    """Cast the input of several projections once, as autocast would for each of them."""
    kind = hidden.device.type
    available = torch.compiler.is_compiling() or torch.amp.is_autocast_available(kind)  # torch 2.11 cannot trace it
    if hidden.dtype == torch.float32 and available and torch.is_autocast_enabled(kind):
        return hidden.to(torch.get_autocast_dtype(kind))
    return hidden


class UrformAttention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017, section 3.2), over the sequence itself or over encoder states."""

    def __init__(self, config: UrformConfig, layer_idx: int, is_decoder: bool, is_cross_attention: bool = False):
        super().__init__()
        sizes = config.stack_sizes(is_decoder)
        heads, groups, width = sizes.num_attention_heads, sizes.num_key_value_heads, sizes.head_dim
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = width
        self.num_key_value_groups = heads // groups
        self.is_causal = is_decoder and not is_cross_attention
        self.scaling = width**-0.5 if config.attention_scale is None else config.attention_scale
        self.dropout = config.attention_dropout
        self.softcap = config.attn_logit_softcapping
        sliding = not is_cross_attention and sizes.layer_types[layer_idx] == "sliding_attention"
        # The library's two-sided masks reach `sliding_window` keys to each side, its kernels count the query's own too.
        reach = config.sliding_window if sliding else None
        self.sliding_window = None if reach is None else reach + (not is_decoder)
        self.window = None if self.sliding_window is None else (self.sliding_window - 1, self.sliding_window - 1)

        self.q_proj = nn.Linear(config.hidden_size, heads * width, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, groups * width, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, groups * width, bias=config.attention_bias)
        out_bias = config.attention_bias if config.attention_out_bias is None else config.attention_out_bias
        self.o_proj = nn.Linear(heads * width, config.hidden_size, bias=out_bias)
        self.q_norm = UrformRMSNorm(width, config.norm_eps, config.norm_offset) if config.qk_norm else None
        self.k_norm = UrformRMSNorm(width, config.norm_eps, config.norm_offset) if config.qk_norm else None
        if config.initializer == "gpt2":
            self.o_proj._init_std = config.initializer_range / math.sqrt(2 * sizes.num_hidden_layers)  # type: ignore[assignment]
        elif config.initializer == "t5":
            self.q_proj._init_std = (config.hidden_size * width) ** -0.5
            self.k_proj._init_std = self.v_proj._init_std = config.hidden_size**-0.5
            self.o_proj._init_std = (heads * width) ** -0.5

    def forward(
        self,
        hidden_states: Tensor,
        how: How,
        cos_sin: tuple[Tensor, Tensor] | None = None,
        position_bias: Tensor | Bias | None = None,
        key_value_states: Tensor | None = None,
        cache: Cache | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from `[B, L, E]` to itself or to `key_value_states` `[B, S, E]`; return `[B, L, E]` and weights.

        Only eager attention returns weights, `[B, H, L, S]`.
        """
        hidden_states = cast_once(hidden_states)
        query = self.q_proj(hidden_states).view(*hidden_states.shape[:-1], -1, self.head_dim).transpose(1, 2)
        if self.q_norm is not None:
            query = self.q_norm(query)
        if cos_sin is not None:
            query = rotate(query, *cos_sin)
        if key_value_states is None:
            key, value = self.keys_values(hidden_states, cos_sin, cache)
        else:
            key, value = self.source_keys_values(key_value_states, cache)
        if isinstance(how, ByMask):
            output, weights = self.attend_by_mask(query, key, value, how, position_bias)
        else:
            q, k, v = (x[0].transpose(0, 1) if how.packed else x.transpose(1, 2) for x in (query, key, value))
            bias = DenseBias(position_bias) if isinstance(position_bias, Tensor) else position_bias
            output = cast(
                Tensor,
                attention(
                    q,
                    k,
                    v,
                    q_layout=how.queries,
                    kv_layout=how.keys,
                    causal=self.is_causal,
                    window=self.window,
                    bias=bias,
                    softcap=self.softcap,
                    scale=self.scaling,
                    dropout_p=self.dropout if self.training else 0.0,
                ),
            )
            weights = None
        return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1)), weights

    def keys_values(
        self, states: Tensor, cos_sin: tuple[Tensor, Tensor] | None, cache: Cache | None
    ) -> tuple[Tensor, Tensor]:
        """Project keys and values `[B, G, S, D]`; with a cache, add them to it and return all that it holds."""
        shape = (*states.shape[:-1], -1, self.head_dim)
        key = self.k_proj(states).view(shape).transpose(1, 2)
        value = self.v_proj(states).view(shape).transpose(1, 2)
        if self.k_norm is not None:
            key = self.k_norm(key)
        if cos_sin is not None:
            key = rotate(key, *cos_sin)
        if isinstance(cache, EncoderDecoderCache):
            cache = cache.self_attention_cache
        return (key, value) if cache is None else cache.update(key, value, self.layer_idx)

    def source_keys_values(self, states: Tensor, cache: Cache | None) -> tuple[Tensor, Tensor]:
        """Project the encoder's keys and values, or return those that the cache holds since the first step."""
        if not isinstance(cache, EncoderDecoderCache):
            return self.keys_values(cast_once(states), None, cache)
        if cache.is_updated.get(self.layer_idx):
            held: Any = cache.cross_attention_cache.layers[self.layer_idx]
            return held.keys, held.values
        cache.is_updated[self.layer_idx] = True
        return self.keys_values(cast_once(states), None, cache.cross_attention_cache)

    def attend_by_mask(
        self, query: Tensor, key: Tensor, value: Tensor, how: ByMask, position_bias: Tensor | Bias | None
    ) -> tuple[Tensor, Tensor | None]:
        """Call an attention function of transformers on `[B, H, L, D]`; return `[B, L, H, D]` and its weights."""
        attend: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(
            how.implementation,  # type: ignore[arg-type]  # None is allowed: "eager"
            eager_attention_forward,
        )
        return attend(
            self,
            query,
            key,
            value,
            how.mask,
            dropout=self.dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            softcap=self.softcap,
            position_bias=position_bias,
            **how.keywords,
        )


class UrformMLP(nn.Module):
    """The feed-forward layer (Vaswani et al. 2017, section 3.3), gated if the config says so (Shazeer 2020)."""

    def __init__(self, config: UrformConfig, is_decoder: bool):
        super().__init__()
        size, inner = config.hidden_size, config.stack_sizes(is_decoder).intermediate_size
        self.gate_proj = nn.Linear(size, inner, bias=config.mlp_bias) if config.gated_mlp else None
        self.up_proj = nn.Linear(size, inner, bias=config.mlp_bias)
        self.down_proj = nn.Linear(inner, size, bias=config.mlp_bias)
        self.act_fn = ACT2FN[config.hidden_act]
        self.dropout = config.activation_dropout
        if config.initializer == "gpt2":
            layers = config.stack_sizes(is_decoder).num_hidden_layers
            self.down_proj._init_std = config.initializer_range / math.sqrt(2 * layers)  # type: ignore[assignment]
        elif config.initializer == "t5":
            self.down_proj._init_std = inner**-0.5
            for projection in (self.gate_proj, self.up_proj):
                if projection is not None:
                    projection._init_std = size**-0.5

    def forward(self, hidden: Tensor) -> Tensor:
        if self.gate_proj is None:
            hidden = self.act_fn(self.up_proj(hidden))
        else:
            hidden = cast_once(hidden)
            hidden = self.act_fn(self.gate_proj(hidden)) * self.up_proj(hidden)
        return self.down_proj(dropout(hidden, self.dropout, self.training))


class UrformLayer(GradientCheckpointingLayer):
    """One block: self-attention, cross-attention where there is an encoder to read, feed-forward."""

    def __init__(self, config: UrformConfig, layer_idx: int, is_decoder: bool):
        super().__init__()
        self.norm_position = config.norm_position
        self.dropout = config.hidden_dropout_prob
        self.layer_type = config.stack_sizes(is_decoder).layer_types[layer_idx]
        self.self_attn = UrformAttention(config, layer_idx, is_decoder)
        self.cross_attn = None
        if is_decoder and config.is_encoder_decoder:
            self.cross_attn = UrformAttention(config, layer_idx, is_decoder, is_cross_attention=True)
        self.mlp = UrformMLP(config, is_decoder)
        for name in ("self_attn", "cross_attn", "mlp"):
            if getattr(self, name) is not None:
                self.add_module(f"{name}_norm", build_norm(config))
                if config.norm_position == "sandwich":
                    self.add_module(f"{name}_post_norm", build_norm(config))
        if layer_idx == 0 and not config.first_norm:
            self.self_attn_norm = nn.Identity()

    def forward(
        self,
        hidden_states: Tensor,
        plan: Plan,
        encoder_hidden_states: Tensor | None = None,
        position_bias: Tensor | Bias | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Compute the block, `[B, L, E]` to `[B, L, E]`.

        Tensors that need gradients come by position: reentrant checkpointing sees no others.
        """
        hidden = block_input = hidden_states
        own = (plan.own, plan.cos_sin, position_bias, None, cache)
        hidden = self._residual("self_attn", hidden, block_input, *own)
        if self.cross_attn is not None:
            cross = (plan.cross, None, None, encoder_hidden_states, cache)
            hidden = self._residual("cross_attn", hidden, block_input, *cross)
        return self._residual("mlp", hidden, block_input)

    def _residual(self, name: str, hidden: Tensor, block_input: Tensor, *arguments: Any) -> Tensor:
        """Apply one sublayer with its norm, dropout and residual connection, in the order of `norm_position`."""
        norm, sublayer = getattr(self, f"{name}_norm"), getattr(self, name)
        inputs = block_input if self.norm_position == "parallel" else hidden
        output = sublayer(inputs if self.norm_position == "post" else norm(inputs), *arguments)
        output = output[0] if arguments else output  # attention's weights are for those who record them
        if self.norm_position == "post":
            return norm(dropout_add(hidden, output, self.dropout, self.training))
        if self.norm_position == "sandwich":
            output = getattr(self, f"{name}_post_norm")(output)
        return dropout_add(hidden, output, self.dropout, self.training)


class UrformTransform(nn.Module):
    """Dense, activation and norm before an output layer (BERT's MLM head; Devlin et al. 2019)."""

    def __init__(self, config: UrformConfig, activation: str, norm: bool = True):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size, bias=config.transform_bias)
        self.act_fn = ACT2FN[activation]
        self.norm = build_norm(config) if norm else nn.Identity()

    def forward(self, hidden: Tensor) -> Tensor:
        return self.norm(self.act_fn(self.dense(hidden)))


class UrformClassifier(nn.Module):
    """Dropout, transform (if the config has one), dropout, output."""

    def __init__(self, config: UrformConfig, num_labels: int, dense: bool = True):
        super().__init__()
        rate = config.classifier_dropout
        self.dropout = nn.Dropout(config.hidden_dropout_prob if rate is None else rate)
        self.transform = None
        if dense and config.classifier_activation is not None:
            self.transform = UrformTransform(config, config.classifier_activation, config.classifier_norm)
        self.out_proj = nn.Linear(config.hidden_size, num_labels, bias=config.classifier_bias)

    def forward(self, hidden: Tensor) -> Tensor:
        if self.transform is not None:
            hidden = self.transform(self.dropout(hidden))
        return self.out_proj(self.dropout(hidden))


def keep_logits(hidden: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    """Keep the positions whose logits are asked for: the last n (0: all), or those of an index or boolean tensor."""
    if isinstance(logits_to_keep, Tensor) and logits_to_keep.ndim == 2:
        if logits_to_keep.dtype == torch.bool:
            return hidden[logits_to_keep]
        return torch.take_along_dim(hidden, logits_to_keep[..., None], dim=1)
    if isinstance(logits_to_keep, int):
        return hidden[:, -logits_to_keep:] if logits_to_keep else hidden
    return hidden[:, logits_to_keep]


def real_tokens(hidden: Tensor, ids: Tensor | None, mask: Tensor | None, config: UrformConfig) -> Tensor:
    """Return which tokens are real, bool `[B, L]`: by the mask, else by a decoder's pad token, else all."""
    if mask is not None and mask.ndim == 2:
        return mask.to(hidden.device).bool()
    if ids is not None and config.pad_token_id is not None and config.architecture != "encoder":
        return (ids != config.pad_token_id).to(hidden.device)
    return torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)


def pool(hidden: Tensor, real: Tensor, config: UrformConfig) -> Tensor:
    """Return the first real token's state, the last one's, or the mean over real ones: `[B, L, E]` to `[B, E]`."""
    how = config.classifier_pooling or ("first" if config.architecture == "encoder" else "last")
    if how == "mean":
        weights = real.to(hidden.dtype)[..., None]
        return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)
    places = torch.arange(hidden.shape[1], device=hidden.device)
    place = (places * real).amax(1) if how == "last" else real.long().argmax(1)
    return hidden[torch.arange(hidden.shape[0], device=hidden.device), place]


class SourceWeights(nn.Module):
    """Tensors of the model that this one was converted from. Nothing here reads them; the way back needs them.

    Args:
        tensors: `config.source_weights`; the buffers are called by the names there, with `/` for `.`.
    """

    def __init__(self, tensors: dict[str, list[Any]]):
        super().__init__()
        for name, (dtype, shape) in tensors.items():
            self.register_buffer(name.replace(".", "/"), torch.zeros(shape, dtype=getattr(torch, dtype)))
