"""What absolute positions count, and which waves they make: against explicit position ids and plain formulas."""

import math
from typing import Any

import pytest
import torch
from numerics import assert_within, twice
from torch import Tensor

from urform import UrformConfig, UrformForCausalLM, UrformForConditionalGeneration, UrformModel

PAD = 1
SIZES: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "max_position_embeddings": 24, "position_offset": 2, "pad_token_id": PAD, "bos_token_id": 0, "eos_token_id": 2,
    "hidden_dropout_prob": 0.0,
}  # fmt: skip


def batch() -> tuple[Tensor, Tensor]:
    """Padding on the right, on the left, none; a pad token inside the second text."""
    ids = torch.randint(3, 40, (3, 9))
    mask = torch.ones_like(ids)
    mask[0, 5:], mask[1, :3] = 0, 0
    ids = ids.masked_fill(mask == 0, PAD)
    ids[1, 6] = PAD
    return ids, mask


COUNTED = {
    "mask": [[0, 1, 2, 3, 4, 0, 0, 0, 0], [0, 0, 0, 0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5, 6, 7, 8]],
    "columns": [[0, 1, 2, 3, 4, 5, 6, 7, 8]] * 3,
    "tokens": [[0, 1, 2, 3, 4, -1, -1, -1, -1], [-1, -1, -1, 0, 1, 2, -1, 3, 4], [0, 1, 2, 3, 4, 5, 6, 7, 8]],
}


@pytest.mark.parametrize("attention", [None, "eager"], ids=["packed", "padded"])
@pytest.mark.parametrize("encoding", ["learned", "sinusoidal"])
@pytest.mark.parametrize("counting", COUNTED)
def test_positions_are_those_that_the_axis_names(counting: str, encoding: str, attention: str | None) -> None:
    config = UrformConfig(
        architecture="encoder", position_encoding=encoding, position_counting=counting, **SIZES
    )  # fmt: skip
    model = UrformModel._from_config(config, **({"attn_implementation": attention} if attention else {})).eval()
    ids, mask = batch()
    places = torch.tensor(COUNTED[counting])
    seen: list[Tensor] = []
    model.encoder._add_positions, add = lambda x, p: (seen.append(p), add(x, p))[1], model.encoder._add_positions
    out = model(input_ids=ids, attention_mask=mask).last_hidden_state
    where = mask.bool()
    found = seen[0][0] if attention is None else seen[0].expand(len(ids), -1)[where]  # packed: real tokens alone
    assert found.tolist() == places[where].tolist()
    explicit = UrformModel._from_config(config, attn_implementation="eager").eval()
    explicit.load_state_dict(model.state_dict())
    for row in (0, 2) if counting == "tokens" else range(3):  # each text alone, at the positions that it should have
        real = mask[row].bool()
        given = {"input_ids": ids[row : row + 1, real], "position_ids": places[row : row + 1, real]}
        alone = twice(explicit, lambda m, given=given: m(**given).last_hidden_state[0])
        assert_within(out[row, real], *alone)


@pytest.mark.parametrize("counting", ["mask", "columns"])
def test_cached_steps_go_on_counting(counting: str) -> None:
    """Token by token with a cache gives what one pass gives."""
    config = UrformConfig(architecture="decoder", position_encoding="learned", position_counting=counting, **SIZES)
    model = UrformForCausalLM(config).eval()
    ids, mask = batch()
    whole = twice(model, lambda m: m(input_ids=ids, attention_mask=mask).logits[mask.bool()])
    cache, steps = None, []
    for i in range(ids.shape[1]):
        step = model(
            input_ids=ids[:, i : i + 1], attention_mask=mask[:, : i + 1], past_key_values=cache, use_cache=True
        )
        cache = step.past_key_values
        steps.append(step.logits)
    assert_within(torch.cat(steps, 1)[mask.bool()], *whole)


def wave(layout: str, position: int, feature: int, size: int) -> float:
    """One number of the table, as the papers and codes write it."""
    half = size // 2
    if layout == "interleaved":  # Vaswani et al. 2017, section 3.5
        angle = position / 10000 ** (2 * (feature // 2) / size)
        return math.cos(angle) if feature % 2 else math.sin(angle)
    steps = half if layout == "halves" else half - 1  # tensor2tensor's get_timing_signal divides by one less
    angle = position * math.exp(-(feature % half) * math.log(10000) / steps)
    return math.sin(angle) if feature < half else math.cos(angle)


@pytest.mark.parametrize("layout", ["interleaved", "halves", "tensor2tensor"])
def test_sinusoids(layout: str) -> None:
    config = UrformConfig(architecture="encoder", position_encoding="sinusoidal", sinusoidal_layout=layout, **SIZES)
    stack = UrformModel(config).encoder
    have = stack._add_positions(torch.zeros(1, 700, 16), torch.arange(700)[None])[0]
    want = torch.tensor([[wave(layout, p + 2, i, 16) for i in range(16)] for p in range(700)])
    torch.testing.assert_close(have, want, rtol=0, atol=1e-4 if layout == "tensor2tensor" else 1e-6)


def test_decoder_starts_with_the_labels_last_token() -> None:
    """The language's code stands last in mBART's labels and first in what its decoder reads."""
    config = UrformConfig(decoder_start_from_labels=True, **SIZES)
    model = UrformForConditionalGeneration(config).eval()
    labels = torch.tensor([[5, 6, 2, 30], [7, 2, 31, -100]])
    want = [[30, 5, 6, 2], [31, 7, 2, 31]]
    assert model.prepare_decoder_input_ids_from_labels(labels).tolist() == want
    source = torch.randint(3, 40, (2, 6))
    given = twice(model, lambda m: m(input_ids=source, labels=labels, decoder_input_ids=torch.tensor(want)).loss)
    assert_within(model(input_ids=source, labels=labels).loss, *given)
    model.train()
    assert_within(model(input_ids=source, labels=labels).loss, *given)
