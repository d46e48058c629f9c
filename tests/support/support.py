"""Build what most tests of the model need: seeded tiny models, padded and packed batches, gradients."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import urform
from urform import UrformConfig

# The language-modeling head of every architecture.
HEADS = {
    "encoder": "UrformForMaskedLM",
    "decoder": "UrformForCausalLM",
    "encoder-decoder": "UrformForConditionalGeneration",
}
POSITIONS = ("rope", "sinusoidal", "learned", "alibi", "t5", "none")
WINDOW = {"sliding_window": 3, "layer_types": ["sliding_attention", "full_attention"]}
# Weights so far from zero that chance decides no argmax.
WIDE = {"intermediate_size": 37, "max_position_embeddings": 64, "initializer_range": 0.3}


def make(
    architecture: str,
    head: str | type[PreTrainedModel] | None = None,
    implementation: str | None = None,
    spread: float | None = None,
    **fields: Any,
) -> Any:
    """Build a tiny model in eval mode; the same arguments always give the same weights.

    Args:
        architecture: One of `HEADS`.
        head: A class of ours or its name. None: the architecture's language model.
        implementation: Name of an attention implementation. None: none is named.
        spread: Standard deviation that all parameters are drawn with, biases and norms too. None: the config's init.
        **fields: Fields of the config in place of those of the preset `tiny-*`.
    """
    torch.manual_seed(0)
    config = UrformConfig.from_preset(f"tiny-{architecture}", **fields)
    if implementation is not None:
        config._attn_implementation = implementation
    name = head or HEADS[architecture]
    cls: Any = getattr(urform, name) if isinstance(name, str) else name
    model = cls(config).eval()
    if spread is not None:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0.0, spread)
    return model


def gradients(model: nn.Module, loss: Tensor | None = None) -> dict[str, Tensor]:
    """Return a copy of every gradient by its parameter's name; with `loss`, the gradients of that loss alone."""
    if loss is not None:
        model.zero_grad()
        loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def mask_of(lengths: tuple[int, ...], side: str, longest: int) -> Tensor:
    """Return the `[B, longest]` mask of rows with `lengths` real tokens, padded on the `right` or on the `left`."""
    columns = torch.arange(longest)
    lengths_B1 = torch.tensor(lengths)[:, None]
    return (columns < lengths_B1 if side == "right" else columns >= longest - lengths_B1).long()


def batch(
    architecture: str, sides: tuple[str, str] = ("right", "left"), lengths: tuple[int, ...] = (7, 2, 0, 9)
) -> dict[str, Tensor]:
    """Build a padded batch with a fully padded row; an encoder has labels at every other token, others at all.

    Args:
        architecture: One of `HEADS`.
        sides: Where the source and where the target is padded.
        lengths: Real tokens of each row. A target's rows have two fewer, in reverse order.
    """
    generator = torch.Generator().manual_seed(1)

    def side(lengths: tuple[int, ...], where: str) -> tuple[Tensor, Tensor]:
        mask = mask_of(lengths, where, max(lengths) + 1)
        return torch.randint(3, 99, mask.shape, generator=generator), mask

    ids, mask = side(lengths, sides[0])
    inputs = {"input_ids": ids, "attention_mask": mask}
    if architecture == "encoder-decoder":
        ids, mask = side(tuple(max(0, n - 2) for n in reversed(lengths)), sides[1])
        inputs |= {"decoder_input_ids": ids, "decoder_attention_mask": mask}
    labels = torch.randint(3, 99, mask.shape, generator=generator).masked_fill(mask == 0, -100)
    if architecture == "encoder":
        labels[:, ::2] = -100
    return {**inputs, "labels": labels}


def documents(lengths: tuple[int, ...], seed: int) -> list[Tensor]:
    """Return random token ids, one tensor for each length."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 99, (n,), generator=generator) for n in lengths]


def pad(rows: list[Tensor], side: str, longest: int | None = None) -> tuple[Tensor, Tensor]:
    """Pad rows to `[B, longest]` with a token that would change the result if it were seen; return ids and mask."""
    longest = longest or max(map(len, rows))
    mask = mask_of(tuple(map(len, rows)), side, longest)
    return torch.full(mask.shape, 7).masked_scatter(mask.bool(), torch.cat(rows)), mask


def pack(rows: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Lay rows one after the other; return ids `[1, N]`, position ids `[1, N]` and cumulative lengths `[B + 1]`."""
    lengths = torch.tensor([len(row) for row in rows])
    position_ids = torch.cat([torch.arange(n) for n in lengths.tolist()])
    cu_seqlens = nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    return torch.cat(rows)[None], position_ids[None], cu_seqlens
