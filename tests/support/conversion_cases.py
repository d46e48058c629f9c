"""What every family is held to, in both directions: `check_parity(stock)`; used by tests/conversion.

The stock model is the reference, and the truth in float64 (numerics.py). Weights, biases and norms are random and
non-zero; the logits are of order one.
"""

import math
import warnings
from typing import Any

import torch
import transformers as hf
from numerics import assert_within, double, exact, finite_masks
from torch import Tensor

import urform

SHIFTS_SOURCE = ("UrformForSequenceClassification", "UrformForQuestionAnswering")
BOOKKEEPING = {"urform", "transformers_version", "architectures", "dtype", "_name_or_path"}


def random_stock(name: str, seed: int = 0, **fields: Any) -> Any:
    """A stock model of class `name` with random weights, in eval mode; `fields` are its config's."""
    torch.manual_seed(seed)
    model_class = getattr(hf, name)
    config = model_class.config_class(**fields)
    config._attn_implementation = "eager"  # the definition; sdpa knows no softcap
    model = model_class(config).eval()
    shake(model)
    unused = getattr(model.base_model, "shared", None)  # BART's, where nothing is tied
    if unused is not None and unused.weight is not model.get_encoder().embed_tokens.weight:
        unused.weight.data.copy_(model.get_encoder().embed_tokens.weight)
    return model


def shake(model: Any) -> None:
    """Random weights, biases and norms, none of them zero; persistent buffers of floats too."""
    with torch.no_grad():
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]  # not Marian's sinusoids
        for tensor in [*trained, *(b for n, b in model.named_buffers() if n in model.state_dict())]:
            if not tensor.is_floating_point():
                continue
            if tensor.ndim == 1:
                tensor.add_(torch.randn_like(tensor) * 0.3)
            else:
                tensor.normal_(0.0, 1 / math.sqrt(tensor.shape[1]))


def padded(side: str, vocab: int, pad: int, length: int = 9, rows: int = 3) -> tuple[Tensor, Tensor]:
    """Ids and mask `[rows, length]`: more and more padding from the second row on, on one side or none."""
    ids = torch.randint(5, vocab, (rows, length))
    ids = ids.where(ids != pad, 4)
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        cut = {"left": slice(None, row * 2), "right": slice(length - row * 2, None), "none": slice(0)}[side]
        mask[row, cut] = 0
    return ids.masked_fill(mask == 0, pad), mask


def largest(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item() if a.numel() else 0.0


def close(have: Tensor, want: Tensor, truth: Tensor, what: str, where: Tensor | None = None) -> float:
    """Assert that they are equal but for the stock model's own rounding; return the difference."""
    assert have.shape == want.shape == truth.shape, f"{what}: {tuple(have.shape)} instead of {tuple(want.shape)}"
    if where is not None:
        have, want, truth = have[where], want[where], truth[where]
    assert_within(have, want, truth, what)
    return largest(have, want)


def inputs_of(model: Any, kind: str, side: str) -> dict[str, Tensor]:
    """Inputs with labels for a model whose class of ours is `kind`."""
    config = model.config
    vocab, pad = config.vocab_size, 0 if config.pad_token_id is None else config.pad_token_id
    ids, mask = padded(side, vocab, pad)
    inputs = {"input_ids": ids, "attention_mask": mask}
    if config.is_encoder_decoder and kind in SHIFTS_SOURCE:
        end = mask.shape[1] - 1 - mask.flip(1).argmax(1)  # stock classifiers read what stands where the source has eos
        inputs["input_ids"] = ids.where(ids != config.eos_token_id, 4).scatter(1, end[:, None], config.eos_token_id)
        if side == "left":  # stock models shift padding too, and do not mask it
            inputs["decoder_input_ids"] = padded("none", vocab, pad)[0]
    if kind == "UrformForMultipleChoice":
        more, more_mask = padded(side, vocab, pad)
        inputs = {"input_ids": torch.stack((ids, more), 1), "attention_mask": torch.stack((mask, more_mask), 1)}
        return {**inputs, "labels": torch.tensor([0, 1, 1])}
    if kind == "UrformForCausalLM":
        labels = ids.masked_fill(mask == 0, -100)
        if side == "left":  # the stock model lets the last place of padding predict the first token
            labels[torch.arange(3), mask.argmax(1)] = -100
        return {**inputs, "labels": labels}
    if kind == "UrformForMaskedLM":
        return {**inputs, "labels": torch.randint(3, vocab, ids.shape).masked_fill(mask == 0, -100)}
    if kind == "UrformForConditionalGeneration":
        labels = padded("none", vocab, pad, 7)[0]
        labels[1, 5:] = -100
        return {**inputs, "labels": labels}
    if kind == "UrformForSequenceClassification":
        if config.problem_type == "multi_label_classification":
            return {**inputs, "labels": torch.randint(0, 2, (3, config.num_labels)).float()}
        if config.num_labels == 1 or config.problem_type == "regression":
            return {**inputs, "labels": torch.randn(3, config.num_labels).squeeze(-1)}
        return {**inputs, "labels": torch.randint(0, config.num_labels, (3,))}
    if kind == "UrformForTokenClassification":
        return {**inputs, "labels": torch.randint(0, config.num_labels, ids.shape).masked_fill(mask == 0, -100)}
    if kind == "UrformForQuestionAnswering":
        first = mask.argmax(1)
        return {**inputs, "start_positions": first, "end_positions": first + 1}
    if config.is_encoder_decoder and kind == "UrformModel":
        return {**inputs, "decoder_input_ids": torch.randint(3, vocab, (3, 7))}
    return inputs


def compare(stock: Any, ours: Any, side: str, **more: Any) -> float:
    """Outputs, loss, hidden states of every layer and gradients of the embeddings; returns the largest difference.

    Padding is compared nowhere, so a loss over all places (of an answer's start and end) only where there is none.
    """
    kind = type(ours).__name__
    inputs = {**inputs_of(stock, kind, side), **more}
    pairs = ours.config.is_encoder_decoder
    real = inputs["attention_mask"].bool()
    target = inputs["labels"] != -100 if pairs and kind == "UrformForConditionalGeneration" else None
    if pairs and kind in SHIFTS_SOURCE and "decoder_input_ids" not in inputs:
        target = real
    precise = exact(stock)
    with warnings.catch_warnings(), finite_masks():
        warnings.simplefilter("ignore")
        want = stock(**inputs, output_hidden_states=True)
        truth = precise(**double(inputs), output_hidden_states=True)
        have, deep = ours(**inputs), ours(**inputs, output_hidden_states=True)  # without padding, and with it
    worst = 0.0
    for name in ("logits", "start_logits", "end_logits", "last_hidden_state"):
        if want.get(name) is None:
            continue
        where = None
        if name == "logits" and kind in ("UrformForCausalLM", "UrformForMaskedLM", "UrformForTokenClassification"):
            where = real
        elif (pairs and name != "logits") or kind == "UrformForConditionalGeneration":
            where = target
        elif not pairs and name in ("last_hidden_state", "start_logits", "end_logits"):
            where = real
        for output in (have, deep):
            worst = max(worst, close(output[name], want[name], truth[name], f"{name} ({side})", where))
    for name in ("hidden_states", "encoder_hidden_states", "decoder_hidden_states"):
        if want.get(name) is None:
            continue
        assert len(deep[name]) == len(want[name]), name
        where = target if name == "decoder_hidden_states" else real.flatten(0, -2)
        for i, states in enumerate(zip(deep[name], want[name], truth[name], strict=True)):
            close(*states, f"{name}[{i}] ({side})", where)
    if want.get("loss") is not None and (kind != "UrformForQuestionAnswering" or side == "none"):
        close(have.loss, want.loss, truth.loss, f"loss ({side})")
        for model, output in ((stock, want), (ours, have), (precise, truth)):
            model.zero_grad()
            output.loss.backward()
        for grads in zip(*(gradients(model) for model in (ours, stock, precise)), strict=True):
            close(*grads, f"gradient of the embeddings ({side})")
    return worst


def gradients(model: Any) -> list[Tensor]:
    """The gradients of its tables of tokens, which both sides of an encoder-decoder have."""
    if not model.config.is_encoder_decoder:
        return [model.get_input_embeddings().weight.grad]
    return [stack.embed_tokens.weight.grad for stack in (model.get_encoder(), model.get_decoder())]


def compare_pad_row(stock: Any, ours: Any) -> None:
    """The pad token in the middle of a text: whether its row trains."""
    if stock.config.pad_token_id is None:
        return
    inputs = inputs_of(stock, type(ours).__name__, "right")
    inputs["input_ids"][0, 3] = stock.config.pad_token_id
    models = (ours, stock, exact(stock))
    with finite_masks():
        for model in models:
            model.zero_grad()
            model(**inputs).loss.backward()
    for grads in zip(*map(gradients, models), strict=True):
        close(*grads, "gradient of the embeddings with a pad token inside a text")


def forget_lengths(stock: Any) -> None:
    """Set rotary frequencies back: stock classes remember the longest input of dynamic scaling, ours do not."""
    for module in stock.modules():
        for name, value in list(module.named_buffers(recurse=False)):
            if name.endswith("original_inv_freq"):
                kind = name.removesuffix("original_inv_freq")
                module.register_buffer(f"{kind}inv_freq", value.clone(), persistent=False)
                setattr(module, f"{kind}max_seq_len_cached", module.original_max_seq_len)


def compare_generation(stock: Any, ours: Any, new_tokens: int = 6) -> None:
    """Greedy with and without cache, and beams: token for token, in a left-padded batch."""
    pad = 0 if stock.config.pad_token_id is None else stock.config.pad_token_id
    ids, mask = padded("right" if stock.config.is_encoder_decoder else "left", stock.config.vocab_size, pad)
    for settings in ({}, {"use_cache": False}, {"num_beams": 3}):
        settings = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False, **settings}
        have = ours.generate(input_ids=ids, attention_mask=mask, pad_token_id=pad, **settings)
        if getattr(stock.config, "num_decoder_layers", 0) > stock.config.num_hidden_layers:
            settings = {**settings, "use_cache": False}  # stock T5's cache has as many layers as its encoder
        forget_lengths(stock)
        want = stock.generate(input_ids=ids, attention_mask=mask, pad_token_id=pad, **settings)
        assert have.tolist() == want.tolist(), f"generation with {settings}"


def compare_cached(stock: Any, ours: Any) -> None:
    """A decoder's logits piece by piece through a cache, against the stock model's."""
    ids, _ = padded("none", stock.config.vocab_size, 0, rows=2)
    caches: dict[Any, Any] = {}
    models = (ours, stock, exact(stock))
    with torch.no_grad():
        for piece in ids.split([4, 1, 4], dim=1):
            logits = []
            for model in models:
                output = model(input_ids=piece, past_key_values=caches.get(model), use_cache=True)
                caches[model] = output.past_key_values
                logits.append(output.logits)
            close(*logits, "logits through the cache")


def same_state(have: Any, want: Any) -> None:
    """Bit-equal tensors under the same names."""
    a, b = have.state_dict(), want.state_dict()
    assert a.keys() == b.keys(), sorted(a.keys() ^ b.keys())
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


def config_of(model: Any) -> dict[str, Any]:
    return {k: v for k, v in model.config.to_dict().items() if k not in BOOKKEEPING}


def check_round_trip(ours: Any, family: str | None = None) -> Any:
    """Urform -> stock -> Urform: weights bit-equal, config equal; returns the stock model."""
    stock = urform.to_transformers(ours, family)
    again = urform.from_transformers(stock)
    same_state(again, ours)
    assert type(again) is type(ours) and config_of(again) == config_of(ours)
    return stock


def check_parity(
    stock: Any, *, generate: bool | None = None, sides: tuple[str, ...] = ("none", "right", "left")
) -> float:
    """Everything: forward with padding, gradients, generation, the way back; returns the difference of logits.

    Args:
        stock: A stock model in eval mode (`random_stock`).
        generate: Whether to generate; None: where the class can.
        sides: Where the padding is.
    """
    ours = urform.from_transformers(stock)
    assert not ours.training and ours.dtype == stock.dtype
    worst = max(compare(stock, ours, side) for side in sides)
    kind = type(ours).__name__
    if kind in ("UrformForCausalLM", "UrformForMaskedLM", "UrformForConditionalGeneration"):
        compare_pad_row(stock, ours)
    if ours.can_generate() if generate is None else generate:
        compare_generation(stock, ours)
    if kind == "UrformForCausalLM":
        compare_cached(stock, ours)
    back = check_round_trip(ours)
    assert type(back) is type(stock)
    same_state(back, stock)
    assert config_of(back) == config_of(stock)
    return worst
