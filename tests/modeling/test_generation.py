"""Generation against a plain loop: no cache, no padding, one row at a time, argmax of a full forward."""

from typing import Any

import pytest
import torch
import torch._dynamo.testing
import transformers
from numerics import assert_within, twice
from packaging.version import Version
from support import WIDE, make
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel, StaticCache

import urform

NEW = 6  # longer than the sliding windows below
SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 3}
POSITIONS: dict[str, dict[str, Any]] = {
    "rope": {},
    "learned": {"position_encoding": "learned"},
    "sinusoidal": {"position_encoding": "sinusoidal"},
    "alibi": {"position_encoding": "alibi"},
    "t5": {"position_encoding": "t5"},
    "none": {"position_encoding": "none"},
    "rope-sliding": SLIDING,
    "t5-sliding": {"position_encoding": "t5", **SLIDING},
    "learned-sliding": {"position_encoding": "learned", **SLIDING},
}
KINDS = ("decoder", "encoder-decoder")
GREEDY: dict[str, Any] = {
    "max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "eos_token_id": None
}  # fmt: skip

every_position = pytest.mark.parametrize("position", POSITIONS)
every_kind = pytest.mark.parametrize("kind", KINDS)


def build(kind: str, position: str = "rope", **fields: Any) -> PreTrainedModel:
    """A tiny model whose next token is not decided by chance: weights far from zero."""
    return make(kind, **{**WIDE, **POSITIONS[position], **fields})


def padded(left: bool = True) -> tuple[Tensor, Tensor]:
    """Three rows of 4, 2 and 7 tokens, and their mask."""
    ids = torch.randint(3, 99, (3, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :3] = mask[1, :5] = 0
    ids = ids * mask
    return (ids, mask) if left else (ids.flip(1), mask.flip(1))


@torch.no_grad()
def plain(model: PreTrainedModel, ids: Tensor, mask: Tensor, steps: int = NEW) -> Tensor:
    """The next `steps` tokens of every row."""
    rows = []
    for row, real in zip(ids, mask.bool(), strict=True):
        source = row[real][None]
        is_decoder = model.config.architecture == "decoder"
        target = source if is_decoder else torch.tensor([[model.config.decoder_start_token_id]])
        for _ in range(steps):
            inputs = {"input_ids": target} if is_decoder else {"input_ids": source, "decoder_input_ids": target}
            logits = model(**inputs, use_cache=False).logits
            target = torch.cat([target, logits[:, -1:].argmax(-1)], dim=1)
        rows.append(target[0, -steps:])
    return torch.stack(rows)


@every_kind
@every_position
def test_every_cache_and_implementation_is_the_plain_loop(kind: str, position: str) -> None:
    model = build(kind, position)
    ids, mask = padded()
    expected = plain(model, ids, mask)
    for implementation in ("eager", "sdpa", "urform"):
        model.set_attn_implementation(implementation)
        for cache in ({}, {"use_cache": False}, {"cache_implementation": "static", "disable_compile": True}):
            found = model.generate(ids, attention_mask=mask, **GREEDY, **cache)[:, -NEW:]
            assert torch.equal(found, expected), (implementation, cache)


@every_position
def test_right_padded_sources_are_the_plain_loop(position: str) -> None:
    model = build("encoder-decoder", position)
    ids, mask = padded(left=False)
    assert torch.equal(model.generate(ids, attention_mask=mask, **GREEDY)[:, -NEW:], plain(model, ids, mask))


@every_position
def test_left_padded_target_prompt_is_the_prompt_alone(position: str) -> None:
    model = build("encoder-decoder", position)
    source = torch.randint(3, 99, (2, 6))
    start = model.config.decoder_start_token_id
    prompt = torch.tensor([[0, 0, start, 7], [start, 5, 6, 8]])
    found = model.generate(source, decoder_input_ids=prompt, decoder_attention_mask=(prompt != 0).long(), **GREEDY)
    alone = model.generate(source[:1], decoder_input_ids=prompt[:1, 2:], **GREEDY)
    assert torch.equal(found[:1, -NEW:], alone[:, -NEW:])


@every_kind
@every_position
def test_speculation_keeps_the_greedy_tokens(kind: str, position: str) -> None:
    if kind == "decoder" and "sliding" in position and Version(transformers.__version__) < Version("5.23"):
        pytest.skip("transformers 5.17 raises in assisted generation over sliding caches, for its own Gemma 2 too")
    model, assistant = build(kind, position), build(kind, position)
    with torch.no_grad():
        for parameter in assistant.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))  # right often, not always
    ids = padded()[0][2:]
    expected = plain(model, ids, torch.ones_like(ids))
    assert torch.equal(model.generate(ids, assistant_model=assistant, **GREEDY)[:, -NEW:], expected)
    assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=3, **GREEDY)[:, -NEW:], expected)


@torch.no_grad()
def score(model: PreTrainedModel, ids: Tensor, mask: Tensor, tokens: Tensor) -> Tensor:
    """Mean log-probability of `tokens` `[B, NEW]`, row by row without padding."""
    scores = []
    for row, real, new in zip(ids, mask.bool(), tokens, strict=True):
        source = row[real][None]
        if model.config.architecture == "decoder":
            logits = model(torch.cat([source, new[None, :-1]], dim=1)).logits[0, -NEW:]
        else:
            start = torch.tensor([[model.config.decoder_start_token_id]])
            logits = model(source, decoder_input_ids=torch.cat([start, new[None, :-1]], dim=1)).logits[0]
        scores.append(logits.log_softmax(-1).gather(1, new[:, None]).mean())
    return torch.stack(scores)


@every_kind
@pytest.mark.parametrize("position", ["rope", "t5-sliding"])
def test_beams_carry_the_models_scores(kind: str, position: str) -> None:
    model = build(kind, position)
    ids, mask = padded()
    options = {**GREEDY, "num_beams": 4, "num_return_sequences": 2, "output_scores": True}
    found = model.generate(ids, attention_mask=mask, return_dict_in_generate=True, **options)
    repeated = [x.repeat_interleave(2, dim=0) for x in (ids, mask)]
    expected = twice(model, lambda m: score(m, *repeated, found.sequences[:, -NEW:]))
    assert_within(found.sequences_scores, *expected)
    without_cache = model.generate(ids, attention_mask=mask, use_cache=False, **options)
    assert torch.equal(found.sequences, without_cache)


@every_kind
@pytest.mark.parametrize("beams", [1, 3])
def test_samples_are_those_of_a_run_without_cache(kind: str, beams: int) -> None:
    model = build(kind, "alibi")
    ids, mask = padded()
    options = {**GREEDY, "do_sample": True, "top_p": 0.9, "num_beams": beams, "num_return_sequences": beams}
    found = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        found.append(model.generate(ids, attention_mask=mask, use_cache=use_cache, **options))
    assert torch.equal(*found)


@every_kind
def test_prefix_function_and_processors_bind(kind: str) -> None:
    model = build(kind)
    ids, mask = padded()
    allowed = [5, 6, 7]
    found = model.generate(ids, attention_mask=mask, num_beams=2, prefix_allowed_tokens_fn=lambda *_: allowed, **GREEDY)
    assert set(found[:, -NEW:].flatten().tolist()) <= set(allowed)
    found = model.generate(ids, attention_mask=mask, no_repeat_ngram_size=1, **GREEDY)[:, -NEW:]
    assert all(len(set(row)) == NEW for row in found.tolist())


@every_position
def test_decoder_goes_on_from_its_cache(position: str) -> None:
    """A second call with the first one's cache, a prefill in chunks and a forward in two parts."""
    model = build("decoder", position)
    ids, mask = padded()
    expected = plain(model, ids, mask)
    half = {**GREEDY, "max_new_tokens": 3, "min_new_tokens": 3}
    first = model.generate(ids, attention_mask=mask, return_dict_in_generate=True, **half)
    longer = torch.cat([mask, mask.new_ones(3, 3)], dim=1)
    second = model.generate(first.sequences, attention_mask=longer, past_key_values=first.past_key_values, **half)
    assert torch.equal(second[:, -NEW:], expected)
    assert torch.equal(model.generate(ids, attention_mask=mask, prefill_chunk_size=3, **GREEDY)[:, -NEW:], expected)
    with torch.no_grad():
        whole, truth = twice(model, lambda m: m(ids, attention_mask=mask).logits[:, 4:])
        head = model(ids[:, :4], attention_mask=mask[:, :4], use_cache=True)
        tail = model(ids[:, 4:], attention_mask=mask, past_key_values=head.past_key_values).logits
    real = mask[:, 4:].bool()
    assert_within(tail[real], whole[real], truth[real])


@pytest.mark.parametrize("position", ["rope", "rope-sliding", "t5-sliding"])
@pytest.mark.parametrize("static", [False, True])
def test_encoder_decoder_goes_on_from_its_cache(position: str, static: bool) -> None:
    model = build("encoder-decoder", position)
    ids, mask = padded()
    expected = plain(model, ids, mask)
    if static:
        full = urform.UrformConfig(**{**model.config.to_dict(), "layer_types": None, "decoder_layer_types": None})
        caches = StaticCache(config=model.config, max_cache_len=16), StaticCache(config=full, max_cache_len=7)
    else:
        caches = DynamicCache(config=model.config), DynamicCache()
    half = {**GREEDY, "max_new_tokens": 3, "min_new_tokens": 3, "disable_compile": True}
    cache = EncoderDecoderCache(*caches)
    first = model.generate(ids, attention_mask=mask, past_key_values=cache, **half)
    second = model.generate(
        ids, attention_mask=mask, decoder_input_ids=first, decoder_attention_mask=torch.ones_like(first),
        past_key_values=cache, **half,
    )  # fmt: skip
    assert torch.equal(second[:, -NEW:], expected)


@every_kind
@pytest.mark.parametrize("position", ["rope", "learned", "t5-sliding"])
def test_embeddings_instead_of_ids(kind: str, position: str) -> None:
    model = build(kind, position, scale_embedding=True)
    ids, mask = padded()
    expected = plain(model, ids, mask)
    embeds = model.get_input_embeddings()(ids)
    for cache in ({}, {"use_cache": False}, {"cache_implementation": "static", "disable_compile": True}):
        found = model.generate(inputs_embeds=embeds, attention_mask=mask, **GREEDY, **cache)
        assert torch.equal(found[:, -NEW:], expected)
        if kind == "decoder":  # ids beside embeddings come back in front
            both = model.generate(ids, inputs_embeds=embeds, attention_mask=mask, **GREEDY, **cache)
            assert torch.equal(both, torch.cat([ids, expected], dim=1))


@every_kind
def test_everything_that_generate_can_return(kind: str) -> None:
    model = build(kind)
    model.set_attn_implementation("eager")
    ids, mask = padded()
    wanted = ("scores", "logits", "attentions", "hidden_states")
    out = model.generate(
        ids, attention_mask=mask, return_dict_in_generate=True, **{f"output_{x}": True for x in wanted}, **GREEDY
    )
    assert len(out.scores) == len(out.logits) == NEW and out.logits[0].shape == (3, 99)
    prompt = 7 if kind == "decoder" else 1
    prefix = "" if kind == "decoder" else "decoder_"
    states, weights = getattr(out, f"{prefix}hidden_states"), getattr(out, f"{prefix}attentions")
    for step in range(NEW):
        queries, keys = (prompt, prompt) if step == 0 else (1, prompt + step)
        assert [tuple(x.shape) for x in states[step]] == [(3, queries, 32)] * 3
        assert [tuple(x.shape) for x in weights[step]] == [(3, 4, queries, keys)] * 2
        if kind == "encoder-decoder":
            assert [tuple(x.shape) for x in out.cross_attentions[step]] == [(3, 4, queries, 7)] * 2
            read = torch.stack(out.cross_attentions[step])
            assert read.masked_select(mask[None, :, None, None] == 0).abs().max() == 0  # no look at padding
            torch.testing.assert_close(read.sum(-1), torch.ones(read.shape[:-1]))
    if kind == "encoder-decoder":
        assert len(out.encoder_attentions) == 2 and len(out.encoder_hidden_states) == 3


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "urform"])
@pytest.mark.parametrize("position", ["rope", "learned", "t5", "alibi"])
def test_4d_mask_shares_a_prefix(implementation: str, position: str) -> None:
    """Three continuations of one prefix in one row, told apart by mask and positions, against three rows."""
    if position in ("t5", "alibi"):  # their bias counts places: a plain causal mask only
        model = build("decoder", position)
        model.set_attn_implementation(implementation)
        ids = padded()[0][2:]
        mask = torch.ones(7, 7).tril().bool()[None, None]
        assert_within(model(ids, attention_mask=mask).logits, *twice(model, lambda m: m(ids).logits))
        return
    model = build("decoder", position)
    model.set_attn_implementation(implementation)
    rows = torch.tensor([[10, 11, 12, 13], [10, 11, 12, 14], [10, 11, 12, 15]])
    row = torch.tensor([[10, 11, 12, 13, 14, 15]])
    mask = torch.ones(6, 6).tril()
    mask[3:, 3:] = torch.eye(3)
    mask = (1 - mask[None, None]) * torch.finfo(torch.float32).min
    found = model(row, attention_mask=mask, position_ids=torch.tensor([[0, 1, 2, 3, 3, 3]])).logits[0, 3:]
    assert_within(found, *twice(model, lambda m: m(rows).logits[:, -1]))


@pytest.mark.parametrize(("kind", "position"), [("decoder", "learned"), ("encoder-decoder", "t5")])
@torch.no_grad()
def test_decoding_with_a_static_cache_compiles_once(kind: str, position: str) -> None:
    torch._dynamo.reset()
    model = build(kind, position)
    ids, mask = padded()
    expected = plain(model, ids, mask)
    counter = torch._dynamo.testing.CompileCounter()
    step = torch.compile(model, fullgraph=True, backend=counter)
    cache: Any = StaticCache(config=model.config, max_cache_len=16)
    if kind == "encoder-decoder":
        cache = EncoderDecoderCache(cache, StaticCache(config=model.config, max_cache_len=7))
        source = {"attention_mask": mask, "encoder_outputs": model.get_encoder()(ids, attention_mask=mask)}
        new = torch.full((3, 1), model.config.decoder_start_token_id)
        out = model(decoder_input_ids=new, past_key_values=cache, use_cache=True, **source)
    else:
        out = model(ids, attention_mask=mask, past_key_values=cache, use_cache=True)
    tokens = [out.logits[:, -1:].argmax(-1)]
    for i in range(1, NEW):
        if kind == "encoder-decoder":
            inputs = {"decoder_input_ids": tokens[-1], **source}
        else:
            longer = torch.nn.functional.pad(mask, (0, 9), value=1)  # as long as the cache, which hides the future
            inputs = {"input_ids": tokens[-1], "attention_mask": longer, "position_ids": mask.sum(1, True) + i - 1}
        tokens.append(step(**inputs, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1))
    assert torch.equal(torch.cat(tokens, dim=1), expected)
    assert counter.frame_count == 1


@every_kind
def test_logits_to_keep(kind: str) -> None:
    model = build(kind)
    ids, mask = padded()
    both = twice(model, lambda m: m(ids, attention_mask=mask).logits)
    rows = torch.tensor([[0, 6], [5, 2], [3, 3]])
    chosen = torch.zeros(3, 7, dtype=torch.bool)
    chosen[0, 5] = chosen[2, 1] = chosen[2, 6] = True
    places: list[tuple[Any, Any]] = [
        (0, slice(None)), (1, (slice(None), slice(-1, None))), (3, (slice(None), slice(-3, None))),
        (torch.tensor([1, 4]), (slice(None), [1, 4])), (rows, (torch.arange(3)[:, None], rows)), (chosen, chosen),
    ]  # fmt: skip
    for keep, place in places:
        found = model(ids, attention_mask=mask, logits_to_keep=keep).logits
        assert_within(found, *(whole[place] for whole in both))


def test_prompts_padded_on_the_right_go_on_alike_under_every_cache() -> None:
    """They are a mistake that transformers warns of; what comes of it does not depend on the cache."""
    model = build("decoder")
    ids, mask = torch.randint(3, 99, (2, 7)), torch.ones(2, 7, dtype=torch.long)
    mask[0, 5:] = 0
    settings: dict[str, Any] = {
        "attention_mask": mask, "max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False,
        "return_dict_in_generate": True, "output_logits": True,
    }  # fmt: skip
    static = {"cache_implementation": "static", "disable_compile": True}
    found = [torch.stack(model.generate(ids, **settings, **extra).logits) for extra in ({}, static)]
    model.set_attn_implementation("eager")
    want = twice(model, lambda m: torch.stack(m.generate(ids, **settings).logits))
    for logits in found:
        assert_within(logits, *want)
