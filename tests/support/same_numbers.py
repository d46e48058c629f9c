"""Record outputs, losses, gradients and generated tokens of seeded models, and compare them bit by bit later.

    python tests/support/same_numbers.py record before.safetensors   # at the commit before a change of the code's shape
    python tests/support/same_numbers.py compare before.safetensors  # after it: prints what differs and how far

Bits depend on the processor: record and compare on one machine.
"""

import sys
from collections.abc import Iterator
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import urform
from urform import UrformConfig

HEADS = {"encoder": "MaskedLM", "decoder": "CausalLM", "encoder-decoder": "ConditionalGeneration"}
AXES: dict[str, dict[str, Any]] = {
    "rope": {},
    "sinusoidal": {"position_encoding": "sinusoidal", "norm_position": "post", "scale_embedding": True},
    "learned": {"position_encoding": "learned", "norm_type": "rmsnorm", "gated_mlp": True, "hidden_act": "silu"},
    "alibi": {"position_encoding": "alibi", "num_key_value_heads": 2, "norm_position": "parallel"},
    "t5": {"position_encoding": "t5", "norm_position": "sandwich", "attention_scale": 1.0},
    "window": {"sliding_window": 3, "layer_types": ["full_attention", "sliding_attention"], "qk_norm": True},
    "none": {"position_encoding": "none", "attention_dropout": 0.1, "norm_offset": 1.0, "norm_type": "rmsnorm"},
}
IMPLEMENTATIONS = (None, "urform", "sdpa", "eager")


def model(architecture: str, axis: str, implementation: str | None) -> Any:
    """Build a small seeded model."""
    torch.manual_seed(0)
    config = UrformConfig(
        architecture=architecture, vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=48, max_position_embeddings=64, **AXES[axis],
    )  # fmt: skip
    made = getattr(urform, f"UrformFor{HEADS[architecture]}")(config)
    if implementation is not None:
        made.set_attn_implementation(implementation)
    return made.eval()


def batches(architecture: str) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield named inputs: no mask, padding on either side and in holes, packed by positions and by lengths, 4D."""
    torch.manual_seed(1)
    ids = torch.randint(3, 50, (3, 9))
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    mask[1, :2] = 0
    labels = torch.randint(3, 50, (3, 7))
    labels[0, 5:] = -100
    both = architecture == "encoder-decoder"
    target = labels if both else ids.masked_fill(mask == 0, -100)
    yield "plain", {"input_ids": ids, "labels": labels if both else ids}
    yield "padded", {"input_ids": ids, "attention_mask": mask, "labels": target}
    sizes, target_sizes = (4, 3, 2), (2, 1, 4)
    row = ids.flatten()[None, :9]
    places = torch.cat([torch.arange(n) for n in sizes])[None]
    packed: dict[str, Tensor] = {"input_ids": row, "position_ids": places, "labels": row}
    if both:
        packed["labels"] = labels[1:2]
        packed["decoder_position_ids"] = torch.cat([torch.arange(n) for n in target_sizes])[None]
    elif architecture == "decoder":  # a document's first token is no target
        packed["labels"] = row.masked_fill(places == 0, -100)
    yield "positions", packed
    starts = torch.tensor([0, *sizes]).cumsum(0).int()
    lengths = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": 4, "max_length_k": 4}
    if both:
        lengths["cu_seq_lens_q"] = torch.tensor([0, *target_sizes]).cumsum(0).int()
    without = {key: value for key, value in packed.items() if "position" not in key}
    yield "lengths", {**without, **lengths}


def records() -> Iterator[tuple[str, Tensor]]:
    """Yield every number by its name."""
    for architecture in HEADS:
        for axis in AXES:
            for implementation in IMPLEMENTATIONS:
                made = model(architecture, axis, implementation)
                for name, batch in batches(architecture):
                    yield from steps(f"{architecture}/{axis}/{implementation}/{name}", made, batch)
                if architecture != "encoder":
                    yield from texts(f"{architecture}/{axis}/{implementation}", made)


def steps(name: str, made: Any, batch: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Yield logits, states, the loss of a training step and every gradient."""
    made.eval()
    with torch.no_grad():
        outputs = made(**batch)
        yield f"{name}/logits", outputs.logits
        yield f"{name}/loss", outputs.loss
        base = {k: v for k, v in batch.items() if k != "labels"}
        if made.config.is_encoder_decoder:
            base["decoder_input_ids"] = batch["labels"].clamp(min=0)
        yield f"{name}/states", made.model(**base).last_hidden_state
        if "cu_seq_lens_q" not in batch:
            every = made(**batch, output_hidden_states=True)
            states = every.decoder_hidden_states if made.config.is_encoder_decoder else every.hidden_states
            yield f"{name}/layers", torch.stack([x.contiguous() for x in states])
    made.train()
    made.zero_grad()
    torch.manual_seed(2)
    loss = made(**batch).loss
    loss.backward()
    yield f"{name}/train", loss.detach()
    for key, parameter in made.named_parameters():
        if parameter.grad is not None:
            yield f"{name}/grad/{key}", parameter.grad


def texts(name: str, made: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield generated tokens: greedy, beams, without a cache, with a static one."""
    made.eval()
    _, batch = list(batches(made.config.architecture))[1]
    given = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    if made.config.architecture == "decoder":
        given = {key: value[1:] for key, value in given.items()}
    for how, options in {
        "greedy": {}, "beams": {"num_beams": 3}, "no-cache": {"use_cache": False},
        "static": {"cache_implementation": "static", "disable_compile": True},
    }.items():  # fmt: skip
        options = {"max_new_tokens": 6, "do_sample": False, **options}
        yield f"{name}/{how}", made.generate(**given, **options)


def main() -> None:
    """Record or compare."""
    torch.set_num_threads(1)
    what, path = sys.argv[1:]
    if what == "record":
        save_file({name: value.detach().clone().contiguous() for name, value in records()}, path)
        return
    before, differ, count = load_file(path), [], 0
    for name, value in records():
        count += 1
        known = before.pop(name, None)
        if known is None or not torch.equal(known, value):
            far = "new" if known is None or known.shape != value.shape else f"{(known - value).abs().max():.3g}"
            differ.append(f"{name}: {far}")
    print("\n".join([*differ[:200], *(f"{name}: gone" for name in before)]))
    print(f"{count} tensors compared, {len(differ)} differ, {len(before)} are gone")
    sys.exit(bool(differ or before))


if __name__ == "__main__":
    main()
