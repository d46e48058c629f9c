"""The pictures of a model card: learning curve and attention alignment. They need matplotlib (`urform[hub]`)."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

CURVE_NAME, ALIGNMENT_NAME = "learning_curve.png", "attention_alignment.png"


def can_draw() -> bool:
    """Return whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def draw_curve(curve: dict[str, list[tuple[int, float]]], path: Path) -> bool:
    """Draw losses over steps; False, and no file, where fewer than two points are known."""
    curve = {name: points for name, points in curve.items() if len(points) > 1}
    if not curve or not can_draw():
        return False
    figure = _figure(6, 3.5)
    axes = figure.add_subplot()
    for name, points in curve.items():
        axes.plot(*zip(*points, strict=True), label=name, marker="." if len(points) < 40 else None)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path)
    return True


def draw_alignment(checkpoint: Path, text: str, path: Path) -> bool:
    """Draw what the last decoder layer attends to for each token that it writes (mean over heads).

    As in Bahdanau et al. 2015 (arXiv:1409.0473), figure 3. False, and no file, where nothing is written.
    """
    if not can_draw():
        return False
    weights_TS, written, source = alignment(checkpoint, text)
    if not written:
        return False
    figure = _figure(1.5 + 0.3 * len(source), 1.5 + 0.3 * len(written))
    axes = figure.add_subplot()
    axes.imshow(weights_TS.numpy(), cmap="gray_r", vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(len(source)), [_visible(token) for token in source], rotation=90)
    axes.set_yticks(range(len(written)), [_visible(token) for token in written])
    figure.savefig(path)
    return True


def _visible(token: str) -> str:
    """Return a token with its spaces as open boxes, which can be seen."""
    return token.replace("▁", "␣").replace(" ", "␣")


def alignment(checkpoint: Path, text: str) -> tuple[Any, list[str], list[str]]:
    """Return the cross-attention [T, S] of the last layer, its T written tokens and its S source tokens.

    Row t is the attention of the position that predicts written token t; rows sum to 1.
    """
    import torch
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForSeq2SeqLM.from_pretrained(checkpoint, attn_implementation="eager", dtype=torch.float32).eval()
    inputs = tokenizer(text, return_tensors="pt", truncation=True, max_length=40)
    with torch.inference_mode():
        written = model.generate(**inputs, max_new_tokens=40, do_sample=False, num_beams=1)
        outputs = model(**inputs, decoder_input_ids=written[:, :-1], output_attentions=True)
    weights_TS = outputs.cross_attentions[-1][0].mean(0)
    names: Any = tokenizer.convert_ids_to_tokens  # annotated for a single id too
    return weights_TS, names(written[0, 1:].tolist()), names(inputs["input_ids"][0].tolist())
