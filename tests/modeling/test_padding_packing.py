"""Right under padding and packing: all architectures, all attention implementations, all position encodings.

The truth is always the document alone, without padding and without neighbours.
"""

from typing import Any

import pytest
import torch
from numerics import assert_within, exact
from support import HEADS, POSITIONS, WINDOW, documents, make, pack, pad
from torch import Tensor

IMPLEMENTATIONS = ("eager", "sdpa", "flex_attention", "urform")
LENGTHS = (5, 1, 9, 3)
TARGET_LENGTHS = (2, 7, 4, 1)


def build(architecture: str, implementation: str = "sdpa", **fields: Any) -> Any:
    """A model with grouped queries and every parameter non-zero."""
    sizes = {"hidden_size": 24, "num_key_value_heads": 2, "attention_dropout": 0.0}
    return make(architecture, implementation=implementation, spread=0.3, **sizes, **fields)


def alone(model: Any, sources: list[Tensor], targets: list[Tensor]) -> list[Tensor]:
    """The logits of each document by itself."""
    out = []
    for source, target in zip(sources, targets, strict=True):
        extra = {"decoder_input_ids": target[None]} if model.config.is_encoder_decoder else {}
        out.append(model(input_ids=source[None], **extra).logits[0])
    return out


def alone_in_both(model: Any, sources: list[Tensor], targets: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """The logits of each document by itself, in float32 and, by eager attention, in float64."""
    eager = exact(model)
    eager.set_attn_implementation("eager")
    return list(zip(alone(model, sources, targets), alone(eager, sources, targets), strict=True))


CASES = [("rope", i, {}) for i in IMPLEMENTATIONS]
CASES += [(p, i, {}) for p in POSITIONS[1:] for i in ("eager", "sdpa")]
CASES += [("t5", "flex_attention", {}), ("alibi", "urform", {}), ("t5", "urform", {})]
CASES += [("rope", i, WINDOW) for i in IMPLEMENTATIONS]
CASES += [("alibi", "sdpa", WINDOW), ("rope", "eager", {"attn_logit_softcapping": 3.0})]


def name(case: tuple[str, str, dict[str, Any]]) -> str:
    return "-".join([case[0], case[1], *case[2]])


def fields_of(case: tuple[str, str, dict[str, Any]], architecture: str) -> dict[str, Any]:
    return {"position_encoding": case[0], **case[2]}


@pytest.mark.parametrize("architecture", HEADS)
@pytest.mark.parametrize("case", CASES, ids=name)
def test_padded_row_is_the_row_alone(architecture: str, case: tuple[str, str, dict[str, Any]]) -> None:
    """Padding on either side of source and target, differently on the two, and beyond the longest row."""
    model = build(architecture, case[1], **fields_of(case, architecture))
    sources, targets = documents(LENGTHS, 1), documents(TARGET_LENGTHS, 2)
    with torch.no_grad():
        want = alone_in_both(model, sources, targets)
        for source_side, target_side in (("right", "left"), ("left", "right"), ("left", "left")):
            ids, mask = pad(sources, source_side, longest=11)
            inputs = {"input_ids": ids, "attention_mask": mask}
            side, longest = source_side, 11
            if model.config.is_encoder_decoder:
                side, longest = target_side, 8
                target_ids, target_mask = pad(targets, target_side, longest=8)
                inputs.update(decoder_input_ids=target_ids, decoder_attention_mask=target_mask)
            logits = model(**inputs).logits
            assert logits.isfinite().all()
            for row, (reference, truth) in zip(logits, want, strict=True):
                part = row[: len(truth)] if side == "right" else row[longest - len(truth) :]
                assert_within(part, reference, truth)


def packed_inputs(model: Any, sources: list[Tensor], targets: list[Tensor], how: str) -> dict[str, Any]:
    ids, positions, ends = pack(sources)
    inputs: dict[str, Any] = {"input_ids": ids}
    if how in ("position_ids", "position_ids and a mask of ones"):
        inputs["position_ids"] = positions
        if "ones" in how:
            inputs["attention_mask"] = torch.ones_like(ids)
    else:
        longest = max(map(len, sources))
        inputs.update(cu_seq_lens_q=ends, cu_seq_lens_k=ends, max_length_q=longest, max_length_k=longest)
    if model.config.is_encoder_decoder:
        ids, positions, target_ends = pack(targets)
        inputs["decoder_input_ids"] = ids
        if "cu_seq_lens_q" in inputs:
            inputs.update(cu_seq_lens_q=target_ends, max_length_q=max(map(len, targets)))
        else:
            inputs["decoder_position_ids"] = positions
    return inputs


@pytest.mark.parametrize("architecture", HEADS)
@pytest.mark.parametrize("case", CASES, ids=name)
def test_packed_documents_are_the_documents_alone(architecture: str, case: tuple[str, str, dict[str, Any]]) -> None:
    """By `position_ids`, also beside a mask of ones and with a cache, and by `cu_seq_lens_*`."""
    model = build(architecture, case[1], **fields_of(case, architecture))
    sources, targets = documents(LENGTHS, 3), documents(TARGET_LENGTHS, 4)
    with torch.no_grad():
        want = [torch.cat(logits) for logits in zip(*alone_in_both(model, sources, targets), strict=True)]
        for how in ("position_ids", "position_ids and a mask of ones", "cu_seq_lens"):
            for use_cache in (False, True) if architecture != "encoder" else (None,):
                inputs = packed_inputs(model, sources, targets, how)
                if use_cache is not None:
                    inputs["use_cache"] = use_cache
                assert_within(model(**inputs).logits[0], *want)


@pytest.mark.parametrize("architecture", HEADS)
def test_several_packed_rows_with_padding(architecture: str) -> None:
    """Two packed rows of different length in one batch: `position_ids` and a padding mask together."""
    model = build(architecture)
    rows = [(documents((4, 2, 5), 5), documents((3, 1, 2), 6)), (documents((3, 2, 1), 7), documents((2, 2, 4), 8))]
    packed = [packed_inputs(model, sources, targets, "position_ids") for sources, targets in rows]
    inputs = {}
    for key in packed[0]:
        inputs[key], mask = pad([p[key][0] for p in packed], "right")
        if key in ("input_ids", "decoder_input_ids"):
            inputs[key.replace("input_ids", "attention_mask")] = mask
    with torch.no_grad():
        logits = model(**inputs).logits
        for row, (sources, targets) in zip(logits, rows, strict=True):
            want = [torch.cat(logits) for logits in zip(*alone_in_both(model, sources, targets), strict=True)]
            assert_within(row[: len(want[0])], *want)


@pytest.mark.parametrize("architecture", HEADS)
@pytest.mark.parametrize("implementation", [i for i in IMPLEMENTATIONS if i != "flex_attention"])
def test_fully_padded_row_leaves_finite_numbers(architecture: str, implementation: str) -> None:
    """Values and gradients stay finite, and the other rows do not notice."""
    model = build(architecture, implementation)
    sources, targets = documents((4, 6), 9), documents((3, 5), 10)
    ids, mask = pad([*sources, torch.tensor([], dtype=torch.long)], "right")
    inputs = {"input_ids": ids, "attention_mask": mask}
    if model.config.is_encoder_decoder:
        target_ids, target_mask = pad([*targets, torch.tensor([], dtype=torch.long)], "left")
        inputs.update(decoder_input_ids=target_ids, decoder_attention_mask=target_mask)
    logits = model(**inputs).logits
    assert logits.isfinite().all()
    logits.square().mean().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    want = alone_in_both(model, sources, targets)
    for row, (reference, truth) in zip(logits, want, strict=False):
        part = row[-len(truth) :] if model.config.is_encoder_decoder else row[: len(truth)]
        assert_within(part, reference, truth)


@pytest.mark.parametrize("architecture", HEADS)
def test_gradients_do_not_cross_documents_or_padding(architecture: str) -> None:
    """The loss of one document moves no embedding of another, and no embedding of padding."""
    model = build(architecture)
    sources, targets = documents(LENGTHS, 11), documents(TARGET_LENGTHS, 12)
    inputs = packed_inputs(model, sources, targets, "position_ids")
    embeds = model.get_input_embeddings()(inputs.pop("input_ids")).detach().requires_grad_()
    logits = model(inputs_embeds=embeds, **inputs).logits[0]
    lengths = TARGET_LENGTHS if model.config.is_encoder_decoder else LENGTHS
    start = sum(lengths[:2])
    logits[start : start + lengths[2]].square().sum().backward()
    own = slice(sum(LENGTHS[:2]), sum(LENGTHS[:3]))
    touched = embeds.grad[0].abs().amax(-1) > 0
    assert touched[own].all()
    touched[own] = False
    assert not touched.any()


def test_packed_sides_that_disagree_are_refused() -> None:
    """Three targets for four sources would silently pair the wrong ones."""
    model = build("encoder-decoder")
    inputs = packed_inputs(model, documents(LENGTHS, 13), documents(LENGTHS[:3], 14), "position_ids")
    with pytest.raises(ValueError, match=r"3.* targets but .*4.* sources"):
        model(**inputs)
    inputs = packed_inputs(model, documents(LENGTHS, 13), documents(LENGTHS, 14), "cu_seq_lens")
    inputs = {
        key: value.expand(2, -1) if value.ndim == 2 else value
        for key, value in inputs.items()
        if hasattr(value, "ndim")
    }
    with pytest.raises(ValueError, match="batch is 2"):
        model(**inputs)


@pytest.mark.parametrize("architecture", HEADS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_close(architecture: str, dtype: torch.dtype) -> None:
    """Error against float64 at most twice that of eager attention in the same precision (plus rounding)."""
    sources, targets = documents(LENGTHS, 15), documents(TARGET_LENGTHS, 16)
    with torch.no_grad():
        truth = torch.cat(alone(build(architecture, "eager").double(), sources, targets))
        errors = {}
        for implementation in ("eager", "sdpa", "urform"):
            out = torch.cat(alone(build(architecture, implementation).to(dtype), sources, targets))
            errors[implementation] = (out.double() - truth).abs().max().item()
    floor = truth.abs().max().item() * torch.finfo(dtype).eps
    assert errors["sdpa"] <= 2 * errors["eager"] + floor
    assert errors["urform"] <= 2 * errors["eager"] + floor
    assert errors["eager"] <= 0.05 * truth.abs().max().item()
