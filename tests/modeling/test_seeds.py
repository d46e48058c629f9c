"""The two founding examples: `nn-transformer` against `torch.nn.Transformer`, `keras-block` against plain float64."""

import math

import pytest
import torch
from numerics import assert_within, exact, twice
from torch import Tensor, nn

from urform import UrformConfig, UrformForConditionalGeneration, UrformForMaskedLM

SIZES = {"vocab_size": 53, "hidden_size": 24, "num_attention_heads": 4, "intermediate_size": 40}


def rename(key: str) -> str:
    """`torch.nn.Transformer`'s names to ours; what is packed in `in_proj` is split by the caller."""
    side = "decoder" if key.startswith("decoder") else "encoder"
    norms = {"norm1": "self_attn_norm", "norm2": "cross_attn_norm" if side == "decoder" else "mlp_norm"}
    norms["norm3"] = "mlp_norm"
    parts = []
    for part in key.split("."):
        part = {"multihead_attn": "cross_attn", "out_proj": "o_proj", **norms}.get(part, part)
        part = {"linear1": "mlp.up_proj", "linear2": "mlp.down_proj"}.get(part, part)
        parts.append(part)
    return "model." + ".".join(parts)


def copy_torch_transformer(module: nn.Transformer, ours: UrformForConditionalGeneration) -> None:
    """Carry the stacks' weights over."""
    state = {}
    for key, value in module.state_dict().items():
        if "in_proj" in key:
            kind = key.rpartition("_")[2]
            for letter, part in zip("qkv", value.chunk(3), strict=True):
                state[rename(key.rpartition(".")[0]) + f".{letter}_proj.{kind}"] = part
        else:
            state[rename(key)] = value
    missing, unexpected = ours.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(key.split(".")[-2] in ("embed_tokens", "embed_positions", "lm_head") for key in missing)


@pytest.mark.parametrize(("norm_position", "activation"), [("post", "relu"), ("pre", "gelu")])
def test_nn_transformer(norm_position: str, activation: str) -> None:
    """Same weights, different padding on the two sides, causal target: same logits and same gradients."""
    torch.manual_seed(0)
    stock = nn.Transformer(24, 4, 2, 3, 40, activation=activation, norm_first=norm_position == "pre", batch_first=True)
    stock.eval()
    config = UrformConfig.from_preset(
        "nn-transformer",
        **SIZES,
        num_hidden_layers=2,
        decoder_num_hidden_layers=3,
        norm_position=norm_position,
        hidden_act=activation,
        max_position_embeddings=32,
    )
    ours = UrformForConditionalGeneration(config).eval()
    for parameter in stock.parameters():
        nn.init.normal_(parameter, std=0.3)
    copy_torch_transformer(stock, ours)
    nn.init.normal_(ours.model.encoder.embed_tokens.weight)  # read by both sides
    source, target = torch.randint(3, 53, (3, 9)), torch.randint(3, 53, (3, 6))
    source_mask, target_mask = torch.ones_like(source), torch.ones_like(target)
    source_mask[0, 5:] = source_mask[1, 8:] = 0
    target_mask[1, 4:] = target_mask[2, 2:] = 0

    def embed(stack: nn.Module, ids: Tensor) -> Tensor:
        return stack.embed_tokens.weight[ids] + stack.embed_positions.weight[: ids.shape[1]]

    def stocks(stock: nn.Transformer, ours: UrformForConditionalGeneration) -> Tensor:
        hidden = stock(
            embed(ours.model.encoder, source),
            embed(ours.model.decoder, target),
            tgt_mask=torch.ones(6, 6).triu(1).bool(),
            src_key_padding_mask=source_mask == 0,
            tgt_key_padding_mask=target_mask == 0,
            memory_key_padding_mask=source_mask == 0,
        )
        return hidden @ ours.lm_head.weight.T + ours.lm_head.bias

    have = ours(
        input_ids=source, attention_mask=source_mask, decoder_input_ids=target, decoder_attention_mask=target_mask
    ).logits
    real = target_mask.bool()
    weights = torch.randn_like(have[real])
    double = exact(ours)
    results = []
    for model, out in ((ours, have), (ours, stocks(stock, ours)), (double, stocks(exact(stock), double))):
        table = model.model.encoder.embed_tokens.weight
        results.append((out[real], torch.autograd.grad((out[real] * weights.to(out.dtype)).sum(), table)[0]))
    assert_within(*results)


def keras_encoder(state: dict[str, Tensor], ids: Tensor, mask: Tensor, layers: int, heads: int) -> Tensor:
    """The founding text's model, written out: scaled embeddings, sinusoids, post-norm blocks, output layer."""
    table = state["model.encoder.embed_tokens.weight"]
    length, size = ids.shape[1], table.shape[1]
    positions = torch.zeros(length, size, dtype=torch.float64)
    for place in range(length):
        for i in range(0, size, 2):
            angle = place / 10000 ** (i / size)
            positions[place, i], positions[place, i + 1] = math.sin(angle), math.cos(angle)
    hidden = table[ids] * math.sqrt(size) + positions.to(table.dtype)

    def dense(name: str, x: Tensor) -> Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(name: str, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
        return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]

    for layer in range(layers):
        prefix = f"model.encoder.layers.{layer}"
        q, k, v = (
            dense(f"{prefix}.self_attn.{x}_proj", hidden).unflatten(-1, (heads, -1)).transpose(1, 2) for x in "qkv"
        )
        scores = q @ k.transpose(2, 3) / math.sqrt(size // heads)
        scores = scores.masked_fill(mask[:, None, None] == 0, -math.inf)
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        hidden = norm(f"{prefix}.self_attn_norm", hidden + dense(f"{prefix}.self_attn.o_proj", mixed))
        inner = dense(f"{prefix}.mlp.up_proj", hidden).clamp(min=0)
        hidden = norm(f"{prefix}.mlp_norm", hidden + dense(f"{prefix}.mlp.down_proj", inner))
    return dense("lm_head", hidden)


def test_keras_block() -> None:
    """Padded: as near to float64 as the formulas in float32 are, and to rounding when the model itself is float64."""
    torch.manual_seed(0)
    config = UrformConfig.from_preset("keras-block", **SIZES, num_hidden_layers=3)
    ours = UrformForMaskedLM(config).eval()
    for parameter in ours.parameters():
        nn.init.normal_(parameter, std=0.3)
    ids = torch.randint(3, 53, (3, 11))
    mask = torch.ones_like(ids)
    mask[0, 7:] = mask[2, 3:] = 0
    real = mask.bool()
    reference, want = twice(ours, lambda m: keras_encoder(m.state_dict(), ids, mask, layers=3, heads=4)[real])
    with torch.no_grad():
        have = ours(input_ids=ids, attention_mask=mask).logits
        assert_within(have[real], reference, want)
        torch.testing.assert_close(ours.double()(ids, mask).logits[real], want, rtol=1e-12, atol=1e-12)
