"""Batches of natural lengths and pairs of equal models, for the scripts that time models. Does nothing by itself."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers.trainer_pt_utils import get_length_grouped_indices

from urform import UrformConfig, UrformForConditionalGeneration, UrformForMaskedLM, UrformModel, UrformTokenizer
from urform.training.data_files import open_lines

PAD, BOS, EOS = 0, 1, 2
Batch = dict[str, Tensor]
Models = dict[tuple[str, str], nn.Module]  # (side, variant) -> model


@dataclass(frozen=True)
class Histogram:
    """Lengths in bins `width` wide, the first of which begins at `first`; inside a bin all are as likely."""

    first: int
    width: int
    counts: tuple[int, ...]

    def draw(self, number: int, generator: torch.Generator) -> Tensor:
        bins = torch.tensor(self.counts, dtype=torch.float64).multinomial(number, True, generator=generator)
        return self.first + self.width * bins + torch.randint(self.width, (number,), generator=generator)


# Multi30k, the 29,000 training pairs, by UrformTokenizer.train(english + german, vocab_size=10000, model="bpe"), with
# <s> and </s>: lengths of the English side, and by how much the German side is longer. Drawn independently they give
# batches of 128 with 2.12 (shuffled) and 1.31 (grouped) places per real token; the corpus itself has 2.15 and 1.29.
ENGLISH = Histogram(6, 1, (
    5, 24, 146, 591, 1309, 1869, 2477, 2976, 2925, 2750, 2617, 2246, 1815, 1540, 1271, 1013, 809, 624, 451, 397, 274,
    208, 167, 124, 89, 73, 58, 25, 32, 14, 18, 10, 12, 9, 7, 5, 8, 4, 3, 2, 0, 2, 0, 0, 1,
))  # fmt: skip
GERMAN_MORE = Histogram(-14, 1, (
    1, 2, 2, 6, 7, 13, 38, 67, 156, 347, 755, 1587, 3108, 4973, 5371, 4270, 3095, 2053, 1303, 759, 425, 294, 148, 83,
    64, 31, 17, 7, 7, 8, 2, 0, 1,
))  # fmt: skip
# English Wikipedia, 54,370 lines (paragraphs) of at least 16 tokens in 6,219 articles (shorter lines are headings), by
# UrformTokenizer.train(lines, vocab_size=30522, model="bpe"); what is longer than 512 is cut.
WIKIPEDIA = Histogram(16, 16, (
    7988, 7791, 7045, 6190, 5183, 4277, 3479, 2701, 2081, 1732, 1364, 987, 844, 573, 445, 371, 278, 232, 157, 151, 87,
    86, 47, 42, 44, 28, 24, 23, 19, 13, 15, 73,
))  # fmt: skip
# arXiv computer science, 40,000 abstracts and their titles, by UrformTokenizer.train(both, vocab_size=32000,
# model="bpe"); the correlation of the two lengths is 0.10.
ABSTRACTS = Histogram(32, 16, (
    24, 498, 988, 1471, 1963, 2580, 2847, 3133, 3544, 3450, 3178, 2917, 2745, 2259, 1853, 1524, 1250, 1024, 865, 644,
    432, 258, 173, 107, 72, 69, 43, 23, 18, 13, 12, 8, 9, 3,
))  # fmt: skip
TITLES = Histogram(4, 2, (264, 1815, 4814, 6780, 7222, 6615, 4823, 3178, 1911, 1076, 651, 346, 205, 110, 73, 36, 24))


@dataclass(frozen=True)
class Size:
    """The dimensions that both sides share; `layers` is of each stack."""

    hidden: int
    layers: int
    heads: int
    vocabulary: int
    batch: int
    examples: int = 29_000

    def quick(self) -> "Size":
        """Give a size for tests."""
        return replace(self, hidden=32, layers=1, heads=2, vocabulary=200, batch=4, examples=64)


SMALL = Size(128, 4, 4, 10_000, 128)
BASE = Size(512, 6, 8, 10_000, 128)
BERT_SMALL = Size(512, 4, 8, 30_522, 32)
T5_BASE = Size(768, 12, 12, 32_128, 64)
BART_BASE = Size(768, 6, 12, 50_265, 64)


# --------------------------------------------------------------------------------------------------------- batches


def random_ids(lengths: Tensor, vocabulary: int, generator: torch.Generator) -> list[Tensor]:
    """Make sequences of ids (no pad) that end in </s>."""
    ids = torch.randint(4, vocabulary, (int(lengths.sum()),), generator=generator)
    ids[lengths.cumsum(0) - 1] = EOS
    return list(ids.split(lengths.tolist()))


def multi30k(folder: Path, vocabulary: int) -> tuple[list[Tensor], list[Tensor]]:
    """Tokenize train.en.gz and train.de.gz of the folder by a joint BPE that is trained on them."""
    texts = [list(open_lines(folder / f"train.{language}.gz")) for language in ("en", "de")]
    tokenizer = UrformTokenizer.train([*texts[0], *texts[1]], vocab_size=vocabulary, model="bpe")
    source, target = ([torch.tensor(ids) for ids in tokenizer(side)["input_ids"]] for side in texts)
    return source, target


def pad(sequences: Sequence[Tensor], value: int) -> Tensor:
    return pad_sequence(list(sequences), batch_first=True, padding_value=value)


def seq2seq_batch(source: Sequence[Tensor], target: Sequence[Tensor]) -> Batch:
    """Make what DataCollatorForSeq2Seq makes when it knows the model."""
    input_ids, labels = pad(source, PAD), pad(target, -100)
    shifted = labels.roll(1, -1).masked_fill(labels.roll(1, -1) == -100, PAD)
    shifted[:, 0] = BOS
    mask = pad([torch.ones_like(ids) for ids in source], 0)
    return {"input_ids": input_ids, "attention_mask": mask, "decoder_input_ids": shifted, "labels": labels}


def epoch(lengths: Sequence[int], batch: int, grouped: bool, seed: int = 1) -> list[list[int]]:
    """Give the examples of each full batch of an epoch: shuffled, or grouped and then sorted by length."""
    generator = torch.Generator().manual_seed(seed)
    if not grouped:
        return (
            torch.randperm(len(lengths), generator=generator)[: len(lengths) // batch * batch].view(-1, batch).tolist()
        )
    indices = get_length_grouped_indices(lengths, batch, generator=generator)
    batches = [indices[i : i + batch] for i in range(0, len(indices) - batch + 1, batch)]
    return sorted(batches, key=lambda members: max(lengths[i] for i in members))


def choose(lengths: Sequence[int], batch: int, grouped: bool, number: int) -> list[list[int]]:
    """Give the examples of `number` batches; the first few stand for the epoch as well as all (the golden ratio)."""
    batches = epoch(lengths, batch, grouped)
    return [batches[int((0.5 + i * 0.6180339887) % 1 * len(batches))] for i in range(number)]


def real_tokens(batch: Batch) -> int:
    """Count the tokens that are not padding, source and target."""
    target = int((batch["labels"] != -100).sum()) if "decoder_input_ids" in batch else 0
    return int(batch["attention_mask"].sum()) + target


def places(batch: Batch) -> int:
    """Count the tokens with padding."""
    return sum(batch[name].numel() for name in ("input_ids", "decoder_input_ids") if name in batch)


# ---------------------------------------------------------------------------------------------------------- models

# A model writes its attention into the config that it is given, hence the copies.


def translators(size: Size, attentions: Sequence[str]) -> Models:
    """Make ours and Marian, the latter with each attention."""
    ours = UrformConfig.from_preset(
        "vaswani-base",
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        intermediate_size=4 * size.hidden,
        hidden_dropout_prob=0.1,
        attention_dropout=0.1,
        activation_dropout=0.1,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        decoder_start_token_id=BOS,
    )
    theirs = transformers.MarianConfig(
        vocab_size=size.vocabulary,
        d_model=size.hidden,
        encoder_layers=size.layers,
        decoder_layers=size.layers,
        encoder_attention_heads=size.heads,
        decoder_attention_heads=size.heads,
        encoder_ffn_dim=4 * size.hidden,
        decoder_ffn_dim=4 * size.hidden,
        activation_function="relu",
        scale_embedding=True,
        dropout=0.1,
        attention_dropout=0.1,
        activation_dropout=0.1,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        forced_eos_token_id=None,
        decoder_start_token_id=BOS,
    )
    models = {("urform", ""): UrformForConditionalGeneration._from_config(ours, attn_implementation="urform")}
    for attention in attentions:
        model = transformers.MarianMTModel._from_config(copy.deepcopy(theirs), attn_implementation=attention)
        models["marian", attention] = model
    return models


def encoders(size: Size, masked_lm: bool) -> Models:
    """Make ours and BERT: with the masked-LM head, or bare."""
    ours = UrformConfig.from_preset(
        "bert-base",
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        intermediate_size=4 * size.hidden,
    )
    theirs = transformers.BertConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        intermediate_size=4 * size.hidden,
    )
    our_class = UrformForMaskedLM if masked_lm else UrformModel
    models = {("urform", ""): our_class._from_config(ours, attn_implementation="urform")}
    for attention in ("sdpa", "eager"):
        if masked_lm:
            model = transformers.BertForMaskedLM._from_config(copy.deepcopy(theirs), attn_implementation=attention)
        else:
            config = copy.deepcopy(theirs)
            config._attn_implementation = attention
            model = transformers.BertModel(config, add_pooling_layer=False)
        models["bert", attention] = model
    return models


def t5(size: Size) -> Models:
    ours = UrformConfig.from_preset(
        "t5-small",
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        head_dim=size.hidden // size.heads,
        intermediate_size=4 * size.hidden,
        logit_scale=size.hidden**-0.5,
        decoder_start_token_id=BOS,
    )
    theirs = transformers.T5Config(
        vocab_size=size.vocabulary,
        d_model=size.hidden,
        d_kv=size.hidden // size.heads,
        d_ff=4 * size.hidden,
        num_layers=size.layers,
        num_heads=size.heads,
        decoder_start_token_id=BOS,
    )
    models = {("urform", ""): UrformForConditionalGeneration._from_config(ours, attn_implementation="urform")}
    for attention in ("sdpa", "eager"):
        model = transformers.T5ForConditionalGeneration._from_config(
            copy.deepcopy(theirs), attn_implementation=attention
        )
        models["t5", attention] = model
    return models


def bart(size: Size) -> Models:
    ours = UrformConfig(
        architecture="encoder-decoder",
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        intermediate_size=4 * size.hidden,
        norm_position="post",
        embedding_norm=True,
        position_encoding="learned",
        position_offset=2,
        hidden_dropout_prob=0.1,
        attention_dropout=0.1,
        activation_dropout=0.1,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        decoder_start_token_id=BOS,
    )
    theirs = transformers.BartConfig(
        vocab_size=size.vocabulary,
        d_model=size.hidden,
        encoder_layers=size.layers,
        decoder_layers=size.layers,
        encoder_attention_heads=size.heads,
        decoder_attention_heads=size.heads,
        encoder_ffn_dim=4 * size.hidden,
        decoder_ffn_dim=4 * size.hidden,
        dropout=0.1,
        attention_dropout=0.1,
        activation_dropout=0.1,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        forced_eos_token_id=None,
        decoder_start_token_id=BOS,
    )
    models = {("urform", ""): UrformForConditionalGeneration._from_config(ours, attn_implementation="urform")}
    for attention in ("sdpa", "eager"):
        model = transformers.BartForConditionalGeneration._from_config(
            copy.deepcopy(theirs), attn_implementation=attention
        )
        models["bart", attention] = model
    return models
