"""The tokenizer and the model of a recipe: loaded, or trained and built from a config."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from .recipe import Recipe
from .resuming import TOKENIZER_FOLDER, begin_afresh, refuse_other_tokenizer, sweep
from .tasks import ARCHITECTURES, Labels, auto_class

__all__ = ["build_model", "check_config", "prepare_tokenizer", "train_tokenizer"]


def train_tokenizer(recipe: Recipe, examples: Sequence[tuple[Any, ...]]) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a recipe: loaded, or trained on every text of the training examples."""
    arguments = recipe.tokenizer
    if arguments.from_pretrained:
        return AutoTokenizer.from_pretrained(arguments.from_pretrained)
    from ..tokenization.tokenization_urform import UrformTokenizer

    def texts() -> Iterator[str]:
        sides = 2 if recipe.data.task == "seq2seq" else 1
        for example in examples:
            for value in example[:sides]:
                yield " ".join(value) if isinstance(value, list) else value

    # A target that begins with <s> would only teach the model to copy its own start symbol.
    options = {"add_bos": False} if recipe.data.task == "seq2seq" else {}
    return UrformTokenizer.train(
        texts(),
        vocab_size=arguments.vocab_size,
        model=arguments.model,
        languages=arguments.languages,
        **{**options, **arguments.options},
    )


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, labels: Labels) -> PreTrainedModel:
    """Build the model of a recipe, with the task's head and the tokenizer's vocabulary and special tokens.

    Raises:
        ValueError: If the config refuses a field, or the tokenizer lacks a token that the task needs.
    """
    arguments, task = recipe.model, recipe.data.task
    head = auto_class(task)
    fields: dict[str, Any] = dict(arguments.config)
    if labels.names:
        fields["id2label"] = dict(enumerate(labels.names))
        fields["label2id"] = {name: index for index, name in enumerate(labels.names)}
    if task == "text-classification":
        # The labels are names of classes, also where a model that was made for a regression is trained further.
        fields.setdefault("problem_type", "single_label_classification")
    implementation = {"attn_implementation": arguments.attn_implementation} if arguments.attn_implementation else {}
    if arguments.from_pretrained:
        model = head.from_pretrained(arguments.from_pretrained, **fields, **implementation)
        if len(tokenizer) > model.get_input_embeddings().num_embeddings:
            raise ValueError(
                f"the tokenizer has {len(tokenizer)} tokens and {arguments.from_pretrained} embeds "
                f"{model.get_input_embeddings().num_embeddings}: set tokenizer.from_pretrained to it"
            )
        return model
    if tokenizer.pad_token_id is None or tokenizer.eos_token_id is None:
        raise ValueError("training needs a tokenizer with a padding and an end token")
    fields.setdefault("vocab_size", len(tokenizer))
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        fields.setdefault(name, getattr(tokenizer, name))
    config = _new_config(recipe, fields)
    if config.is_encoder_decoder and config.decoder_start_token_id is None:
        config.decoder_start_token_id = (
            tokenizer.bos_token_id if tokenizer.bos_token_id is not None else config.pad_token_id
        )
    return head.from_config(config, **implementation)


def _new_config(recipe: Recipe, fields: dict[str, Any]) -> PreTrainedConfig:
    arguments = recipe.model
    if arguments.preset is not None:
        if arguments.model_type != "urform":
            raise ValueError(f"model.preset is for model_type urform, not {arguments.model_type}")
        from ..configuration.configuration_urform import UrformConfig

        return UrformConfig.from_preset(arguments.preset, **fields)
    if arguments.model_type == "urform":
        fields.setdefault("architecture", ARCHITECTURES.get(recipe.data.task, "encoder"))
    return AutoConfig.for_model(arguments.model_type, **fields)


def check_config(recipe: Recipe) -> None:
    """Build the recipe's config once, so that a faulty one is refused before data are read and a tokenizer is trained.

    Raises:
        ValueError: If the config refuses a field.
    """
    if not recipe.model.from_pretrained and not recipe.tokenizer.from_pretrained:
        _new_config(recipe, {"vocab_size": recipe.tokenizer.vocab_size, **recipe.model.config})


def prepare_tokenizer(recipe: Recipe, examples: list[tuple[Any, ...]], continues: bool) -> PreTrainedTokenizerBase:
    """Train the tokenizer once, on the main process, and keep it with the run. Every process loads it from there.

    Args:
        recipe: Of the run.
        examples: Of the training data.
        continues: Whether what the output directory holds belongs to this run.

    Raises:
        ValueError: If a run is resumed whose tokenizer has changed.
    """
    output_dir = Path(recipe.training.output_dir or "outputs")
    folder = output_dir / TOKENIZER_FOLDER
    state = PartialState()
    with state.main_process_first():
        if state.is_main_process:
            output_dir.mkdir(parents=True, exist_ok=True)
            sweep(output_dir)
            if not continues:
                begin_afresh(output_dir, recipe)
        if not folder.is_dir() or (state.is_main_process and not continues):
            staging = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
            train_tokenizer(recipe, examples).save_pretrained(staging)
            if folder.is_dir():
                shutil.rmtree(folder)  # an earlier run's
            staging.rename(folder)
        if continues:
            refuse_other_tokenizer(output_dir)
    return AutoTokenizer.from_pretrained(folder)
