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

Every axis is orthogonal and named after what it does. Its meaning, its paper and its default stand at its definition in
`UrformConfig`. Which fields go together is checked in `combinations_urform.py`, each field alone in `checks_urform.py`.
"""

# First of all, for it says which transformers is needed where that one is too old for the imports below.
from .bundle_urform import IS_FLAT_COPY, BundledCodeMixin
from .version_urform import package_version, unstamped

# isort: split
import copy
import difflib
import functools
import os
from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import (
    StrictDataclassClassValidationError,
    StrictDataclassError,
    StrictDataclassFieldValidationError,
)
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig
from transformers.utils.type_validators import interval

from .checks_urform import (
    LARGEST,
    Filled,
    check_architectures,
    check_dtype,
    check_nesting,
    check_number,
    check_object,
    check_rope,
    check_size,
    check_source_weights,
    check_token_id,
    filled,
)
from .combinations_urform import DECODER_SIZES, StackSizes, check_combinations, need
from .presets_urform import PRESETS
from .unknown_fields import check_unknown

_probability = interval(min=0.0, max=1.0)


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
    """Configuration of every Urform model.

    Each field is explained below its definition, with its paper. `help(UrformConfig)` lists the fields and their
    defaults, and an editor shows the text at a field. `from_preset` starts from the fields of a named Transformer.

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
    base_model_pp_plan: ClassVar[dict[str, Sequence[list[str]]] | None] = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    # --- Which Transformer, and how large -----------------------------------------------------------------------------

    architecture: Literal["encoder", "decoder", "encoder-decoder"] = "encoder-decoder"
    """`"encoder"` (BERT), `"decoder"` (GPT) or `"encoder-decoder"` (Vaswani et al. 2017)."""

    vocab_size: int = 32000
    """Number of tokens. The two sides of an encoder-decoder have tables of the same size."""

    hidden_size: int = 512
    """Width of the residual stream."""

    num_hidden_layers: int = 6
    """Layers of the encoder, or of the only stack."""

    num_attention_heads: int = 8
    """Query heads per layer."""

    num_key_value_heads: Filled[int] = None  # type: ignore[assignment]
    """Key/value heads. None: as many as query heads.

    Fewer than query heads is grouped-query attention (Ainslie et al. 2023), 1 is multi-query attention (Shazeer 2019).
    """

    head_dim: Filled[int] = None  # type: ignore[assignment]
    """Width of a head. None: `hidden_size // num_attention_heads`."""

    intermediate_size: int = 2048
    """Width of the feed-forward layer."""

    hidden_act: str = "gelu"
    """Activation of the feed-forward layer: any of `transformers.activations.ACT2FN`."""

    # --- The decoder of an encoder-decoder where it differs. None: the same as the encoder ----------------------------

    decoder_num_hidden_layers: int | None = None
    decoder_num_attention_heads: int | None = None
    decoder_num_key_value_heads: int | None = None
    decoder_head_dim: int | None = None
    decoder_intermediate_size: int | None = None
    decoder_layer_types: list[str] | None = None

    # --- Norms --------------------------------------------------------------------------------------------------------

    norm_position: Literal["pre", "post", "sandwich", "parallel"] = "pre"
    """Where the norms of a block stand.

    - `"post"`: after each sublayer and its residual connection (Vaswani et al. 2017).
    - `"pre"`: before each sublayer (Xiong et al. 2020).
    - `"sandwich"`: before and after each sublayer (Ding et al. 2021; Gemma 2).
    - `"parallel"`: before, and all sublayers read the block's input (Wang & Komatsuzaki 2021; GPT-NeoX).
    """

    norm_type: Literal["layernorm", "rmsnorm"] = "layernorm"
    """`"layernorm"` (Ba et al. 2016) or `"rmsnorm"` (Zhang & Sennrich 2019)."""

    norm_eps: float = 1e-5
    """Epsilon of the norms."""

    norm_bias: bool = True
    """Whether LayerNorm has a bias. RMSNorm never has one."""

    norm_offset: int | float = 0.0
    """A constant that is added to the norm's weight, which then starts at `1 - norm_offset` (Gemma: 1.0)."""

    final_norm: bool | None = None
    """Whether a norm follows the last layer. None: yes unless `norm_position="post"`."""

    first_norm: bool = True
    """Whether a norm precedes the first layer's self-attention (ModernBERT: no, for its embeddings have one)."""

    # --- Positions ----------------------------------------------------------------------------------------------------

    position_encoding: Literal["sinusoidal", "learned", "rope", "alibi", "t5", "none"] = "rope"
    """How the model knows positions.

    - `"sinusoidal"`: Vaswani et al. 2017, section 3.5.
    - `"learned"`: a table of embeddings (Gehring et al. 2017).
    - `"rope"`: rotary positions (Su et al. 2021).
    - `"alibi"`: linear biases on the scores (Press et al. 2022).
    - `"t5"`: biases by buckets of relative positions (Raffel et al. 2020).
    - `"none"`: Kazemnejad et al. 2023.
    """

    max_position_embeddings: int = 1024
    """Rows of the learned table; the length of training for RoPE scaling."""

    position_offset: int = 0
    """A constant that is added to the positions of the learned table and of the sinusoids (BART, OPT, M2M-100: 2)."""

    position_counting: Literal["mask", "columns", "tokens"] = "mask"
    """What absolute positions count.

    - `"mask"`: real tokens by the attention mask (OPT).
    - `"columns"`: all columns, padding included (Vaswani et al. 2017, BERT, BART, Marian).
    - `"tokens"`: tokens other than `pad_token_id`, which itself has position -1 (fairseq: RoBERTa, M2M-100).
    """

    sinusoidal_layout: Literal["interleaved", "halves", "tensor2tensor"] = "interleaved"
    """How sines and cosines lie in a vector.

    - `"interleaved"`: in turn (Vaswani et al. 2017, section 3.5).
    - `"halves"`: all sines, then all cosines (Marian).
    - `"tensor2tensor"`: in halves, with the lowest frequency at exactly 1/10000 (fairseq, M2M-100).
    """

    rope_parameters: dict[Any, Any] | None = None
    """As in transformers: `rope_type`, `rope_theta`, `partial_rotary_factor` and the parameters of the scaling.

    One such dict per layer type is accepted, too (Gemma 3).
    """

    rope_length: Literal["sequence", "batch"] = "sequence"
    """Which length the frequencies of "dynamic" and "longrope" scaling follow.

    - `"sequence"`: each sequence's own, so that no row depends on its neighbours.
    - `"batch"`: the longest of the batch, as in transformers' own classes.
    """

    relative_attention_num_buckets: int = 32
    """Number of T5's buckets (Raffel et al. 2020, section 2.1)."""

    relative_attention_max_distance: int = 128
    """Distance in tokens from which on T5's buckets no longer differ."""

    # --- Attention ----------------------------------------------------------------------------------------------------

    attention_bias: bool = True
    """Whether the query, key, value and output projections have a bias."""

    attention_out_bias: bool | None = None
    """Whether the output projection has one, where it differs (Qwen 2). None: as `attention_bias`."""

    qk_norm: bool = False
    """RMSNorm over each head of the queries and keys (Henry et al. 2020; Qwen 3)."""

    attention_scale: int | float | None = None
    """Factor on the scores (T5: 1.0). None: `head_dim ** -0.5` (Vaswani et al. 2017, section 3.2.1)."""

    attn_logit_softcapping: int | float | None = None
    """`cap * tanh(score / cap)` on the scores (Gemma 2). None: no cap."""

    sliding_window: int | None = None
    """Window of the `"sliding_attention"` layers in tokens (Beltagy et al. 2020; Mistral).

    A decoder's query sees that many keys, its own among them. An encoder's query sees that many on each side.
    """

    layer_types: Filled[list[str]] = None  # type: ignore[assignment]
    """`"full_attention"` or `"sliding_attention"` for each layer. None: all full."""

    # --- Feed-forward -------------------------------------------------------------------------------------------------

    mlp_bias: bool = True
    """Whether the feed-forward layer has biases."""

    gated_mlp: bool = False
    """Gated linear unit, `down(act(gate(x)) * up(x))` (Shazeer 2020)."""

    # --- Embeddings and output ----------------------------------------------------------------------------------------

    scale_embedding: bool = False
    """Multiply embeddings by `sqrt(hidden_size)` (Vaswani et al. 2017, section 3.4)."""

    embedding_norm: bool = False
    """A norm over the sum of the embeddings (BERT, BLOOM)."""

    type_vocab_size: int = 0
    """Number of token types, BERT's segments (Devlin et al. 2019). 0: none."""

    freeze_pad_embedding: bool = True
    """Inputs give the pad token's embedding no gradient, as `padding_idx` of `nn.Embedding` does."""

    share_embeddings: bool = True
    """Encoder and decoder read one table."""

    tie_word_embeddings: bool = True
    """The output projection is the embedding table (Press & Wolf 2017).

    Together with `share_embeddings` this is the three-way tying of Vaswani et al. 2017, section 3.4.
    """

    lm_head_bias: bool = False
    """Whether the output projection has a bias."""

    lm_head_transform: bool = False
    """Dense layer, activation and norm before the output projection (BERT's masked-LM head)."""

    lm_head_activation: str | None = None
    """That activation. None: `hidden_act`."""

    logit_scale: int | float = 1.0
    """Factor on the logits (T5: `hidden_size ** -0.5`)."""

    final_logit_softcapping: int | float | None = None
    """`cap * tanh(logit / cap)` on the logits (Gemma 2). None: no cap."""

    # --- Classifiers --------------------------------------------------------------------------------------------------

    classifier_pooling: Literal["first", "last", "mean"] | None = None
    """What a sequence classifier reads: the `"first"` token, the `"last"` real token, or the `"mean"` of real tokens.

    None: the first of an encoder, the last otherwise.
    """

    classifier_activation: str | None = "tanh"
    """Activation of the classifier's dense layer (BERT, BART: tanh). None: no dense layer."""

    classifier_norm: bool = False
    """A norm after that activation (ModernBERT)."""

    classifier_bias: bool = True
    """Whether the classifier's output layer has a bias (GPT-2, Llama: no)."""

    token_classifier_dense: bool = False
    """Token classification and question answering have the dense layer, too (ModernBERT)."""

    transform_bias: bool = True
    """Whether the dense layers of `lm_head_transform` and of the classifiers have a bias (ModernBERT: no)."""

    # --- Dropout (Srivastava et al. 2014) and initial weights ---------------------------------------------------------

    hidden_dropout_prob: int | float = _probability(default=0.1)
    """Dropout on the embeddings and on the output of each sublayer (Vaswani et al. 2017, section 5.4)."""

    attention_dropout: int | float = _probability(default=0.0)
    """Dropout on the attention weights."""

    activation_dropout: int | float = _probability(default=0.0)
    """Dropout inside the feed-forward layer."""

    classifier_dropout: int | float | None = None
    """Dropout before the classifier. None: as `hidden_dropout_prob`."""

    initializer: Literal["normal", "xavier", "gpt2", "t5"] = "normal"
    """Distribution of the initial weights.

    - `"normal"`: N(0, initializer_range) (BERT).
    - `"xavier"`: Glorot & Bengio 2010; embeddings are N(0, 1/hidden_size).
    - `"gpt2"`: as normal, with residual outputs divided by sqrt(2 * layers) (Radford et al. 2019).
    - `"t5"`: scaled by the fan-in (Raffel et al. 2020).
    """

    initializer_range: float = _probability(default=0.02)
    """Standard deviation for `"normal"` and `"gpt2"`."""

    # --- Generation and special tokens --------------------------------------------------------------------------------

    use_cache: bool = True
    """Whether the model returns keys and values for the next step of a generation. With labels it returns none."""

    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2

    decoder_start_token_id: int | None = None
    """The token that the decoder's input begins with. None: the eos token, as in fairseq."""

    decoder_start_from_labels: bool = False
    """In training the decoder's input begins with the last label, the code of the language (mBART; Liu et al. 2020)."""

    # --- What conversion keeps for the way back -----------------------------------------------------------------------

    source_family: str | None = None
    """The transformers model type that the weights came from (`from_transformers`) or that the preset reproduces.

    `to_transformers` converts back to it.
    """

    source_fields: dict[Any, Any] | None = None
    """What that family's config held that changes no number here."""

    source_weights: dict[str, list[Any]] | None = None
    """{name there: [dtype, shape]} of tensors that have no place here (BERT's pooler).

    The model holds them as buffers that nothing reads.
    """

    if TYPE_CHECKING:
        num_labels: Filled[int] = None  # type: ignore[assignment]  # a property of `PreTrainedConfig`

    def __post_init__(self, **kwargs: Any) -> None:
        for alias in self.attribute_map.keys() & kwargs.keys():
            setattr(self, alias, kwargs.pop(alias))
        check_unknown(kwargs, {field.name for field in fields(self)})
        self._check_sizes(kwargs)
        self.rope_parameters = copy.deepcopy(self.rope_parameters)  # the library writes into it; the caller's stays
        self.source_fields = copy.deepcopy(self.source_fields)
        self.source_weights = copy.deepcopy(self.source_weights)
        self.is_encoder_decoder = self.architecture == "encoder-decoder"
        if self.architecture == "encoder":  # transformers takes a config with a plan for one that generates
            self.base_model_tp_plan = None  # type: ignore[misc, assignment]  # the encoder's plan is on `UrformStack`
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            need(
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
        """Check the sizes before anything is made of them."""
        for name in LARGEST.keys() & {field.name for field in fields(self)}:
            check_size(name, getattr(self, name))
        for name in DECODER_SIZES:
            check_size(f"decoder_{name}", getattr(self, f"decoder_{name}"))
        if "num_labels" in kwargs:
            check_size("num_labels", kwargs["num_labels"])
        check_architectures(self.architectures)
        check_dtype(kwargs.get("torch_dtype"))
        check_dtype(self.dtype)
        need(
            not kwargs.get("per_layer_config"),
            "per_layer_config gives layers sizes of their own, which Urform does not have; leave it out",
        )

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build a config as the library does; warn where a checkpoint was published by a newer Urform than this."""
        check_nesting(config_dict, "the config")
        return super().from_dict(unstamped(config_dict, None if IS_FLAT_COPY else package_version()), **kwargs)

    @classmethod
    def _dict_from_json_file(cls, json_file: str | os.PathLike[str]) -> dict[str, Any]:
        """Read a file as the library does.

        Raises:
            ValueError: Python cannot follow its nesting, or it holds no object.
        """
        try:
            found = super()._dict_from_json_file(json_file)
        except RecursionError as error:
            raise ValueError(f"{json_file} is nested too deeply to be read; repair it") from error
        check_object(found, str(json_file))
        return found

    def _resolve_decoder(self) -> None:
        """Fill the decoder's sizes in; transformers reads them by stripping the prefix, so None would reach it."""
        heads = self.decoder_num_attention_heads
        if self.decoder_num_key_value_heads is None and heads is not None:
            self.decoder_num_key_value_heads = heads
        if self.decoder_head_dim is None and heads is not None:
            need(
                self.hidden_size % heads == 0,
                f"hidden_size={self.hidden_size} is not a multiple of decoder_num_attention_heads={heads}; change one "
                "of them or set decoder_head_dim",
            )
            self.decoder_head_dim = self.hidden_size // heads
        for name in DECODER_SIZES:
            if getattr(self, f"decoder_{name}") is None:
                setattr(self, f"decoder_{name}", getattr(self, name))
        if self.decoder_layer_types is None:
            layers = filled(self.decoder_num_hidden_layers)
            same = layers == self.num_hidden_layers
            self.decoder_layer_types = list(self.layer_types) if same else ["full_attention"] * layers
        if self.decoder_start_token_id is None:  # as fairseq and BART: labels may begin with bos themselves
            self.decoder_start_token_id = self.eos_token_id if isinstance(self.eos_token_id, int) else self.bos_token_id

    def convert_rope_params_to_dict(self, **kwargs: Any) -> dict[str, Any]:
        """Convert as the library does, for RoPE only; refuse rotary settings with another position encoding."""
        if self.position_encoding == "rope" and self.rope_is_per_layer_type:  # transformers 5.17 expects the flat form
            theta = kwargs.pop("rope_theta", self.default_theta)
            per_type = filled(self.rope_parameters)
            for kind, parameters in per_type.items():
                need(isinstance(parameters, dict), f"rope_parameters[{kind!r}]={parameters!r} must be a dict")
            for parameters in per_type.values():
                parameters.setdefault("rope_theta", theta)
            self.standardize_rope_params()
            return kwargs
        if self.position_encoding == "rope":
            return super().convert_rope_params_to_dict(**kwargs)
        given = [k for k in ("rope_theta", "rope_scaling", "partial_rotary_factor") if kwargs.get(k) is not None]
        given += ["rope_parameters"] if self.rope_parameters else []
        need(
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
    def _attn_implementation(self, value: str | dict[str, Any] | None) -> None:
        """Set it as the library does, and remember whether anybody named one; if nobody did, it is Urform's own."""
        PreTrainedConfig._attn_implementation.fset(self, value)  # type: ignore[attr-defined]
        if not isinstance(value, dict) or "" in value:
            self._names_attention = self._attn_implementation_internal is not None

    def _remove_keys_not_serialized(self, d: dict[str, Any]) -> None:
        super()._remove_keys_not_serialized(d)
        d.pop("_names_attention", None)

    @property
    def rope_is_per_layer_type(self) -> bool:
        """Whether `rope_parameters` holds one dict per layer type."""
        kinds = set(self.rope_parameters or ())
        return bool(kinds) and kinds <= {"full_attention", "sliding_attention"}

    def stack_sizes(self, decoder: bool) -> StackSizes:
        """Return the sizes of the decoder or of the encoder; with one stack only, of that stack."""
        prefix = "decoder_" if decoder and self.is_encoder_decoder else ""
        return StackSizes(*(getattr(self, prefix + name) for name in StackSizes._fields))

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """Return what the library does, but this very config and no copy for a decoder like its encoder."""
        alike = all(getattr(self, f"decoder_{n}") == getattr(self, n) for n in (*DECODER_SIZES, "layer_types"))
        return self if alike else super().get_text_config(decoder=decoder, encoder=encoder)

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> "UrformConfig":
        """Build a named Transformer from the table in `presets_urform.py`, with fields overridden.

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

    def validate_architecture(self) -> None:
        """Check which fields go together; part of `@strict` validation, at construction and at saving."""
        check_combinations(self)

    def validate_numbers(self) -> None:
        """Check each field alone."""
        self._check_sizes({})
        for name in ("hidden_act", "classifier_activation", "lm_head_activation"):
            value = getattr(self, name)
            known = value is None or value in ACT2FN
            need(known, f"{name}={value!r} is unknown; use one of {sorted(ACT2FN)}")
        for name in ("norm_eps", "attention_scale", "attn_logit_softcapping", "final_logit_softcapping"):
            check_number(name, getattr(self, name), 0.0)
        for name in ("logit_scale", "norm_offset"):
            check_number(name, getattr(self, name))
        for name in ("hidden_dropout_prob", "attention_dropout", "activation_dropout", "classifier_dropout"):
            check_number(name, getattr(self, name), 0.0, 1.0)
        check_size("num_labels", self.num_labels)
        problems = ("regression", "single_label_classification", "multi_label_classification", None)
        need(
            self.problem_type in problems,
            f"problem_type={self.problem_type!r} is unknown; use one of {', '.join(map(repr, problems))}",
        )
        check_source_weights(self.source_weights or {})

    def validate_token_ids(self) -> None:
        """Check that every id is a row of the table."""
        for name in ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"):
            check_token_id(name, getattr(self, name), self.vocab_size)

    def validate_rope(self) -> None:
        """Check that rotary parameters are known, complete and positive."""
        if self.position_encoding == "rope":
            kinds = {*(self.layer_types or ()), *(self.decoder_layer_types or ())}
            given = self.rope_parameters
            if given is not None and self.rope_is_per_layer_type:
                for kind in sorted(kinds & set(given)):
                    check_rope(given[kind], f"rope_parameters[{kind!r}]", self.head_dim)
            else:
                check_rope(given, "rope_parameters", self.head_dim)
        super().validate_rope()


_strict_init = UrformConfig.__init__


@functools.wraps(_strict_init)
def _init(self: UrformConfig, *args: Any, **kwargs: Any) -> None:
    try:
        _strict_init(self, *args, **kwargs)
    except StrictDataclassFieldValidationError as error:
        raise InvalidFieldError(str(error)) from error
    except StrictDataclassError as error:
        raise InvalidConfigError(str(error.__cause__ or error)) from error


UrformConfig.__init__ = _init  # type: ignore[method-assign]


def list_presets() -> dict[str, str]:
    """Return the named Transformers of `UrformConfig.from_preset`: name -> the paper or family that it reproduces."""
    return {name: preset.source for name, preset in PRESETS.items()}
