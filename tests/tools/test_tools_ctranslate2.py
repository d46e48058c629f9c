"""CTranslate2 on what `urform convert` writes: the same greedy tokens as our own `generate`.

CTranslate2 4.8 cannot read BART and BERT of transformers 5, stock ones included: their configs have lost fields that it
needs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tool_models import need, stock_model, tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

import urform
from urform.conversion.checkpoints import convert_checkpoint

PROMPTS = [[5, 6, 7, 8, 9], [20, 21, 22], [40, 33, 12, 11]]


def _marian_tokenizer() -> PreTrainedTokenizerBase:
    """Words with the padding token last, as Marian's vocabularies have it and CTranslate2 expects."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["</s>", "<unk>", *(f"w{i}" for i in range(2, 79)), "<pad>"]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, **names)


@pytest.mark.parametrize("family", ["GPT2", "Llama", "T5", "Marian"])
def test_greedy_tokens_are_generate_s(family: str, tmp_path: Path):
    need("ctranslate2")
    import ctranslate2
    from ctranslate2.converters import TransformersConverter

    tokens: PreTrainedTokenizerBase = tokenizer()
    changes: dict[str, Any] = {}
    if family == "Marian":
        tokens = _marian_tokenizer()
        pad = tokens.pad_token_id
        changes = {"vocab_size": len(tokens), "pad_token_id": pad, "decoder_start_token_id": pad, "eos_token_id": 0}
    ours = urform.from_transformers(stock_model(family, **changes)).eval()
    for folder in ("ours", "stock"):
        if folder == "ours":
            ours.save_pretrained(tmp_path / folder)
        else:
            convert_checkpoint(str(tmp_path / "ours"), tmp_path / folder, None)
        tokens.save_pretrained(tmp_path / folder)
    TransformersConverter(str(tmp_path / "stock")).convert(str(tmp_path / "made"))
    if ours.config.is_encoder_decoder:
        end = tokens.eos_token_id
        expected = [
            ours.generate(torch.tensor([[*ids, end]]), max_new_tokens=8, do_sample=False)[0, 1:] for ids in PROMPTS
        ]
        translator = ctranslate2.Translator(str(tmp_path / "made"), device="cpu")
        texts = [tokens.convert_ids_to_tokens([*ids, end]) for ids in PROMPTS]
        answers = translator.translate_batch(texts, beam_size=1, max_decoding_length=8)
        found = [tokens.convert_tokens_to_ids(answer.hypotheses[0]) for answer in answers]
    else:
        expected = [
            ours.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)[0, len(ids) :] for ids in PROMPTS
        ]
        generator = ctranslate2.Generator(str(tmp_path / "made"), device="cpu")
        texts = [tokens.convert_ids_to_tokens(ids) for ids in PROMPTS]
        answers = generator.generate_batch(texts, sampling_topk=1, max_length=8, include_prompt_in_result=False)
        found = [answer.sequences_ids[0] for answer in answers]
    stop = ours.generation_config.eos_token_id
    cut = [ids[: ids.index(stop)] if stop in ids else ids for ids in (row.tolist() for row in expected)]
    assert found == cut
    assert len({tuple(ids) for ids in found}) > 1
