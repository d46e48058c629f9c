# Copyright 2026 The Urform authors. Licensed under the Apache License, Version 2.0.
"""Encoder families as tables; see `family.py` for the format."""

from typing import Any

from ..configuration.configuration_urform import UrformConfig
from .families_decoder import ROPE, USUAL_HEAD_DIM, classifier_rate, rope_per_type
from .family import PARTS, TWICE, Axis, Family, Head, Rule, modules, same

_CLASSIFIERS = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "ForMultipleChoice")
_OUTPUT = {"classifier": "classifier.out_proj"}


def _qa_labels(config: UrformConfig) -> dict[str, Any]:
    """Return two labels where a config has another number: the classes make a row per label, for start and end."""
    if config.num_labels == 2:
        return {}
    return {"id2label": {0: "LABEL_0", 1: "LABEL_1"}, "label2id": {"LABEL_0": 0, "LABEL_1": 1}}


_TWO_LABELS = Axis(lambda stock: {}, _qa_labels)


# ---------------------------------------------------------------------------------------------- BERT and RoBERTa

_BERT: dict[str, Any] = {
    "architecture": "encoder",
    "norm_position": "post",
    "position_encoding": "learned",
    "position_counting": "columns",
    "embedding_norm": True,
    "lm_head_bias": True,
    "lm_head_transform": True,
    "classifier_pooling": "first",
    "classifier_activation": "tanh",
}
_BERT_FIELDS = {
    **same("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act"),
    **same("hidden_dropout_prob", "classifier_dropout", "initializer_range"),
    "attention_dropout": "attention_probs_dropout_prob",
    "norm_eps": "layer_norm_eps",
}
_BERT_WEIGHTS = (
    Rule("embeddings.word_embeddings.weight", "encoder.embed_tokens.weight"),
    Rule("embeddings.position_embeddings.weight", "encoder.embed_positions.weight"),
    Rule("embeddings.token_type_embeddings.weight", "encoder.embed_token_types.weight", fill=0.0),
    *modules("embeddings.", "encoder.", {"LayerNorm": "embed_norm"}),
    *modules(
        "encoder.layer.{i}.",
        "encoder.layers.{i}.",
        {
            "attention.self.query": "self_attn.q_proj",
            "attention.self.key": "self_attn.k_proj",
            "attention.self.value": "self_attn.v_proj",
            "attention.output.dense": "self_attn.o_proj",
            "attention.output.LayerNorm": "self_attn_norm",
            "intermediate.dense": "mlp.up_proj",
            "output.dense": "mlp.down_proj",
            "output.LayerNorm": "mlp_norm",
        },
    ),
)


# A field of old checkpoints; transformers 5 has no relative positions here, and overlooks it.
_ABSOLUTE = {"position_embedding_type": lambda stock: stock.position_embedding_type in (None, "absolute")}

# A table of one row of zeros is none.
_TOKEN_TYPES = Axis(
    lambda stock: {"type_vocab_size": stock.type_vocab_size},
    lambda config: {"type_vocab_size": config.type_vocab_size or 1},
)


def _bert_heads(
    name: str, language: tuple[Rule, ...], sequence: tuple[Rule, ...], choice: tuple[Rule, ...]
) -> tuple[Head, ...]:
    rules = {
        "ForSequenceClassification": sequence,
        "ForTokenClassification": modules("", "", _OUTPUT),
        "ForQuestionAnswering": modules("", "", {"qa_outputs": "qa_outputs"}),
        "ForMultipleChoice": choice,
    }
    axes = {"ForQuestionAnswering": (_TWO_LABELS,)}
    return (
        Head("UrformModel", f"{name}Model", options={"add_pooling_layer": False}),  # ours has no pooler
        Head("UrformForMaskedLM", f"{name}ForMaskedLM", language),
        *(Head(f"Urform{kind}", f"{name}{kind}", rules[kind], axes=axes.get(kind, ())) for kind in _CLASSIFIERS),
    )


def _pooled(prefix: str) -> tuple[Rule, ...]:
    return modules("", "", {f"{prefix}.pooler.dense": "classifier.transform.dense", **_OUTPUT})


_BERT_LANGUAGE = (
    *modules("cls.predictions.transform.", "transform.", {"dense": "dense", "LayerNorm": "norm"}),
    Rule("cls.predictions.decoder.weight", "lm_head.weight"),
    Rule(("cls.predictions.decoder.bias", "cls.predictions.bias"), "lm_head.bias", TWICE),
)

BERT = Family(
    "bert",
    "BertConfig",
    heads=(
        *_bert_heads("Bert", _BERT_LANGUAGE, _pooled("bert"), _pooled("bert")),
        Head(
            "UrformForMaskedLM",
            "BertForPreTraining",
            _BERT_LANGUAGE,
            dropped=(r"bert\.pooler\.dense\..*", r"cls\.seq_relationship\..*"),
        ),
    ),
    weights=_BERT_WEIGHTS,
    fixed=_BERT,
    fields={**_BERT_FIELDS, **same("max_position_embeddings")},
    axes=(_TOKEN_TYPES,),
    idle=_ABSOLUTE,
    held_by_weights=("type_vocab_size",),
)

# Positions begin after the pad token's, whose place in the table is its id.
_FAIRSEQ_POSITIONS = Axis(
    lambda stock: {
        "position_offset": 0 if stock.pad_token_id is None else stock.pad_token_id + 1,
        "max_position_embeddings": stock.max_position_embeddings - (stock.pad_token_id or 0) - 1,
    },
    lambda config: {"max_position_embeddings": config.max_position_embeddings + config.position_offset},
)


def _roberta(model_type: str, name: str) -> Family:
    return Family(
        model_type,
        f"{name}Config",
        heads=_bert_heads(
            name,
            (
                *modules("lm_head.", "transform.", {"dense": "dense", "layer_norm": "norm"}),
                Rule("lm_head.decoder.weight", "lm_head.weight"),
                Rule(("lm_head.decoder.bias", "lm_head.bias"), "lm_head.bias", TWICE),
            ),
            modules("classifier.", "classifier.", {"dense": "transform.dense", "out_proj": "out_proj"}),
            _pooled("roberta"),
        ),
        weights=_BERT_WEIGHTS,
        fixed={**_BERT, "position_counting": "tokens", "lm_head_activation": "gelu"},
        fields=_BERT_FIELDS,
        axes=(_TOKEN_TYPES, _FAIRSEQ_POSITIONS),
        idle=_ABSOLUTE,
        held_by_weights=("type_vocab_size",),
    )


ROBERTA = _roberta("roberta", "Roberta")
XLM_ROBERTA = _roberta("xlm-roberta", "XLMRoberta")


# ---------------------------------------------------------------------------------------------------- DistilBERT


_DISTILBERT_CLASSIFIER = modules("", "", {"pre_classifier": "classifier.transform.dense", **_OUTPUT})

DISTILBERT = Family(
    "distilbert",
    "DistilBertConfig",
    heads=(
        Head("UrformModel", "DistilBertModel"),
        Head(
            "UrformForMaskedLM",
            "DistilBertForMaskedLM",
            modules(
                "",
                "",
                {
                    "vocab_transform": "transform.dense",
                    "vocab_layer_norm": "transform.norm",
                    "vocab_projector": "lm_head",
                },
            ),
        ),
        Head("UrformForSequenceClassification", "DistilBertForSequenceClassification", _DISTILBERT_CLASSIFIER),
        Head(
            "UrformForTokenClassification",
            "DistilBertForTokenClassification",
            modules("", "", _OUTPUT),
            axes=(  # its rate is that of the layers
                Axis(lambda stock: {"classifier_dropout": None}, lambda config: {"seq_classif_dropout": 0.2}),
            ),
        ),
        Head(
            "UrformForQuestionAnswering",
            "DistilBertForQuestionAnswering",
            modules("", "", {"qa_outputs": "qa_outputs"}),
            axes=(_TWO_LABELS,),
        ),
        Head("UrformForMultipleChoice", "DistilBertForMultipleChoice", _DISTILBERT_CLASSIFIER),
    ),
    weights=(
        Rule("embeddings.word_embeddings.weight", "encoder.embed_tokens.weight"),
        Rule("embeddings.position_embeddings.weight", "encoder.embed_positions.weight"),
        *modules("embeddings.", "encoder.", {"LayerNorm": "embed_norm"}),
        *modules(
            "transformer.layer.{i}.",
            "encoder.layers.{i}.",
            {
                **{f"attention.{x}_lin": f"self_attn.{x}_proj" for x in "qkv"},
                "attention.out_lin": "self_attn.o_proj",
                "sa_layer_norm": "self_attn_norm",
                "ffn.lin1": "mlp.up_proj",
                "ffn.lin2": "mlp.down_proj",
                "output_layer_norm": "mlp_norm",
            },
        ),
    ),
    fixed={**_BERT, "norm_eps": 1e-12, "classifier_activation": "relu"},
    fields={
        **same("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"),
        **same("attention_dropout", "initializer_range"),
        "intermediate_size": "hidden_dim",
        "hidden_act": "activation",
        "hidden_dropout_prob": "dropout",
    },
    axes=(
        Axis(
            lambda stock: {"classifier_dropout": stock.seq_classif_dropout},
            lambda config: {"seq_classif_dropout": classifier_rate(config)},
        ),
    ),
    training_only=("qa_dropout",),
    # The table of sinusoids is a table like another once it is made; the rate is another class's where it is lost.
    ignored=("sinusoidal_pos_embds", "seq_classif_dropout"),
)


# ---------------------------------------------------------------------------------------------------- ModernBERT


def _modernbert_to_urform(stock: Any) -> dict[str, Any]:
    return {
        "layer_types": list(stock.layer_types),
        "sliding_window": stock.local_attention // 2,
        "classifier_pooling": {"cls": "first"}.get(stock.classifier_pooling, stock.classifier_pooling),
        "lm_head_activation": stock.classifier_activation,
    }


def _modernbert_to_stock(config: UrformConfig) -> dict[str, Any]:
    return {
        "layer_types": list(config.layer_types),
        "local_attention": 128 if config.sliding_window is None else 2 * config.sliding_window,
        "classifier_pooling": "mean" if config.classifier_pooling == "mean" else "cls",
        "classifier_activation": config.classifier_activation or "gelu",
        "classifier_dropout": classifier_rate(config),
    }


_MODERNBERT_HEAD = modules("head.", "classifier.transform.", {"dense": "dense", "norm": "norm"})

MODERNBERT = Family(
    "modernbert",
    "ModernBertConfig",
    heads=(
        Head("UrformModel", "ModernBertModel"),
        Head(
            "UrformForMaskedLM",
            "ModernBertForMaskedLM",
            (
                *modules("head.", "transform.", {"dense": "dense", "norm": "norm"}),
                *modules("", "", {"decoder": "lm_head"}),
            ),
            axes=(
                Axis(
                    lambda stock: {},
                    lambda config: {"classifier_activation": config.lm_head_activation or config.hidden_act},
                ),
            ),
        ),
        *(
            Head(f"Urform{kind}", f"ModernBert{kind}", (*_MODERNBERT_HEAD, *modules("", "", _OUTPUT)))
            for kind in _CLASSIFIERS
            if kind != "ForQuestionAnswering"
        ),
        Head(
            "UrformForQuestionAnswering",
            "ModernBertForQuestionAnswering",
            modules(
                "", "", {"head.dense": "transform.dense", "head.norm": "transform.norm", "classifier": "qa_outputs"}
            ),
            axes=(_TWO_LABELS,),
        ),
    ),
    weights=(
        Rule("embeddings.tok_embeddings.weight", "encoder.embed_tokens.weight"),
        *modules("", "encoder.", {"embeddings.norm": "embed_norm", "final_norm": "norm"}),
        *modules(
            "layers.{i}.",
            "encoder.layers.{i}.",
            {
                "attn_norm": "self_attn_norm",
                "attn.Wo": "self_attn.o_proj",
                "mlp_norm": "mlp_norm",
                "mlp.Wo": "mlp.down_proj",
            },
        ),
        *(
            Rule(f"layers.{{i}}.{stock}.{kind}", tuple(f"encoder.layers.{{i}}.{own}.{kind}" for own in ours), PARTS)
            for stock, ours in (
                ("attn.Wqkv", tuple(f"self_attn.{x}_proj" for x in "qkv")),
                ("mlp.Wi", ("mlp.gate_proj", "mlp.up_proj")),
            )
            for kind in ("weight", "bias")
        ),
    ),
    fixed={
        "architecture": "encoder",
        "norm_position": "pre",
        "first_norm": False,
        "embedding_norm": True,
        "position_encoding": "rope",
        "gated_mlp": True,
        "lm_head_transform": True,
        "classifier_norm": True,
        "token_classifier_dense": True,
        "initializer": "gpt2",
    },
    fields={
        **same("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
        **same("max_position_embeddings", "initializer_range", "norm_eps", "norm_bias", "attention_bias", "mlp_bias"),
        **same("attention_dropout", "classifier_activation", "classifier_dropout"),
        "hidden_act": "hidden_activation",
        "activation_dropout": "mlp_dropout",
        "lm_head_bias": "decoder_bias",
        "transform_bias": "classifier_bias",
    },
    axes=(
        Axis(ROPE.to_urform, rope_per_type),
        Axis(_modernbert_to_urform, _modernbert_to_stock),
    ),
    training_only=("embedding_dropout", "sparse_prediction"),
    idle={"sparse_pred_ignore_index": lambda stock: not stock.sparse_prediction, **USUAL_HEAD_DIM},
    ignored=(
        "local_attention",
        "cls_token_id",
        "sep_token_id",
        "deterministic_flash_attn",
        "initializer_cutoff_factor",
    ),
)

ENCODERS = (BERT, ROBERTA, XLM_ROBERTA, DISTILBERT, MODERNBERT)
