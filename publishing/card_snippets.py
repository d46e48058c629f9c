"""The three ways to use a published model, as a model card shows them and as verification runs them, word for word."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from ..configuration.heads_urform import HEADS


class Snippet(NamedTuple):
    """A piece of code for a card: its title, whether it needs urform to be installed, the code."""

    title: str
    needs_urform: bool
    code: str


_USE = {
    "AutoModelForSeq2SeqLM": (
        'inputs = tokenizer({text}, return_tensors="pt")\n'
        "outputs = model.generate(**inputs, max_new_tokens=40)\n"
        "print(tokenizer.decode(outputs[0], skip_special_tokens=True))"
    ),
    "AutoModelForMaskedLM": (
        'inputs = tokenizer({text} + " " + tokenizer.mask_token, return_tensors="pt")\n'
        'masked = inputs["input_ids"][0] == tokenizer.mask_token_id\n'
        "print(tokenizer.decode(model(**inputs).logits[0, masked].argmax(-1)))"
    ),
    "AutoModelForSequenceClassification": (
        'inputs = tokenizer({text}, return_tensors="pt")\n'
        "print(model.config.id2label[model(**inputs).logits.argmax().item()])"
    ),
    "AutoModelForTokenClassification": (
        'inputs = tokenizer({text}, return_tensors="pt")\n'
        "labels = model(**inputs).logits[0].argmax(-1).tolist()\n"
        "print([model.config.id2label[label] for label in labels])"
    ),
    "AutoModelForQuestionAnswering": (
        'inputs = tokenizer("Which?", {text}, return_tensors="pt")\n'
        "outputs = model(**inputs)\n"
        "start, end = outputs.start_logits.argmax(), outputs.end_logits.argmax()\n"
        'print(tokenizer.decode(inputs["input_ids"][0, start : end + 1]))'
    ),
    "AutoModelForMultipleChoice": (
        'choices = tokenizer([{text}] * 2, ["this", "that"], padding=True, return_tensors="pt")\n'
        "print(model(**{{name: ids[None] for name, ids in choices.items()}}).logits.argmax().item())"
    ),
}
_PIPELINES = {
    "AutoModelForMaskedLM": ("fill-mask", "{text} + pipe.tokenizer.mask_token"),
    "AutoModelForSequenceClassification": ("text-classification", "{text}"),
    "AutoModelForTokenClassification": ("token-classification", "{text}"),
}


def auto_class(config: dict[str, Any]) -> str:
    """Return the Auto class of the head that a config was saved with."""
    saved = (config.get("architectures") or ["UrformModel"])[0]
    return next((auto for auto, (name, _) in HEADS.items() if name == saved), "AutoModel")


def snippets(config: dict[str, Any], repo_id: str, tokenizer: Any, text: str, code: bool = True) -> list[Snippet]:
    """Return the snippets of a card.

    Args:
        config: the checkpoint's `config.json`.
        repo_id: what the snippets load.
        tokenizer: the checkpoint's tokenizer, None if it has none: then the snippets give token ids.
        text: an example of an input.
        code: whether the repository has the code that `trust_remote_code=True` loads.
    """
    auto, both = auto_class(config), config.get("architecture", "encoder-decoder") == "encoder-decoder"
    quoted = json.dumps(text, ensure_ascii=False)

    def load(auto: str, trust: bool, options: str = "") -> str:
        options += ", trust_remote_code=True" if trust else ""
        names = [auto, *(["AutoTokenizer"] if tokenizer is not None else [])]
        lines = [
            f"from transformers import {', '.join(names)}",
            "",
            f'model = {auto}.from_pretrained("{repo_id}"{options})',
        ]
        if tokenizer is not None:
            lines.append(
                f'tokenizer = AutoTokenizer.from_pretrained("{repo_id}"{", trust_remote_code=True" if trust else ""})'
            )
        return "\n".join(lines) + "\n"

    def use(auto: str) -> str:
        if tokenizer is None:
            ids = "torch.tensor([[[5, 6, 7]]])" if auto == "AutoModelForMultipleChoice" else "torch.tensor([[5, 6, 7]])"
            decoder = ", decoder_input_ids=ids" if both and auto in ("AutoModel", "AutoModelForSeq2SeqLM") else ""
            return f"import torch\n\nids = {ids}\nprint(model(input_ids=ids{decoder})[0].shape)"
        if auto == "AutoModelForCausalLM":
            ends = tokenizer("a")["input_ids"][-1:] == [tokenizer.eos_token_id]
            stop = "tokenizer.add_eos_token = False  # so that generation continues the prompt\n" if ends else ""
            return stop + _USE["AutoModelForSeq2SeqLM"].format(text=quoted)
        if auto in _USE:
            return _USE[auto].format(text=quoted)
        decoder = ', decoder_input_ids=inputs["input_ids"]' if both and auto == "AutoModel" else ""
        return f'inputs = tokenizer({quoted}, return_tensors="pt")\nprint(model(**inputs{decoder})[0].shape)'

    base = "AutoModelForTextEncoding" if both else "AutoModel"
    if tokenizer is not None and auto in _PIPELINES:
        task, argument = _PIPELINES[auto]
        third = (
            "from transformers import pipeline\n\n"
            f'pipe = pipeline("{task}", model="{repo_id}"{", trust_remote_code=True" if code else ""})\n'
            f"print(pipe({argument.format(text=quoted)}))"
        )
        title = "As a pipeline"
    elif auto == base:
        third = load(auto, code, ', dtype="bfloat16"') + use(auto)
        title = "In half precision"
    else:
        third = load(base, code) + use(base)
        title = "Its hidden states alone" + (" (of the encoder)" if both else "")
    with_urform = Snippet("With urform installed", True, "import urform\n" + load(auto, False) + use(auto))
    if not code:
        return [with_urform, Snippet(title, True, "import urform\n" + third)]
    bare = Snippet("With nothing but transformers and torch", False, load(auto, True) + use(auto))
    return [bare, with_urform, Snippet(title, False, third)]
