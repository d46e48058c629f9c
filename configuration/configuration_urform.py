# Copyright 2026 The Urform authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Which Transformer: one configuration for encoder, decoder and encoder-decoder.

Every axis is orthogonal and named after what it does; its paper stands at its definition in `UrformConfig`. What
may not go with what is said in one place, `UrformConfig.validate_architecture`.
"""

# First of all, for it says which transformers is needed where that one is too old for the imports below.
from .bundle_urform import IS_FLAT_COPY, BundledCodeMixin
from .version_urform import package_version, unstamped

# isort: split
import copy
import difflib
import functools
import os
from dataclasses import fields
from typing import Any, ClassVar, Literal, NamedTuple

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import (
    StrictDataclassClassValidationError,
    StrictDataclassError,
    StrictDataclassFieldValidationError,
)
from transformers import GenerationConfig
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig
from transformers.utils import logging
from transformers.utils.type_validators import interval

from .checks_urform import (
    LARGEST,
    check_architectures,
    check_dtype,
    check_nesting,
    check_number,
    check_object,
    check_rope,
    check_size,
    check_source_weights,
    check_token_id,
)
from .presets_urform import PRESETS

logger = logging.get_logger(__name__)

_probability = interval(min=0.0, max=1.0)

# What transformers itself may pass to or write into any config besides the fields.
_LIBRARY_KEYS = frozenset(
    "model_type name_or_path torch_dtype num_labels output_attentions attn_implementation experts_implementation "
    "rope_theta rope_scaling partial_rotary_factor auto_map tokenizer_class quantization_config custom_pipelines "
    "task_specific_params finetuning_task trust_remote_code tie_last_hidden_states per_layer_config".split()
)

# What transformers reads of any config that has it, which no field of Urform's means: refused, never taken for a field
# without effect.
READ_BY_LIBRARY = frozenset(
    "is_causal attention_chunk_size kv_sharing_modes num_kv_shared_layers original_max_position_embeddings "
    "token_classification_bias text_config text_encoder".split()
)

_DECODER_SIZES = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size")


class StackSizes(NamedTuple):
    """The sizes of one stack (encoder or decoder), resolved."""

    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    layer_types: list[str]


class InvalidFieldError(StrictDataclassFieldValidationError, ValueError):
    """A field of a type or a value that it cannot have."""

    def __init__(self, message: str):
        ValueError.__init__(self, message)


class InvalidConfigError(StrictDataclassClassValidationError, ValueError):
    """Fields that cannot be, or do not go together."""

    def __init__(self, message: str):
        ValueError.__init__(self, message)


@strict
class UrformConfig(BundledCodeMixin, PreTrainedConfig):
    r"""Configuration of every Urform model.

    Args:
        architecture: `"encoder"` (BERT), `"decoder"` (GPT) or `"encoder-decoder"` (Vaswani et al. 2017).
        vocab_size: Number of tokens; the same table size on both sides of an encoder-decoder.
        hidden_size: Width of the residual stream.
        num_hidden_layers: Layers of the encoder, or of the only stack.
        num_attention_heads: Query heads per layer.
        num_key_value_heads: Key/value heads; fewer than query heads is grouped-query attention (Ainslie et al. 2023),
            1 is multi-query (Shazeer 2019). None: as many as query heads.
        head_dim: Width of a head. None: `hidden_size // num_attention_heads`.
        intermediate_size: Width of the feed-forward layer.
        hidden_act: Any activation of `transformers.activations.ACT2FN`.
        decoder_num_hidden_layers, decoder_num_attention_heads, decoder_num_key_value_heads, decoder_head_dim,
            decoder_intermediate_size, decoder_layer_types: The decoder's sizes where they differ in an
            encoder-decoder. None: the same as the encoder's.
        norm_position: `"post"` (Vaswani et al. 2017), `"pre"` (Xiong et al. 2020), `"sandwich"` (before and after
            each sublayer; Ding et al. 2021, Gemma 2) or `"parallel"` (all sublayers read the block's input;
            Wang & Komatsuzaki 2021, GPT-NeoX).
        norm_type: `"layernorm"` (Ba et al. 2016) or `"rmsnorm"` (Zhang & Sennrich 2019).
        norm_eps: Epsilon of the norms.
        norm_bias: Whether LayerNorm has a bias (RMSNorm never has one).
        norm_offset: Added to the norm's weight, which then starts at `1 - norm_offset` (Gemma: 1.0).
        final_norm: A norm after the last layer. None: yes unless `norm_position="post"`.
        first_norm: A norm before the first layer's self-attention (ModernBERT has none behind its embedding norm).
        position_encoding: `"sinusoidal"` (Vaswani et al. 2017, sec. 3.5), `"learned"` (Gehring et al. 2017),
            `"rope"` (Su et al. 2021), `"alibi"` (Press et al. 2022), `"t5"` (relative buckets, Raffel et al. 2020)
            or `"none"` (Kazemnejad et al. 2023).
        max_position_embeddings: Rows of the learned table; the trained length for RoPE scaling.
        position_offset: Added to the positions of the learned table and of the sinusoids (BART, OPT, M2M-100: 2).
        position_counting: What absolute positions count: real tokens by the attention `"mask"` (OPT), all
            `"columns"`, padding included (Vaswani et al. 2017, BERT, BART, Marian), or `"tokens"` other than
            `pad_token_id`, which stands at -1 itself (fairseq: RoBERTa, M2M-100).
        sinusoidal_layout: Sines and cosines `"interleaved"` (Vaswani et al. 2017, sec. 3.5), in two `"halves"`
            (Marian), or as in `"tensor2tensor"` and fairseq: halves, the slowest wave at exactly 1/10000 (M2M-100).
        rope_parameters: As in transformers: `rope_type`, `rope_theta`, `partial_rotary_factor`, scaling; or one such
            dict per layer type (Gemma 3).
        rope_length: Which length the frequencies of "dynamic" and "longrope" scaling follow: each `"sequence"`'s
            own, so that no row depends on its neighbours, or the `"batch"`'s longest (transformers' own classes).
        relative_attention_num_buckets, relative_attention_max_distance: T5's buckets.
        attention_bias: Bias in the query, key, value and output projections.
        attention_out_bias: Bias in the output projection, where it differs (Qwen 2). None: as `attention_bias`.
        qk_norm: RMSNorm over each head of queries and keys (Henry et al. 2020; Qwen 3).
        attention_scale: Factor on the scores. None: `head_dim ** -0.5` (T5: 1.0).
        attn_logit_softcapping: `cap * tanh(score / cap)` on the scores (Gemma 2).
        sliding_window: Window of the `"sliding_attention"` layers (Beltagy et al. 2020; Mistral): a decoder's query
            sees that many keys, itself among them; an encoder's that many to each side.
        layer_types: `"full_attention"` or `"sliding_attention"` per layer. None: all full.
        mlp_bias: Bias in the feed-forward layer.
        gated_mlp: Gated linear unit (Shazeer 2020): `down(act(gate(x)) * up(x))`.
        scale_embedding: Multiply embeddings by `sqrt(hidden_size)` (Vaswani et al. 2017, sec. 3.4).
        embedding_norm: A norm over the summed embeddings (BERT, BLOOM).
        type_vocab_size: Token types (BERT's segments); 0 means none.
        freeze_pad_embedding: Inputs give the pad token's embedding no gradient (`nn.Embedding`'s padding_idx).
        share_embeddings: Encoder and decoder read one table.
        tie_word_embeddings: The output projection is the embedding table (Press & Wolf 2017); together with
            `share_embeddings` this is the three-way tying of Vaswani et al. 2017.
        lm_head_bias: Bias on the output projection.
        lm_head_transform: Dense, activation and norm before the output projection (BERT's MLM head).
        lm_head_activation: That activation. None: `hidden_act`.
        logit_scale: Factor on the logits (T5: `hidden_size ** -0.5`).
        final_logit_softcapping: `cap * tanh(logit / cap)` on the logits (Gemma 2).
        classifier_pooling: What a sequence classifier reads: the `"first"` token, the `"last"` real token or the
            `"mean"` over real tokens. None: first for an encoder, last otherwise.
        classifier_activation: Activation of the classifier's dense layer (BERT, BART: tanh). None: no dense layer.
        classifier_norm: A norm behind that activation (ModernBERT).
        classifier_bias: Bias of the classifier's output layer (GPT-2, Llama: none).
        token_classifier_dense: Token classification and question answering have the dense layer too (ModernBERT).
        transform_bias: Bias of the dense layers of `lm_head_transform` and of the classifiers (ModernBERT: none).
        hidden_dropout_prob, attention_dropout, activation_dropout, classifier_dropout: Dropout (Srivastava et al.
            2014) on sublayer outputs and embeddings, attention weights, inside the feed-forward layer, and before
            the classifier (None: as `hidden_dropout_prob`).
        initializer: `"normal"` (N(0, initializer_range), BERT), `"xavier"` (Glorot & Bengio 2010, embeddings
            N(0, 1/hidden_size)), `"gpt2"` (normal, residual outputs divided by sqrt(2 * layers); Radford et al. 2019)
            or `"t5"` (fan-in scaled; Raffel et al. 2020).
        initializer_range: Standard deviation for `"normal"` and `"gpt2"`.
        decoder_start_token_id: What the decoder's input begins with. None: the eos token, as in fairseq.
        decoder_start_from_labels: In training it begins with the labels' last token instead, the language's code
            (mBART; Liu et al. 2020).
        source_family: The transformers model type of its weights (`from_transformers`) or its preset, to which
            `to_transformers` goes back.
        source_fields: What that family's config held that changes no number here, for the way back.
        source_weights: {name there: [dtype, shape]} of tensors that have no place here (BERT's pooler): the model holds
            them as buffers that nothing reads, for the way back.

    Raises:
        ValueError: A field that does not exist, or fields that do not go together; the message says which and what
            to do.
    """

    model_type = "urform"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "cache"]
    attribute_map: ClassVar[dict[str, str]] = {"d_model": "hidden_size"}
    _names_attention = False
    # Relative to a stack, which keeps what matches its modules; transformers adds the prefix.
    base_model_tp_plan: ClassVar[dict[str, str]] = {
        **{f"layers.*.{a}.{p}_proj": "colwise" for a in ("self_attn", "cross_attn") for p in "qkv"},
        **{f"layers.*.{a}.o_proj": "rowwise" for a in ("self_attn", "cross_attn")},
        **{f"layers.*.{a}.{p}_norm": "urform_heads" for a in ("self_attn", "cross_attn") for p in "qk"},
        **dict.fromkeys(("position_bias", "position_bias.table"), "urform_heads"),  # see parallel_urform.py
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    base_model_pp_plan: ClassVar[dict[str, tuple[list[str], list[str]]]] = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    architecture: Literal["encoder", "decoder", "encoder-decoder"] = "encoder-decoder"
    vocab_size: int = 32000
    hidden_size: int = 512
    num_hidden_layers: int = 6
    num_attention_heads: int = 8
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    intermediate_size: int = 2048
    hidden_act: str = "gelu"

    decoder_num_hidden_layers: int | None = None
    decoder_num_attention_heads: int | None = None
    decoder_num_key_value_heads: int | None = None
    decoder_head_dim: int | None = None
    decoder_intermediate_size: int | None = None
    decoder_layer_types: list[str] | None = None

    norm_position: Literal["pre", "post", "sandwich", "parallel"] = "pre"
    norm_type: Literal["layernorm", "rmsnorm"] = "layernorm"
    norm_eps: float = 1e-5
    norm_bias: bool = True
    norm_offset: int | float = 0.0
    final_norm: bool | None = None
    first_norm: bool = True

    position_encoding: Literal["sinusoidal", "learned", "rope", "alibi", "t5", "none"] = "rope"
    max_position_embeddings: int = 1024
    position_offset: int = 0
    position_counting: Literal["mask", "columns", "tokens"] = "mask"
    sinusoidal_layout: Literal["interleaved", "halves", "tensor2tensor"] = "interleaved"
    rope_parameters: dict | None = None
    rope_length: Literal["sequence", "batch"] = "sequence"
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128

    attention_bias: bool = True
    attention_out_bias: bool | None = None
    qk_norm: bool = False
    attention_scale: int | float | None = None
    attn_logit_softcapping: int | float | None = None
    sliding_window: int | None = None
    layer_types: list[str] | None = None

    mlp_bias: bool = True
    gated_mlp: bool = False

    scale_embedding: bool = False
    embedding_norm: bool = False
    type_vocab_size: int = 0
    freeze_pad_embedding: bool = True
    share_embeddings: bool = True
    tie_word_embeddings: bool = True
    lm_head_bias: bool = False
    lm_head_transform: bool = False
    lm_head_activation: str | None = None
    logit_scale: int | float = 1.0
    final_logit_softcapping: int | float | None = None
    classifier_pooling: Literal["first", "last", "mean"] | None = None
    classifier_activation: str | None = "tanh"
    classifier_norm: bool = False
    classifier_bias: bool = True
    token_classifier_dense: bool = False
    transform_bias: bool = True

    hidden_dropout_prob: int | float = _probability(default=0.1)
    attention_dropout: int | float = _probability(default=0.0)
    activation_dropout: int | float = _probability(default=0.0)
    classifier_dropout: int | float | None = None
    initializer: Literal["normal", "xavier", "gpt2", "t5"] = "normal"
    initializer_range: float = _probability(default=0.02)

    use_cache: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    decoder_start_token_id: int | None = None
    decoder_start_from_labels: bool = False
    source_family: str | None = None
    source_fields: dict | None = None
    source_weights: dict[str, list] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        for alias in self.attribute_map.keys() & kwargs.keys():
            setattr(self, alias, kwargs.pop(alias))
        self._refuse_unknown(kwargs)
        self._check_sizes(kwargs)
        self.rope_parameters = copy.deepcopy(self.rope_parameters)  # the library writes into it; the caller's stays
        self.source_fields = copy.deepcopy(self.source_fields)
        self.source_weights = copy.deepcopy(self.source_weights)
        self.is_encoder_decoder = self.architecture == "encoder-decoder"
        if self.architecture == "encoder":  # transformers takes a config with a plan for one that generates
            self.base_model_tp_plan = None  # type: ignore[misc]  # the encoder's plan is on `UrformStack`
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self._need(
                self.hidden_size % self.num_attention_heads == 0,
                f"hidden_size={self.hidden_size} is not a multiple of num_attention_heads={self.num_attention_heads}; "
                "change one of them or set head_dim",
            )
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.layer_types is None:
            self.layer_types = ["full_attention"] * self.num_hidden_layers
        if self.is_encoder_decoder:
            self._resolve_decoder()
        super().__post_init__(**kwargs)

    def _check_sizes(self, kwargs: dict[str, Any]) -> None:
        """Before anything is made in these sizes."""
        for name in LARGEST.keys() & {field.name for field in fields(self)}:
            check_size(name, getattr(self, name))
        for name in _DECODER_SIZES:
            check_size(f"decoder_{name}", getattr(self, f"decoder_{name}"))
        if "num_labels" in kwargs:
            check_size("num_labels", kwargs["num_labels"])
        check_architectures(self.architectures)
        check_dtype(kwargs.get("torch_dtype"))
        check_dtype(self.dtype)
        self._need(
            not kwargs.get("per_layer_config"),
            "per_layer_config gives layers sizes of their own, which Urform does not have; leave it out",
        )

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As the library's; warns where a published checkpoint comes from a newer Urform than the one installed."""
        check_nesting(config_dict, "the config")
        return super().from_dict(unstamped(config_dict, None if IS_FLAT_COPY else package_version()), **kwargs)

    @classmethod
    def _dict_from_json_file(cls, json_file: str | os.PathLike[str]) -> dict[str, Any]:
        """As the library's; a ValueError where Python cannot follow it."""
        try:
            found = super()._dict_from_json_file(json_file)
        except RecursionError as error:
            raise ValueError(f"{json_file} is nested too deeply to be read; repair it") from error
        check_object(found, str(json_file))
        return found

    def _resolve_decoder(self) -> None:
        """Fills the decoder's sizes in; transformers reads them by stripping the prefix, so None would reach it."""
        own_heads = self.decoder_num_attention_heads is not None
        if self.decoder_num_key_value_heads is None and own_heads:
            self.decoder_num_key_value_heads = self.decoder_num_attention_heads
        if self.decoder_head_dim is None and own_heads:
            self._need(
                self.hidden_size % self.decoder_num_attention_heads == 0,
                f"hidden_size={self.hidden_size} is not a multiple of decoder_num_attention_heads="
                f"{self.decoder_num_attention_heads}; change one of them or set decoder_head_dim",
            )
            self.decoder_head_dim = self.hidden_size // self.decoder_num_attention_heads
        for name in _DECODER_SIZES:
            if getattr(self, f"decoder_{name}") is None:
                setattr(self, f"decoder_{name}", getattr(self, name))
        if self.decoder_layer_types is None:
            same = self.decoder_num_hidden_layers == self.num_hidden_layers
            types = self.layer_types if same else ["full_attention"] * self.decoder_num_hidden_layers
            self.decoder_layer_types = list(types)
        if self.decoder_start_token_id is None:  # as fairseq and BART: labels may begin with bos themselves
            self.decoder_start_token_id = self.eos_token_id if isinstance(self.eos_token_id, int) else self.bos_token_id

    def _refuse_unknown(self, kwargs: dict[str, Any]) -> None:
        """A field that does not exist is an error from a caller, a warning from a saved file (of a newer Urform?)."""
        generation = GenerationConfig._get_default_generation_params()
        known = {field.name for field in fields(self)}
        for key in sorted(READ_BY_LIBRARY & kwargs.keys()):
            value = kwargs.pop(key)
            self._need(
                value is None,
                f"{key}={value!r} is no field of UrformConfig, but transformers reads it; leave it out"
                + (" and set it in rope_parameters" if key.startswith("original") else ""),
            )
        unknown = [k for k in kwargs if not k.startswith("_") and k not in _LIBRARY_KEYS and k not in generation]
        if unknown and "model_type" in kwargs:
            logger.warning_once(f"UrformConfig knows no field {', '.join(sorted(unknown))}; kept, but without effect")
            return
        for key in unknown:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "see help(UrformConfig) for the fields there are"
            raise ValueError(f"UrformConfig has no field {key!r} (given {kwargs[key]!r}); {hint}")

    def convert_rope_params_to_dict(self, **kwargs: Any) -> dict[str, Any]:
        """As the library's, for RoPE only; rotary settings beside another position encoding are refused."""
        if self.position_encoding == "rope" and self.rope_is_per_layer_type:  # transformers 5.17 expects the flat form
            theta = kwargs.pop("rope_theta", self.default_theta)
            for kind, parameters in self.rope_parameters.items():
                self._need(isinstance(parameters, dict), f"rope_parameters[{kind!r}]={parameters!r} must be a dict")
            for parameters in self.rope_parameters.values():
                parameters.setdefault("rope_theta", theta)
            self.standardize_rope_params()
            return kwargs
        if self.position_encoding == "rope":
            return super().convert_rope_params_to_dict(**kwargs)
        given = [k for k in ("rope_theta", "rope_scaling", "partial_rotary_factor") if kwargs.get(k) is not None]
        given += ["rope_parameters"] if self.rope_parameters else []
        self._need(
            not given,
            f"{' and '.join(given)} given, but position_encoding={self.position_encoding!r} has no rotary positions; "
            'drop it or set position_encoding="rope"',
        )
        self.rope_parameters = None
        return kwargs

    @property
    def _attn_implementation(self) -> str | None:
        return self._attn_implementation_internal

    @_attn_implementation.setter
    def _attn_implementation(self, value: str | dict | None) -> None:
        """As the library's; remembers whether anybody named one: where nobody did, Urform's own attention serves."""
        PreTrainedConfig._attn_implementation.fset(self, value)  # type: ignore[attr-defined]
        if not isinstance(value, dict) or "" in value:
            self._names_attention = self._attn_implementation_internal is not None

    def _remove_keys_not_serialized(self, d: dict[str, Any]) -> None:
        super()._remove_keys_not_serialized(d)
        d.pop("_names_attention", None)

    @property
    def rope_is_per_layer_type(self) -> bool:
        """Whether `rope_parameters` holds one dict per layer type."""
        return bool(self.rope_parameters) and set(self.rope_parameters) <= {"full_attention", "sliding_attention"}

    def stack_sizes(self, decoder: bool) -> StackSizes:
        """The sizes of the decoder or of the encoder; with one stack only, of that stack."""
        prefix = "decoder_" if decoder and self.is_encoder_decoder else ""
        return StackSizes(*(getattr(self, prefix + name) for name in StackSizes._fields))

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """As the library's; a decoder like its encoder is described by this very config, not by a copy."""
        alike = all(getattr(self, f"decoder_{n}") == getattr(self, n) for n in (*_DECODER_SIZES, "layer_types"))
        return self if alike else super().get_text_config(decoder=decoder, encoder=encoder)

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> "UrformConfig":
        """A named Transformer from the table in `presets_urform.py`, with fields overridden.

        What is derived from an overridden field follows it: T5's `logit_scale` its `hidden_size`, RoBERTa's
        `position_offset` its `pad_token_id`, a pattern of `layer_types` the number of layers. A special token beyond
        the end of an overridden `vocab_size` keeps its distance from the end; it is None where there is no such token.

        Args:
            name: One of `list_presets()`.
            **overrides: Any field of `UrformConfig`.

        Raises:
            ValueError: The name is not in the table.
        """
        if name not in PRESETS:
            near = difflib.get_close_matches(name, PRESETS, n=1)
            raise ValueError(
                f"preset {name!r} is unknown{f'; did you mean {near[0]!r}?' if near else ''} "
                f"There are: {', '.join(sorted(PRESETS))}"
            )
        named = {cls.attribute_map.get(key, key): value for key, value in overrides.items()}
        return cls(**PRESETS[name].resolved(**named))

    @staticmethod
    def _need(condition: bool, message: str) -> None:
        if not condition:
            raise ValueError(message)

    def validate_architecture(self) -> None:
        """What may go with what; part of `@strict` validation (at construction and at saving)."""
        need = self._need
        if self.architecture != "encoder-decoder":
            for name in (*_DECODER_SIZES, "layer_types"):
                value = getattr(self, f"decoder_{name}")
                need(
                    value is None,
                    f"decoder_{name}={value} is for architecture='encoder-decoder'; this is "
                    f"architecture={self.architecture!r}: use {name}",
                )
        else:
            need(
                self.position_encoding != "rope" or self.decoder_head_dim == self.head_dim,
                f"decoder_head_dim={self.decoder_head_dim} must equal head_dim={self.head_dim} under "
                'position_encoding="rope": the rotary table is one',
            )
        for decoder in {False, self.is_encoder_decoder}:
            self._validate_stack("decoder_" if decoder else "", self.stack_sizes(decoder))
        need(
            self.type_vocab_size == 0 or self.architecture == "encoder",
            f"type_vocab_size={self.type_vocab_size} is for architecture='encoder'; set it to 0",
        )
        need(
            self.first_norm or self.norm_position in ("pre", "sandwich"),
            f"first_norm=False leaves the norm before the first layer out, which norm_position={self.norm_position!r} "
            "does not allow; set it to True",
        )
        least = 2 if self.architecture == "decoder" else 4
        buckets, farthest = self.relative_attention_num_buckets, self.relative_attention_max_distance
        need(
            self.position_encoding != "t5"
            or (buckets >= least and farthest > buckets // (4 if self.architecture == "encoder" else 2)),
            f"relative_attention_num_buckets={buckets} and relative_attention_max_distance={farthest} leave no "
            f"logarithmic buckets; use at least {least} buckets and a larger distance",
        )
        need(
            self.position_counting == "mask" or self.position_encoding in ("learned", "sinusoidal"),
            f"position_counting={self.position_counting!r} is for learned and sinusoidal positions; this is "
            f'position_encoding={self.position_encoding!r}: set it to "mask"',
        )
        need(
            self.position_counting != "tokens" or self.pad_token_id is not None,
            'position_counting="tokens" counts tokens other than pad_token_id, which is None; set it',
        )
        need(
            self.position_counting != "tokens" or self.position_encoding != "learned" or self.position_offset > 0,
            'position_counting="tokens" puts the pad token at position_offset - 1; '
            f"position_offset={self.position_offset} must be positive",
        )
        need(
            self.classifier_activation is not None or not (self.classifier_norm or self.token_classifier_dense),
            "classifier_norm and token_classifier_dense belong to a dense layer, but classifier_activation is None; "
            "set it to an activation",
        )
        need(
            not self.lm_head_transform or self.architecture == "encoder",
            "lm_head_transform=True is the masked-LM head of architecture='encoder'; set it to False",
        )

    def validate_numbers(self) -> None:
        """Each field alone."""
        self._check_sizes({})
        for name in ("hidden_act", "classifier_activation", "lm_head_activation"):
            value = getattr(self, name)
            known = value is None or value in ACT2FN
            self._need(known, f"{name}={value!r} is unknown; use one of {sorted(ACT2FN)}")
        for name in ("norm_eps", "attention_scale", "attn_logit_softcapping", "final_logit_softcapping"):
            check_number(name, getattr(self, name), 0.0)
        for name in ("logit_scale", "norm_offset"):
            check_number(name, getattr(self, name))
        for name in ("hidden_dropout_prob", "attention_dropout", "activation_dropout", "classifier_dropout"):
            check_number(name, getattr(self, name), 0.0, 1.0)
        check_size("num_labels", self.num_labels)
        problems = ("regression", "single_label_classification", "multi_label_classification", None)
        self._need(
            self.problem_type in problems,
            f"problem_type={self.problem_type!r} is unknown; use one of {', '.join(map(repr, problems))}",
        )
        check_source_weights(self.source_weights or {})

    def validate_token_ids(self) -> None:
        """Every id is a row of the table."""
        for name in ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"):
            check_token_id(name, getattr(self, name), self.vocab_size)

    def validate_rope(self) -> None:
        """Rotary parameters are known, complete and positive."""
        if self.position_encoding == "rope":
            kinds = {*(self.layer_types or ()), *(self.decoder_layer_types or ())}
            per_type = self.rope_is_per_layer_type
            for kind in sorted(kinds & set(self.rope_parameters)) if per_type else [None]:
                given = self.rope_parameters[kind] if kind else self.rope_parameters
                where = f"rope_parameters[{kind!r}]" if kind else "rope_parameters"
                check_rope(given, where, self.head_dim)
        super().validate_rope()

    def _validate_stack(self, prefix: str, sizes: StackSizes) -> None:
        need = self._need
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
            "sliding_attention" not in sizes.layer_types or (self.sliding_window or 0) > 0,
            f"{prefix}layer_types has 'sliding_attention', but sliding_window={self.sliding_window}; set it to a "
            "positive number of tokens",
        )
        if self.position_encoding == "rope":
            need(
                sizes.head_dim % 2 == 0,
                f"{prefix}head_dim={sizes.head_dim} must be even under position_encoding='rope': it rotates pairs",
            )
            if self.rope_is_per_layer_type:
                missing = set(sizes.layer_types) - set(self.rope_parameters or {})
                need(not missing, f"rope_parameters lacks an entry for the layer types {sorted(missing)}")
        if self.position_encoding == "sinusoidal":
            need(
                self.hidden_size % 2 == 0,
                f"hidden_size={self.hidden_size} must be even under position_encoding='sinusoidal': sine and cosine "
                "come in pairs",
            )


_strict_init = UrformConfig.__init__


@functools.wraps(_strict_init)
def _init(self: UrformConfig, *args: Any, **kwargs: Any) -> None:
    try:
        _strict_init(self, *args, **kwargs)
    except StrictDataclassFieldValidationError as error:
        raise InvalidFieldError(str(error)) from error
    except StrictDataclassError as error:
        raise InvalidConfigError(str(error.__cause__ or error)) from error


UrformConfig.__init__ = _init  # type: ignore[method-assign, assignment]


def list_presets() -> dict[str, str]:
    """The named Transformers of `UrformConfig.from_preset`: name -> the paper or family that it reproduces."""
    return {name: preset.source for name, preset in PRESETS.items()}
