"""Rows, documents and neighbours: what a batch may not change, what a model must not ask for, what it refuses."""

import copy
import inspect
from typing import Any

import pytest
import torch
import transformers
from numerics import assert_within, twice
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache

import urform
from urform import UrformConfig
from urform.modeling.kernels.packed_documents import find_documents

HEADS = {"encoder": "MaskedLM", "decoder": "CausalLM", "encoder-decoder": "ConditionalGeneration"}
ENCODINGS = ("rope", "sinusoidal", "learned", "alibi", "t5", "none")


def make(architecture: str, head: str | None = None, **fields: Any) -> Any:
    sizes = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 48, "max_position_embeddings": 64, "hidden_dropout_prob": 0.0}
    config = UrformConfig(architecture=architecture, **{**sizes, **fields})
    return getattr(urform, f"UrformFor{head or HEADS[architecture]}")(config).eval()


# ------------------------------------------------------------------------------------------------ causal losses


def loss_of_documents(model: Any, documents: list[list[int]]) -> float:
    """Give the mean negative log-likelihood of every document's tokens but its first, each document alone."""
    total, count = 0.0, 0
    for document in documents:
        ids = torch.tensor([document])
        log_probabilities = model(ids).logits[0, :-1].log_softmax(-1)
        total -= float(log_probabilities.gather(1, ids[0, 1:, None]).sum())
        count += len(document) - 1
    return total / count


@pytest.mark.parametrize("implementation", [None, "eager"])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_no_document_predicts_the_next_ones_first_token(encoding: str, implementation: str | None) -> None:
    model = make("decoder", position_encoding=encoding).double()
    if implementation is not None:
        model.set_attn_implementation(implementation)
    documents = [[5, 9, 7, 11], [6, 8], [12, 13, 14, 3, 20]]
    with torch.no_grad():
        want = loss_of_documents(model, documents)
    ids = torch.tensor([[token for document in documents for token in document]])
    positions = torch.cat([torch.arange(len(d)) for d in documents])[None]
    starts = torch.tensor([0, 4, 6, 11], dtype=torch.int32)
    lengths = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": 5, "max_length_k": 5}
    for mode in (model.train, model.eval):
        mode()
        for told in ({"position_ids": positions}, lengths):
            got = float(model(ids, labels=ids, **told).loss.detach())  # the library computes it in float32
            assert got == pytest.approx(want, abs=2e-6)


# ------------------------------------------------------------------------------------------ nothing real in a batch


@pytest.mark.parametrize("implementation", [None, "urform", "sdpa", "eager"])
@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("architecture", HEADS)
def test_a_batch_without_one_real_token(architecture: str, encoding: str, implementation: str | None) -> None:
    model = make(architecture, position_encoding=encoding)
    if implementation is not None:
        model.set_attn_implementation(implementation)
    ids = torch.randint(3, 50, (2, 5))
    batch = {"input_ids": ids, "attention_mask": torch.zeros_like(ids), "labels": torch.full_like(ids, -100)}
    assert model(**batch).loss.item() == 0
    model.train()
    loss = model(**batch).loss
    loss.backward()
    assert float(loss) == 0
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name


@pytest.mark.parametrize("side", ["source", "target"])
def test_one_side_without_one_real_token(side: str) -> None:
    model = make("encoder-decoder").train()
    ids = torch.randint(3, 50, (2, 5))
    mask = torch.ones_like(ids) if side == "target" else torch.zeros_like(ids)
    labels = ids if side == "source" else torch.full_like(ids, -100)
    loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
    loss.backward()
    assert torch.isfinite(loss) and (side == "source" or float(loss) == 0)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


# ---------------------------------------------------------------------------------- rotary scaling that needs a length

SCALINGS = {
    "dynamic": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
    "longrope": {
        "rope_type": "longrope", "rope_theta": 10000.0, "factor": 4.0, "short_factor": [1.0] * 4,
        "long_factor": [3.0] * 4, "original_max_position_embeddings": 16,
    },
}  # fmt: skip


def scaled(kind: str, **fields: Any) -> Any:
    size = {"max_position_embeddings": 16 if kind == "dynamic" else 64}
    return make("decoder", rope_parameters=dict(SCALINGS[kind]), initializer_range=0.2, **size, **fields)


def short_and_long() -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    short, long = torch.randint(3, 50, (1, 8)), torch.randint(3, 50, (1, 40))
    ids, mask = torch.zeros(2, 40, dtype=torch.long), torch.zeros(2, 40, dtype=torch.long)
    ids[0, :8], mask[0, :8], ids[1], mask[1] = short[0], 1, long[0], 1
    return short, long, {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("implementation", [None, "eager"])
@pytest.mark.parametrize("kind", SCALINGS)
def test_a_rows_rotations_are_its_own(kind: str, implementation: str | None) -> None:
    model = scaled(kind)
    if implementation is not None:
        model.set_attn_implementation(implementation)
    short, long, padded = short_and_long()
    with torch.no_grad():
        alone, truth = twice(model, lambda m: [m(ids).logits[0] for ids in (short, long)])
        together = model(**padded).logits
        positions = torch.cat([torch.arange(8), torch.arange(40)])[None]
        packed = model(torch.cat([short, long], 1), position_ids=positions).logits[0]
        assert torch.equal(model(short).logits[0], alone[0])  # what came before changes nothing
    assert_within([together[0, :8], together[1]], alone, truth)
    assert_within([packed[:8], packed[8:]], alone, truth)


@pytest.mark.parametrize("kind", SCALINGS)
def test_rope_length_of_the_batch_is_the_stock_classes(kind: str) -> None:
    shape = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    length = 16 if kind == "dynamic" else 64
    stock = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            **shape, intermediate_size=48, max_position_embeddings=length, rope_parameters=dict(SCALINGS[kind])
        )
    ).eval()
    model = urform.from_transformers(stock).eval()
    assert model.config.rope_length == "batch"
    urform.to_transformers(model)
    short, long, padded = short_and_long()
    with torch.no_grad():
        real = padded["attention_mask"].bool()
        want = twice(stock, lambda m: copy.deepcopy(m)(**padded).logits[real])
        assert_within(model(**padded).logits[real], *want)
        model.config.rope_length = "sequence"  # which no stock class computes
        with pytest.raises(ValueError, match="rope_length='sequence'"):
            urform.to_transformers(model)
        for ids in (short, long):
            # Its class remembers the longest input: a new one for each.
            want = twice(stock, lambda m, ids=ids: copy.deepcopy(m)(ids).logits)
            assert_within(model(ids).logits, *want)


def test_frequencies_stay_exact_in_bfloat16(tmp_path: Any) -> None:
    model = make("decoder")
    model.save_pretrained(tmp_path)
    loaded = urform.UrformForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    want = 10000.0 ** -(torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    for moved in (loaded, model.to(torch.bfloat16)):
        got = moved.model.decoder.rotary_emb["full_attention"].inv_freq
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), want, atol=0, rtol=1e-6)
    ids, positions = torch.randint(3, 50, (1, 9)), torch.arange(3000, 3009)[None]
    assert torch.equal(model(ids, position_ids=positions).logits, loaded(ids, position_ids=positions).logits)


# ----------------------------------------------------------------------------------------- what Trainer reads off


@pytest.mark.parametrize("head", ["SequenceClassification", "TokenClassification", "QuestionAnswering"])
def test_heads_name_what_they_serve(head: str) -> None:
    """Trainer drops the columns that a forward does not name."""
    names = set(inspect.signature(getattr(urform, f"UrformFor{head}").forward).parameters)
    assert {"input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds"} <= names
    model = make("encoder", head, type_vocab_size=2, num_labels=2)
    ids = torch.randint(3, 50, (2, 6))
    types = torch.tensor([[0, 0, 0, 1, 1, 1]]).expand(2, -1)
    with torch.no_grad():
        model.model.encoder.embed_token_types.weight.mul_(30)
        first = [next(iter(model(input_ids=ids, token_type_ids=t).values())) for t in (types, torch.zeros_like(types))]
    assert not torch.allclose(*first)


# ------------------------------------------------------------------------------------------------- attention weights


@pytest.mark.parametrize("implementation", [None, "urform", "sdpa"])
@pytest.mark.parametrize("architecture", HEADS)
def test_attention_weights_are_served(architecture: str, implementation: str | None) -> None:
    model = make(architecture)
    if implementation is not None:
        model.set_attn_implementation(implementation)
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    ids, mask = torch.randint(3, 50, (2, 6)), torch.ones(2, 6, dtype=torch.long)
    mask[0, 4:] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    if architecture == "encoder-decoder":
        batch["decoder_input_ids"] = ids[:, :4]
    with torch.no_grad():
        got, want = model(**batch, output_attentions=True), eager(**batch, output_attentions=True)
    names = [name for name in want if name.endswith("attentions")]
    assert names
    for name in names:
        assert len(got[name]) == 2
        for a, b in zip(got[name], want[name], strict=True):
            assert torch.equal(a, b)
            sums = a.sum(-1)
            assert torch.allclose(sums[sums > 0], torch.ones_like(sums[sums > 0]))
    assert model.config._attn_implementation == (implementation or "sdpa")


# ---------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("starts", [[0, 4], [0, 4, 12], [1, 4, 9], [0, 5, 4, 9]])
def test_starts_that_do_not_divide_the_row(encoding: str, starts: list[int]) -> None:
    model = make("encoder", position_encoding=encoding)
    cu = torch.tensor(starts, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"cu_seq_lens=.* must rise from 0 to the row's length, 9"):
        model(torch.randint(3, 50, (1, 9)), cu_seq_lens_q=cu, cu_seq_lens_k=cu, max_length_q=9, max_length_k=9)


@pytest.mark.parametrize("architecture", ["encoder", "decoder"])
def test_one_stack_reads_the_starts_of_its_queries(architecture: str) -> None:
    """`cu_seq_lens_q` alone is enough where queries and keys are one row."""
    model, starts = make(architecture), torch.tensor([0, 4, 9])
    ids = torch.randint(3, 50, (1, 9))
    got = model(ids, cu_seq_lens_q=starts, max_length_q=5, use_cache=False).logits
    parts = ((0, 4), (4, 9))
    assert_within(got, *twice(model, lambda m: torch.cat([m(ids[:, a:b]).logits for a, b in parts], dim=1)))
    encoder = make("encoder-decoder").model.encoder  # called by itself, as generate does
    got = encoder(ids, cu_seq_lens_q=starts, max_length_q=5).last_hidden_state
    alone = twice(encoder, lambda m: torch.cat([m(ids[:, a:b]).last_hidden_state for a, b in parts], dim=1))
    assert_within(got, *alone)


def test_a_mask_that_forgets_the_cache() -> None:
    model = make("decoder")
    ids = torch.randint(3, 50, (2, 6))
    cache = model(ids[:, :4], use_cache=True)[1]
    with pytest.raises(ValueError, match="attention_mask covers 2 tokens, but the cache holds 4 and 2 more come"):
        model(ids[:, 4:], attention_mask=torch.ones(2, 2), past_key_values=cache)


@pytest.mark.parametrize("cache", [((torch.zeros(1, 2, 3, 4),) * 2,), object()])
def test_what_is_no_cache_is_refused(cache: Any) -> None:
    """Tuples of tensors (transformers 4) and paged caches (continuous batching) are named, with the remedy."""
    for options in ({}, {"labels": torch.randint(3, 50, (1, 3))}):
        with pytest.raises(ValueError, match="is not a Cache of transformers; give a DynamicCache"):
            make("decoder")(torch.randint(3, 50, (1, 3)), past_key_values=cache, **options)


def test_two_caches_are_refused() -> None:
    model = make("decoder")
    with pytest.raises(ValueError, match="two names of one argument"):
        model(torch.randint(3, 50, (1, 3)), past_key_values=DynamicCache(), cache=DynamicCache())


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_a_prefix_in_the_cache_is_seen_by_labels(name: str) -> None:
    """PEFT's prefix tuning: the loss with a prefix is that of the decoder's own logits behind it."""
    model = make("encoder-decoder", position_encoding="t5").double()
    ids, labels = torch.randint(3, 50, (2, 6)), torch.randint(3, 50, (2, 4))
    labels[1, 3:] = -100

    def prefix() -> EncoderDecoderCache:
        own = DynamicCache()
        torch.manual_seed(5)
        for layer in range(2):
            own.update(torch.randn(2, 4, 3, 8).double(), torch.randn(2, 4, 3, 8).double(), layer)
        return EncoderDecoderCache(own, DynamicCache())

    inputs = model.prepare_decoder_input_ids_from_labels(labels)
    with torch.no_grad():
        # No mask at all: behind the labels' end nothing counts, and the decoder is causal.
        logits = model(input_ids=ids, decoder_input_ids=inputs, **{name: prefix()}).logits
        want = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        for mode in (model.train, model.eval):
            mode()
            got = model(input_ids=ids, labels=labels, **{name: prefix()}).loss.double()
            torch.testing.assert_close(got, want, atol=2e-6, rtol=0)


@pytest.mark.parametrize("implementation", [None, "eager"])
def test_padding_between_tokens_begins_no_document(implementation: str | None) -> None:
    """Positions after padding may go on by one or count it; where they do neither, a document begins."""
    model = make("encoder")
    if implementation is not None:
        model.set_attn_implementation(implementation)
    ids = torch.randint(3, 50, (1, 7))
    mask = torch.tensor([[1, 1, 0, 1, 1, 0, 1]])
    real = mask.bool()[0]
    assert find_documents(torch.arange(7)[None], mask, 7) is None
    goes_on = torch.tensor([[0, 1, 1, 2, 3, 3, 4]])
    got = model(ids, attention_mask=mask, position_ids=goes_on).logits[:, real]
    assert_within(got, *twice(model, lambda m: m(ids[:, real]).logits))
    restarts = torch.tensor([[0, 1, 0, 0, 1, 0, 0]])
    got = model(ids, attention_mask=mask, position_ids=restarts).logits[:, real]
    parts = ((0, 2), (3, 5), (6, 7))
    assert_within(got, *twice(model, lambda m: torch.cat([m(ids[:, a:b]).logits for a, b in parts], dim=1)))
