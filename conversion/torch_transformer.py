# Copyright 2026 The Urform authors. Licensed under the Apache License, Version 2.0.
"""PyTorch's own Transformer: `torch.nn.Transformer` and `nn.TransformerEncoder`, with embeddings and output layer.

They are layers without a config, so it is read off the modules; what they cannot say (positions, scaling, a causal
mask) the caller says. Their tensors go by rules, as those of the families.
"""

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from ..configuration.configuration_urform import UrformConfig
from ..modeling import modeling_urform
from .engine import Conversion, assemble, empty
from .family import PARTS, Family, Head, Rule, modules
from .tensors import Side, plan

_Stack = nn.TransformerEncoder | nn.TransformerDecoder
_ACTIVATIONS: dict[Callable[..., Tensor], str] = {
    functional.relu: "relu",
    torch.relu: "relu",
    functional.gelu: "gelu",
    functional.silu: "silu",
    functional.mish: "mish",
    functional.tanh: "tanh",
    torch.tanh: "tanh",
}
_ACTIVATION_MODULES = {"ReLU": "relu", "SiLU": "silu", "Mish": "mish", "Tanh": "tanh"}
# What a caller may say though the modules say something: rates, and an activation whose name nobody knows.
_OPEN = ("hidden_dropout_prob", "attention_dropout", "activation_dropout", "hidden_act")


def _activation(layer: Any) -> str | None:
    activation = layer.activation
    if isinstance(activation, nn.GELU):
        return "gelu_pytorch_tanh" if activation.approximate == "tanh" else "gelu"
    if isinstance(activation, nn.Module):
        return _ACTIVATION_MODULES.get(type(activation).__name__)
    return _ACTIVATIONS.get(activation)


def _layer_rules(stock: str, ours: str, cross: bool) -> tuple[Rule, ...]:
    names = {"linear1": "mlp.up_proj", "linear2": "mlp.down_proj", "norm1": "self_attn_norm"}
    names |= {"norm2": "cross_attn_norm", "norm3": "mlp_norm"} if cross else {"norm2": "mlp_norm"}
    attentions = {"self_attn": "self_attn", "multihead_attn": "cross_attn"}
    names |= {f"{theirs}.out_proj": f"{own}.o_proj" for theirs, own in attentions.items()}
    there, here = f"{stock}.layers.{{i}}.", f"{ours}.layers.{{i}}."
    return (
        *modules(f"{stock}.", f"{ours}.", {"norm": "norm", "embed_tokens": "embed_tokens"}),
        Rule(f"{stock}.embed_positions.weight", f"{ours}.embed_positions.weight"),
        *modules(there, here, names),
        *(
            Rule(f"{there}{theirs}.in_proj_{kind}", tuple(f"{here}{own}.{x}_proj.{kind}" for x in "qkv"), PARTS)
            for theirs, own in attentions.items()
            for kind in ("weight", "bias")
        ),
    )


def _layers(stack: Any) -> list[Any]:
    """Return the layers of a stack. `_check_stack` has checked their class, whose attributes PyTorch does not type."""
    return list(stack.layers)


def _facts(stack: _Stack) -> Iterator[tuple[str, Any]]:
    """Yield what each module of a stack says, as (field of the config, value)."""
    final = stack.norm
    yield "final_norm", final is not None
    for layer in _layers(stack):
        yield "norm_position", "pre" if layer.norm_first else "post"
        yield "hidden_act", _activation(layer)
        yield "intermediate_size", layer.linear1.out_features
        yield from (("mlp_bias", linear.bias is not None) for linear in (layer.linear1, layer.linear2))
        yield "activation_dropout", float(layer.dropout.p)
        for name, module in layer.named_children():
            if isinstance(module, nn.MultiheadAttention):
                yield "num_attention_heads", module.num_heads
                yield "attention_bias", module.in_proj_bias is not None
                yield "attention_out_bias", module.out_proj.bias is not None
                yield "attention_dropout", float(module.dropout)
            elif isinstance(module, nn.Dropout) and name != "dropout":
                yield "hidden_dropout_prob", float(module.p)
    for norm in [module for module in stack.modules() if isinstance(module, nn.LayerNorm)]:
        yield "norm_eps", norm.eps
        yield "norm_bias", norm.bias is not None


def _check_stack(stack: nn.Module, name: str, kind: type[nn.Module], layer_kind: type[nn.Module]) -> None:
    """Raise ValueError unless a stack is PyTorch's own, of which the fields below are all there is to know."""
    layers = _layers(stack) if type(stack) is kind else []
    strange = {type(layer).__name__ for layer in layers if type(layer) is not layer_kind}
    if strange or not layers:
        raise ValueError(
            f"{name} is a {type(stack).__name__} of {sorted(strange) or 'no layers'}; only nn.{kind.__name__} of "
            f"nn.{layer_kind.__name__} computes what is known, a class of its own need not"
        )
    for path, module in stack.named_modules():
        _check_part(module, f"{name}.{path}")


def _check_part(module: nn.Module, path: str) -> None:
    """Raise ValueError for an attention or a norm that Urform cannot compute."""
    if isinstance(module, nn.MultiheadAttention):
        if not module._qkv_same_embed_dim or module.bias_k is not None or module.add_zero_attn:
            raise ValueError(f"{path} has kdim, vdim, add_bias_kv or add_zero_attn, which Urform lacks")
    elif "norm" in path.rpartition(".")[2] and (type(module) is not nn.LayerNorm or module.weight is None):
        raise ValueError(f"{path} is {module}; only nn.LayerNorm with a weight is known")


def _one_value(facts: Iterator[tuple[str, Any]], where: str, named: dict[str, Any]) -> dict[str, Any]:
    """Return the one value of each fact; what the caller has named replaces what `_OPEN` leaves to the caller."""
    found: dict[str, set[Any]] = {}
    for name, value in facts:
        found.setdefault(name, set()).add(value)
    settled = {name: named[name] for name in _OPEN if name in named}
    found = {name: values for name, values in found.items() if name not in settled}
    several = {name: sorted(values) for name, values in found.items() if len(values) > 1}
    if several:
        raise ValueError(f"{where} has several values of {several}; Urform has one for all layers and both stacks")
    if None in found.get("hidden_act", ()):
        raise ValueError(f"{where} has an activation that is not known by name; say which with hidden_act=")
    return {**{name: values.pop() for name, values in found.items()}, **settled}


def _table(positions: nn.Embedding | Tensor, width: int, name: str) -> Tensor:
    """Return a table of positions `[length, E]`; a dimension of one for the batch is dropped."""
    table = _embedding(positions, width, name).weight if isinstance(positions, nn.Embedding) else positions
    kept = [size for size in table.shape if size != 1] if table.ndim == 3 else list(table.shape)
    if len(kept) != 2 or kept[1] != width:
        raise ValueError(f"{name} is {list(table.shape)}; it must be [length, {width}], [1, length, {width}] or as [1]")
    return table.reshape(kept)


def _position_tables(stacks: dict[str, _Stack], width: int, positions: Any, of_target: Any) -> dict[str, Tensor]:
    """Return the learned table of each stack, all of one length; an empty dict if there are none."""
    if positions is None or isinstance(positions, str):
        if of_target is not None or positions not in (None, "sinusoidal"):
            raise ValueError(
                f'positions={positions!r} is neither a table, "sinusoidal" nor None, or comes with decoder_positions'
            )
        return {}
    tables = dict.fromkeys(stacks, _table(positions, width, "positions"))
    if of_target is not None:
        tables["decoder"] = _table(of_target, width, "decoder_positions")
    lengths = {side: table.shape[0] for side, table in tables.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"the tables of positions have lengths {lengths}; cut them to one: table.weight[:n]")
    return tables


def _embedding(module: nn.Embedding, width: int, name: str) -> nn.Embedding:
    if not isinstance(module, nn.Embedding) or module.embedding_dim != width:
        raise ValueError(f"{name} is {module}; it must be an nn.Embedding of d_model={width} features")
    if module.max_norm is not None or module.scale_grad_by_freq:
        raise ValueError(f"{name} has max_norm or scale_grad_by_freq, which Urform lacks")
    return module


def _stacks(module: nn.Module, causal: bool) -> dict[str, _Stack]:
    """Return the stacks of a module by our names."""
    if isinstance(module, nn.Transformer):
        _check_stack(module.encoder, "encoder", nn.TransformerEncoder, nn.TransformerEncoderLayer)
        _check_stack(module.decoder, "decoder", nn.TransformerDecoder, nn.TransformerDecoderLayer)
        if causal:
            raise ValueError("causal=True is for nn.TransformerEncoder; the decoder of nn.Transformer is causal here")
        return {"encoder": module.encoder, "decoder": module.decoder}
    if isinstance(module, nn.TransformerDecoder):
        raise ValueError(
            "module is an nn.TransformerDecoder, which reads the states of an encoder; give both as "
            "nn.Transformer(d_model, nhead, custom_encoder=encoder, custom_decoder=decoder)"
        )
    if not isinstance(module, nn.TransformerEncoder):
        inside = [n for n, m in module.named_modules() if isinstance(m, nn.Transformer | nn.TransformerEncoder)]
        hint = f"; give what is at {inside[0]!r} in it, with its embeddings" if inside else ""
        raise ValueError(f"module is a {type(module).__name__}, not nn.Transformer or nn.TransformerEncoder{hint}")
    _check_stack(module, "module", nn.TransformerEncoder, nn.TransformerEncoderLayer)
    return {"decoder" if causal else "encoder": module}


def _head(stacks: dict[str, _Stack], output: nn.Linear | None, vocab_size: int) -> tuple[str, str]:
    """Return our class for an output layer, and the name of that layer in it."""
    if output is None:
        return "UrformModel", ""
    if output.out_features == vocab_size:
        kinds = {"encoder": "MaskedLM", "decoder": "CausalLM", "encoder-decoder": "ConditionalGeneration"}
        return f"UrformFor{kinds['-'.join(stacks)]}", "lm_head"
    if len(stacks) == 2:
        raise ValueError(f"output has out_features={output.out_features}, but there are {vocab_size} embeddings")
    return "UrformForTokenClassification", "classifier.out_proj"


def from_torch_transformer(
    module: nn.Transformer | nn.TransformerEncoder,
    *,
    embeddings: nn.Embedding,
    decoder_embeddings: nn.Embedding | None = None,
    positions: nn.Embedding | Tensor | Literal["sinusoidal"] | None = None,
    decoder_positions: nn.Embedding | Tensor | None = None,
    output: nn.Linear | None = None,
    scale_embedding: bool = False,
    causal: bool = False,
    **fields: Any,
) -> PreTrainedModel:
    """Return a Urform model of PyTorch's own Transformer, with the same weights and the same numbers.

    It computes `output(module(embeddings(ids) * scale + positions[:length]))`, where a decoder has the causal mask
    and padding is masked on both sides (`*_key_padding_mask`); a module that ran without masks computed something
    else. Whether it was `batch_first` makes no difference: Urform's inputs always are. All tensors are copied.

    Args:
        module: An `nn.Transformer` (an encoder-decoder here), or an `nn.TransformerEncoder` (an encoder; with
            `causal`, a decoder), of PyTorch's own layers: pre- or post-norm, with or without biases.
        embeddings: The tokens' embeddings, of the source or of both sides.
        decoder_embeddings: Those of the target, as many. None: the same.
        positions: A learned table, an `nn.Embedding` or a tensor `[length, E]` or `[1, length, E]` (also a buffer);
            `"sinusoidal"` computes the sinusoids of Vaswani et al. 2017, section 3.5, of any length. None:
            no positions.
        decoder_positions: The target's table, as long. None: the same, of which each side gets a copy.
        output: The output layer: over the vocabulary it makes a language model; of another width, over the states of
            one stack, a token classifier. Sharing the weight of the embeddings, it stays tied to them. None: the
            states.
        scale_embedding: Whether embeddings are multiplied by the root of `d_model`.
        causal: Whether an `nn.TransformerEncoder` runs under a causal mask, as a language model.
        **fields: Fields of `UrformConfig` that the modules do not say: `pad_token_id` (default: the embeddings'
            `padding_idx`), `bos_token_id`, `eos_token_id`, `decoder_start_token_id`, `id2label` ...; dropouts and
            `hidden_act` where they differ from the modules' or are not known by name.

    Returns:
        A `UrformModel`, `UrformForConditionalGeneration`, `UrformForCausalLM`, `UrformForMaskedLM` or
        `UrformForTokenClassification`.

    Raises:
        ValueError: A part that is not PyTorch's own, or parts that do not go together; with the part and its value.
    """
    stacks = _stacks(module, causal)
    if len(stacks) == 1 and (decoder_embeddings is not None or decoder_positions is not None):
        raise ValueError(
            "decoder_embeddings and decoder_positions are for nn.Transformer; there is one stack: drop them"
        )
    width = _layers(next(iter(stacks.values())))[0].linear1.in_features
    tables = _token_tables(stacks, width, embeddings, decoder_embeddings)
    derived = _read_config(stacks, tables, fields)
    derived["hidden_size"], derived["scale_embedding"] = width, scale_embedding
    position_tables = _position_tables(stacks, width, positions, decoder_positions)
    derived.update(_read_positions(position_tables, positions))
    name, place = _head(stacks, output, derived["vocab_size"])
    if output is not None:
        derived.update(_read_output(output, place, tables))
        if place != "lm_head":
            fields.setdefault("id2label", {i: f"LABEL_{i}" for i in range(output.out_features)})
    said = sorted(name for name in fields if name in derived and name not in _OPEN)
    if said:
        raise ValueError(f"{', '.join(said)} follow from the modules; give only what they do not say")
    config = UrformConfig(**{"pad_token_id": embeddings.padding_idx, **_NO_TOKENS, **fields, **derived})
    state = _named_tensors(stacks, tables, position_tables)
    if output is not None:
        state |= {f"{place}.{kind}": tensor for kind, tensor in output.state_dict().items()}
    return _build(module, name, config, state, stacks, place).train(module.training)


_NO_TOKENS = {"bos_token_id": None, "eos_token_id": None, "initializer": "xavier"}


def _token_tables(
    stacks: dict[str, _Stack], width: int, embeddings: nn.Embedding, of_target: nn.Embedding | None
) -> dict[str, nn.Embedding]:
    """Return the tokens' embeddings of each stack."""
    tables = dict.fromkeys(stacks, _embedding(embeddings, width, "embeddings"))
    if of_target is not None and of_target is not embeddings:
        tables["decoder"] = _embedding(of_target, width, "decoder_embeddings")
    return tables


def _read_config(stacks: dict[str, _Stack], tables: dict[str, nn.Embedding], named: dict[str, Any]) -> dict[str, Any]:
    """Return the fields that stacks and embeddings say; `named` are those that the caller says."""
    own = ("num_attention_heads", "intermediate_size")
    shared = ((name, value) for stack in stacks.values() for name, value in _facts(stack) if name not in own)
    fields = _one_value(shared, " and ".join(stacks), named)
    fields["architecture"] = "-".join(stacks)
    for side, stack in stacks.items():
        prefix = "decoder_" if side == "decoder" and len(stacks) == 2 else ""
        sizes = _one_value((fact for fact in _facts(stack) if fact[0] in own), side, {})
        fields.update({f"{prefix}{name}": value for name, value in sizes.items()})
        fields[f"{prefix}num_hidden_layers"] = len(_layers(stack))
    return {**fields, **_read_embeddings(tables, named)}


def _read_embeddings(tables: dict[str, nn.Embedding], named: dict[str, Any]) -> dict[str, Any]:
    """Return the fields that the tokens' embeddings say."""
    values = {}
    for name in ("num_embeddings", "padding_idx"):
        several = {getattr(table, name) for table in tables.values()}
        if len(several) > 1:
            raise ValueError(f"embeddings and decoder_embeddings differ in {name}: {several}; Urform has one for both")
        values[name] = several.pop()
    pad = values["padding_idx"]
    if pad is not None and named.get("pad_token_id", pad) != pad:
        raise ValueError(f"pad_token_id={named['pad_token_id']}, but the embeddings' padding_idx is {pad}")
    return {
        "vocab_size": values["num_embeddings"],
        "freeze_pad_embedding": pad is not None,
        "share_embeddings": len({id(table.weight) for table in tables.values()}) == 1,
    }


def _read_positions(tables: dict[str, Tensor], positions: Any) -> dict[str, Any]:
    """Return the fields that the positions say."""
    fields: dict[str, Any] = {"position_encoding": "learned" if tables else positions or "none"}
    if tables:
        fields["max_position_embeddings"] = next(iter(tables.values())).shape[0]
    if positions is not None:
        fields["position_counting"] = "columns"
    return fields


def _read_output(output: nn.Linear, place: str, tables: dict[str, nn.Embedding]) -> dict[str, Any]:
    """Return the fields that the output layer says."""
    if place != "lm_head":
        return {"classifier_bias": output.bias is not None, "classifier_activation": None}
    *others, last = tables.values()
    tied = output.weight is last.weight
    if not tied and any(output.weight is table.weight for table in others):
        raise ValueError("output has the weight of the source's embeddings, Urform ties it to the target's")
    return {"tie_word_embeddings": tied, "lm_head_bias": output.bias is not None}


def _named_tensors(
    stacks: dict[str, _Stack], tables: dict[str, nn.Embedding], position_tables: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Return the tensors of stacks and tables, by the names that `_layer_rules` has for them."""
    state = {f"{side}.{name}": tensor for side, stack in stacks.items() for name, tensor in stack.state_dict().items()}
    state |= {f"{side}.embed_tokens.weight": table.weight for side, table in tables.items()}
    return state | {f"{side}.embed_positions.weight": table for side, table in position_tables.items()}


def _build(
    module: nn.Module,
    name: str,
    config: UrformConfig,
    state: dict[str, Tensor],
    stacks: dict[str, _Stack],
    place: str,
) -> PreTrainedModel:
    """Return the model of that class and config, with the tensors of `state`."""
    rules = tuple(rule for side in stacks for rule in _layer_rules(side, side, len(stacks) == 2 and side == "decoder"))
    family = Family("torch.nn", "", (), rules)
    head = Head(name, type(module).__name__, modules("", "", {place: place}) if place else ())
    source = Side({key: tensor.shape for key, tensor in state.items()}, {key: (key,) for key in state}, "")
    target = Side.of(empty(getattr(modeling_urform, name), config))
    steps = plan(family, head, config, source, target, back=False, kept={})
    conversion = Conversion(family, head, config, config, steps, source, target)
    weight = next(iter(state.values()))
    model: Any = assemble(conversion, state, weight.dtype, back=False)
    return model.to(weight.device)
