"""`urform.from_torch_transformer` against what users wrote around PyTorch's own Transformer, run as they ran it."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from conversion_cases import close, padded, shake
from numerics import assert_within, exact, twice
from torch import Tensor, nn

import urform

pytestmark = [
    pytest.mark.filterwarnings("ignore:enable_nested_tensor"),
    pytest.mark.filterwarnings("ignore:only training depends"),
]
VOCAB, WIDTH, LENGTH = 37, 24, 16


class Seq2Seq(nn.Module):
    """The seeds' style: embedding, learned positions, `nn.Transformer`, output layer."""

    def __init__(self, positions: str = "table", scale: float = 1.0, shared: bool = True, **options: Any) -> None:
        super().__init__()
        self.scale = scale
        self.embedding = nn.Embedding(VOCAB, WIDTH, padding_idx=0)
        self.target_embedding = self.embedding if shared else nn.Embedding(VOCAB, WIDTH, padding_idx=0)
        shape = {"table": (LENGTH, WIDTH), "batch": (1, LENGTH, WIDTH), "middle": (LENGTH, 1, WIDTH)}[positions]
        self.positions = nn.Parameter(torch.randn(shape))
        sizes = {"nhead": 4, "num_encoder_layers": 2, "num_decoder_layers": 3, "dim_feedforward": 20}
        self.transformer = nn.Transformer(WIDTH, **{**sizes, **options})
        self.fc_out = nn.Linear(WIDTH, VOCAB)

    def forward(self, source: Tensor, target: Tensor, source_pad: Tensor, target_pad: Tensor) -> Tensor:
        first = self.transformer.batch_first
        places = self.positions.reshape(LENGTH, WIDTH)
        sides = []
        for ids, table in ((source, self.embedding), (target, self.target_embedding)):
            states = table(ids) * self.scale + places[: ids.shape[1]]
            sides.append(states if first else states.transpose(0, 1))
        hidden = self.transformer(
            *sides,
            tgt_mask=torch.ones(target.shape[1], target.shape[1], dtype=torch.bool).triu(1),
            src_key_padding_mask=source_pad,
            tgt_key_padding_mask=target_pad,
            memory_key_padding_mask=source_pad,
        )
        return self.fc_out(hidden if first else hidden.transpose(0, 1))


def convert(theirs: Seq2Seq, **more: Any) -> Any:
    return urform.from_torch_transformer(
        theirs.transformer,
        embeddings=theirs.embedding,
        decoder_embeddings=theirs.target_embedding,
        positions=theirs.positions,
        output=theirs.fc_out,
        scale_embedding=theirs.scale != 1.0,
        **more,
    )


def batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    source, mask = padded("right", VOCAB, 0)
    target, target_mask = padded("right", VOCAB, 0, 7)
    return source, target, mask, target_mask


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"norm_first": True, "batch_first": True},
        {"norm_first": True, "activation": "gelu", "positions": "batch", "scale": math.sqrt(WIDTH)},
        {"bias": False, "activation": nn.functional.gelu, "positions": "middle", "batch_first": True},
        {"bias": False, "norm_first": True, "layer_norm_eps": 1e-3, "activation": nn.functional.silu, "nhead": 3},
        {"shared": False, "activation": nn.functional.mish, "num_encoder_layers": 1},
    ],
)
def test_encoder_decoder(options: dict[str, Any]) -> None:
    """Logits, the gradients of the tables and greedy generation, with padding on both sides."""
    torch.manual_seed(0)
    theirs = Seq2Seq(**options, dropout=0.3).eval()
    shake(theirs)
    ours = convert(theirs, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1)
    assert type(ours) is urform.UrformForConditionalGeneration and not ours.training
    assert ours.config.hidden_dropout_prob == ours.config.attention_dropout == ours.config.activation_dropout == 0.3
    source, target, mask, target_mask = batch()
    precise = exact(theirs)
    want, truth = (module(source, target, mask == 0, target_mask == 0) for module in (theirs, precise))
    have = ours(
        input_ids=source, attention_mask=mask, decoder_input_ids=target, decoder_attention_mask=target_mask
    ).logits
    real = target_mask.bool()
    close(have, want, truth, "logits", real)

    for logits in (want, have, truth):
        nn.functional.cross_entropy(logits[real], target[real]).backward()
    model = ours.model
    places = model.encoder.embed_positions.weight.grad + model.decoder.embed_positions.weight.grad
    mine = (model.encoder.embed_tokens.weight.grad, model.decoder.embed_tokens.weight.grad, places)
    other = [
        (x.embedding.weight.grad, x.target_embedding.weight.grad, x.positions.grad.reshape(LENGTH, WIDTH))
        for x in (theirs, precise)
    ]
    assert_within(mine, *other, "gradients of the tables")

    tokens = torch.ones(3, 1, dtype=torch.long)
    for _ in range(5):
        logits = theirs(source, tokens, mask == 0, torch.zeros_like(tokens, dtype=torch.bool))
        tokens = torch.cat((tokens, logits[:, -1:].argmax(-1)), 1)
    greedy = {"do_sample": False, "max_new_tokens": 5, "eos_token_id": None}
    assert ours.generate(input_ids=source, attention_mask=mask, **greedy).tolist() == tokens.tolist()


def test_copies_and_training() -> None:
    """Training one leaves the other; the mode and the tying come along."""
    torch.manual_seed(0)
    theirs = Seq2Seq()
    theirs.fc_out.weight = theirs.embedding.weight
    ours = convert(theirs)
    assert ours.training and ours.config.tie_word_embeddings
    table = ours.model.encoder.embed_tokens.weight
    assert ours.lm_head.weight is table and ours.model.decoder.embed_tokens.weight is table
    before = theirs.embedding.weight.clone()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.zero_()
    assert torch.equal(theirs.embedding.weight, before)


def layers(kind: type = nn.TransformerEncoder, layer: Any = None, **options: Any) -> nn.Module:
    layer = layer or nn.TransformerEncoderLayer(WIDTH, 4, 20, **options)
    norm = nn.LayerNorm(WIDTH) if options.get("norm_first") else None
    return kind(layer, 2, norm, **({"enable_nested_tensor": False} if kind is nn.TransformerEncoder else {}))


@pytest.mark.parametrize("width", [VOCAB, 5, None])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
def test_encoder_and_decoder_alone(norm_first: bool, causal: bool, width: int | None) -> None:
    """A text encoder or, under a causal mask, a language model; over tokens, over labels, or states alone."""
    torch.manual_seed(0)
    stack = layers(norm_first=norm_first, batch_first=True).eval()
    table, places = nn.Embedding(VOCAB, WIDTH), nn.Embedding(LENGTH, WIDTH)
    output = nn.Linear(WIDTH, width, bias=width == VOCAB) if width else nn.Identity()
    for module in (stack, table, places, output):
        shake(module)
    ours = urform.from_torch_transformer(
        stack,
        embeddings=table,
        positions=places,
        output=output if width else None,
        causal=causal,
        pad_token_id=0,
    )
    language = urform.UrformForCausalLM if causal else urform.UrformForMaskedLM
    kinds = {VOCAB: language, 5: urform.UrformForTokenClassification, None: urform.UrformModel}
    assert type(ours) is kinds[width]
    ids, _, mask, _ = batch()
    length = ids.shape[1]
    forbidden = torch.ones(length, length, dtype=torch.bool).triu(1) if causal else None
    want, truth = (
        to(output)(
            to(stack)(to(table)(ids) + to(places).weight[:length], mask=forbidden, src_key_padding_mask=mask == 0)
        )
        for to in (lambda module: module, exact)
    )
    close(ours(input_ids=ids, attention_mask=mask)[0], want, truth, "logits", mask.bool())


def test_sinusoidal_and_no_positions() -> None:
    torch.manual_seed(0)
    stack = layers(batch_first=True, norm_first=True).eval()
    table = nn.Embedding(VOCAB, WIDTH)
    ids = torch.randint(0, VOCAB, (2, 50))
    rate = torch.exp(torch.arange(0, WIDTH, 2).double() * (-math.log(10000.0) / WIDTH))
    waves = torch.zeros(50, WIDTH, dtype=torch.float64)
    waves[:, 0::2], waves[:, 1::2] = (
        (torch.arange(50)[:, None] * rate).sin(),
        (torch.arange(50)[:, None] * rate).cos(),
    )
    for positions, added in (("sinusoidal", waves), (None, 0.0)):
        ours = urform.from_torch_transformer(stack, embeddings=table, positions=positions)
        want = (stack(table(ids) + torch.as_tensor(added).float()), exact(stack)(exact(table)(ids) + added))
        close(ours(input_ids=ids)[0], *want, "hidden states")


def test_a_causal_encoder_of_pytorch_is_a_gpt2() -> None:
    torch.manual_seed(0)
    stack = layers(norm_first=True, batch_first=True, activation="gelu").eval()
    table, places = nn.Embedding(VOCAB, WIDTH), nn.Embedding(LENGTH, WIDTH)
    ours = urform.from_torch_transformer(
        stack,
        embeddings=table,
        positions=places,
        output=nn.Linear(WIDTH, VOCAB, bias=False),
        causal=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    stock = urform.to_transformers(ours, "gpt2")
    assert type(stock) is hf.GPT2LMHeadModel
    ids = torch.randint(0, VOCAB, (2, 9))
    close(ours(input_ids=ids).logits, *twice(stock, lambda m: m(input_ids=ids).logits), "logits")


class Changed(nn.TransformerEncoderLayer):
    """A layer of the user's own."""


def refused(**changes: Any) -> dict[str, Any]:
    return {"module": layers(), "embeddings": nn.Embedding(VOCAB, WIDTH), **changes}


def pair(**options: Any) -> nn.Module:
    return nn.Transformer(WIDTH, 4, 1, 1, batch_first=True, **options)


def uneven() -> nn.Module:
    stack = layers()
    stack.layers[1].norm1.eps = 1e-3
    return stack


def biased_keys() -> nn.Module:
    stack = layers()
    stack.layers[0].self_attn = nn.MultiheadAttention(WIDTH, 4, add_bias_kv=True)
    return stack


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: refused(module=layers(layer=Changed(WIDTH, 4))), "Changed"),
        (lambda: refused(module=nn.LSTM(WIDTH, WIDTH)), "LSTM"),
        (lambda: refused(module=Seq2Seq()), r"'transformer' in it"),
        (lambda: refused(module=layers(nn.TransformerDecoder, nn.TransformerDecoderLayer(WIDTH, 4))), "custom_encoder"),
        (lambda: refused(module=uneven()), "norm_eps"),
        # PyTorch's own decoder replaces an activation that is a module by ReLU when it copies its layers
        (lambda: refused(module=pair(activation=nn.SiLU())), "'hidden_act': .'relu', 'silu'."),
        (lambda: refused(module=biased_keys()), "add_bias_kv"),
        (lambda: refused(module=layers(activation=torch.nn.functional.softplus)), "hidden_act="),
        (lambda: refused(module=pair(), causal=True), "causal=True"),
        (lambda: refused(embeddings=nn.Embedding(VOCAB, 8)), "d_model=24"),
        (lambda: refused(embeddings=nn.Embedding(VOCAB, WIDTH, max_norm=1.0)), "max_norm"),
        (lambda: refused(embeddings=nn.Embedding(VOCAB, WIDTH, padding_idx=0), pad_token_id=1), "padding_idx is 0"),
        (lambda: refused(positions=torch.zeros(2, 3, WIDTH)), r"\[2, 3, 24\]"),
        (lambda: refused(positions="rotary"), "positions='rotary'"),
        (lambda: refused(module=pair(), decoder_positions=torch.zeros(9, WIDTH)), "positions=None"),
        (lambda: refused(decoder_embeddings=nn.Embedding(VOCAB, WIDTH)), "one stack"),
        (lambda: refused(vocab_size=9, norm_eps=1.0), "norm_eps, vocab_size follow from the modules"),
        (lambda: refused(vocab_sizes=9), "vocab_sizes"),
        (
            lambda: refused(module=pair(), decoder_embeddings=nn.Embedding(9, WIDTH)),
            "num_embeddings",
        ),
        (
            lambda: refused(
                module=pair(),
                positions=torch.zeros(9, WIDTH),
                decoder_positions=torch.zeros(8, WIDTH),
            ),
            "lengths",
        ),
        (lambda: refused(module=pair(), output=nn.Linear(WIDTH, 5)), "out_features=5"),
    ],
)
def test_what_is_not_pytorchs_own_or_does_not_go_together_is_refused(
    make: Callable[[], dict[str, Any]], named: str
) -> None:
    arguments = make()
    with pytest.raises(ValueError, match=named):
        urform.from_torch_transformer(arguments.pop("module"), **arguments)


@pytest.mark.parametrize(
    ("activation", "named"),
    [
        (nn.SiLU(), {}),
        (nn.GELU(), {}),
        (nn.Tanh(), {}),
        (lambda x: nn.functional.relu(x) ** 2, {"hidden_act": "relu2", "hidden_dropout_prob": 0.0}),
    ],
)
def test_activations_are_known_or_can_be_named(activation: Any, named: dict[str, Any]) -> None:
    stack = layers(activation=activation, batch_first=True).eval()
    table = nn.Embedding(VOCAB, WIDTH)
    ours = urform.from_torch_transformer(stack, embeddings=table, **named)
    ids = torch.randint(0, VOCAB, (2, 9))
    close(ours(input_ids=ids)[0], stack(table(ids)), exact(stack)(exact(table)(ids)), "hidden states")
