"""What a checkpoint must be before it is published: `check_checkpoint` refuses with a ValueError that says why.

Nothing of a checkpoint is executed: weights are read from safetensors one tensor at a time, a pickle is an error, and
the model that they must fit is built without memory on PyTorch's meta device.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from ..configuration.checkpoint_files import read_json, read_weight_map, refuse_links
from ..configuration.heads_urform import HEADS
from .bundle_stamp import bundle_files
from .secret_patterns import find_secret
from .weight_files import WEIGHTS_NAME, WeightFiles

_PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz"}
# What Trainer leaves in the folder of a model: not part of the model, not published, and pickled for the most part.
_TRAINER_STATE = ("training_args.bin", "optimizer.", "scheduler.pt", "scaler.pt", "rng_state")
_INDEX = re.compile(r"model\.safetensors\.index(?:\.([^/.]+))?\.json")
_WEIGHTS = re.compile(r"model(?:\.([^/.]+))?\.safetensors")


def check_checkpoint(checkpoint: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the checkpoint's config as a dict.

    Args:
        checkpoint: the folder that `save_pretrained` or Trainer wrote.

    Raises:
        ValueError: something is missing, damaged, not finite, inconsistent, pickled, secret or a link that leads out
            of the folder; the message names it.
    """
    folder = Path(checkpoint)
    refuse_links(folder)
    config = _read_config(folder)
    _refuse_pickles(folder)
    refuse_secrets(folder, [*bundle_files(folder), "README.md", "trainer_state.json", "training_args.json"])
    sets = _weight_sets(folder)
    expected, tied, parsed = _expected(config, folder)
    for variant, shards in sets.items():
        _check_weights(folder, variant, shards, expected, tied)
    _check_ids(folder, parsed)
    return config


def _read_config(folder: Path) -> dict[str, Any]:
    if not (folder / "config.json").is_file():
        hint = (
            " It holds an adapter: merge it into its model first." if (folder / "adapter_config.json").is_file() else ""
        )
        raise ValueError(f"{folder} has no config.json; give the folder that save_pretrained or Trainer wrote.{hint}")
    config = read_json(folder / "config.json")
    if config.get("model_type") != "urform":
        raise ValueError(f"{folder}/config.json has model_type={config.get('model_type')!r}; only 'urform' is served.")
    known, named = [name for name, _ in HEADS.values()], config.get("architectures")
    if not isinstance(named, list) or not named or not all(isinstance(name, str) for name in named):
        raise ValueError(
            f"{folder}/config.json has architectures={_short(named)}; it must be a list with the name of the model's "
            f'class, such as ["{known[0]}"]. Save the checkpoint again.'
        )
    if named[0] not in known:
        raise ValueError(
            f"{folder}/config.json has architectures={_short(named)}, which is no class of Urform "
            f"({', '.join(known)}); a class of your own is published with its register_for_auto_class and push_to_hub."
        )
    if config.get("quantization_config"):
        raise ValueError(f"{folder} is quantized; publish the weights that it was made from, and quantize at loading.")
    return config


def _refuse_pickles(folder: Path) -> None:
    pickles = [
        p.name for p in sorted(folder.iterdir()) if p.suffix in _PICKLES and not p.name.startswith(_TRAINER_STATE)
    ]
    if pickles:
        raise ValueError(
            f"{folder} holds pickled files, which may run code when loaded: {', '.join(pickles)}. Remove them."
        )


def refuse_secrets(folder: Path, names: list[str]) -> None:
    """Raise a ValueError if one of the text files named has a password or token in it; the secret is not repeated."""
    from huggingface_hub import get_token

    own = get_token()
    for name in names:
        path = folder / name
        if not path.is_file():
            continue
        # Of weights, the header: its metadata is free text.
        text = _header(path) if name.endswith(".safetensors") else path.read_text(encoding="utf-8", errors="replace")
        if found := find_secret(text, own):
            what, line = found
            raise ValueError(f"{path}:{line}: what looks like {what} would be published. Remove it, and revoke it.")


def _header(path: Path) -> str:
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        return file.read(min(size, 100_000_000)).decode("utf-8", errors="replace")


def _weight_sets(folder: Path) -> dict[str, list[str]]:
    """Return the shards of every variant ("" is the one that loads by default)."""
    sets: dict[str, list[str]] = {}
    for path in sorted(folder.iterdir()):
        if match := _INDEX.fullmatch(path.name):
            sets[match[1] or ""] = sorted(set(read_weight_map(path).values()))
        elif match := _WEIGHTS.fullmatch(path.name):
            sets.setdefault(match[1] or "", [path.name])
    if "" not in sets:
        sets[""] = [WEIGHTS_NAME]
    missing = sorted({name for shards in sets.values() for name in shards if not (folder / name).is_file()})
    if missing:
        raise ValueError(f"{folder} lacks {', '.join(missing)}; save the model again with save_pretrained.")
    return sets


def _expected(config: dict[str, Any], folder: Path) -> tuple[dict[str, Any], dict[str, str], Any]:
    """Return the shape of every weight of the model, its tied weights (target to source) and its config."""
    import torch

    from ..configuration.configuration_urform import UrformConfig
    from ..modeling import modeling_urform

    try:
        with torch.device("meta"):
            model = getattr(modeling_urform, config["architectures"][0])(UrformConfig.from_pretrained(folder))
    except Exception as error:  # of many kinds: huggingface_hub's validation has its own
        raise ValueError(f"{folder}/config.json describes no model ({type(error).__name__}: {error}).") from error
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    return shapes, dict(model.all_tied_weights_keys), model.config


def _check_weights(
    folder: Path, variant: str, shards: list[str], expected: dict[str, Any], tied: dict[str, str]
) -> None:
    """Check the shards of a variant against the `expected` shapes and the `tied` weights (target to source)."""
    where, shapes = _check_values(folder, shards, tied)
    alike = {name: {name} for name in expected}
    for target, source in tied.items():  # of tied weights, one is enough
        alike[target] = alike[source] = alike.get(target, {target}) | alike.get(source, {source})
    missing = sorted(name for name in expected if not alike[name] & where.keys())
    if missing:
        raise ValueError(f"{folder} lacks the weights {_some(missing)}; save the model again with save_pretrained.")
    if unexpected := sorted(where.keys() - expected.keys()):
        raise ValueError(
            f"{folder} has weights that the model has not: {_some(unexpected)}; config or weights are wrong."
        )
    for name, shape in shapes.items():
        if shape != expected[name]:
            raise ValueError(
                f"{folder}/{where[name]}: {name} has shape {shape}, and the config wants {expected[name]}."
            )
    index = folder / f"model.safetensors.index{'.' if variant else ''}{variant}.json"
    if index.is_file():
        weight_map = read_weight_map(index)
        wrong = sorted(n for n in weight_map.keys() | where.keys() if weight_map.get(n) != where.get(n))
        if wrong:
            raise ValueError(f"{index} and the shards disagree about {_some(wrong)}; save the model again.")


def _check_values(
    folder: Path, shards: list[str], tied: dict[str, str]
) -> tuple[dict[str, str], dict[str, tuple[int, ...]]]:
    """Check that every value is finite and tied weights are equal; return each weight's shard and shape."""
    import torch

    where: dict[str, str] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    shared: dict[str, Any] = {}
    wanted = {*tied, *tied.values()}
    for shard in shards:
        for name, tensor in WeightFiles([folder / shard]).items():
            if name in where:
                raise ValueError(f"{folder}: {name} is in {where[name]} and in {shard}; save the model again.")
            where[name], shapes[name] = shard, tuple(tensor.shape)
            _check_finite(tensor, name, folder / shard)
            if name in wanted:
                shared[name] = tensor
    for target, source in tied.items():
        if target in shared and source in shared and not torch.equal(shared[target], shared[source]):
            raise ValueError(
                f"{folder}: {target} and {source} differ, but the config ties them; save the model again, or set "
                "tie_word_embeddings=False."
            )
    return where, shapes


def _check_finite(tensor: Any, name: str, path: Path) -> None:
    import torch

    # Eight-bit floats have no isfinite.
    values = tensor.float() if tensor.is_floating_point() and tensor.element_size() == 1 else tensor
    finite = torch.isfinite(values)
    if not finite.all():
        raise ValueError(f"{path}: {name} has {int((~finite).sum())} values that are not finite; it is not published.")


def _check_ids(folder: Path, parsed: Any) -> None:
    """Refuse a tokenizer or generation settings with tokens that the model does not have."""
    if has_tokenizer(folder):
        _check_tokenizer(folder, parsed)
    for file in ("config", "generation_config"):
        if not (folder / f"{file}.json").is_file():
            continue
        for name, value in read_json(folder / f"{file}.json").items():
            if name.endswith("_token_id"):
                for one in value if isinstance(value, list) else [value]:
                    _check_id(folder, f"{file}.{name}", value, one, parsed.vocab_size)


def _check_id(folder: Path, name: str, value: Any, one: Any, vocab_size: int) -> None:
    """Check `one` id of the field `name`, whose `value` may be a list of several."""
    if one is None:
        return
    if not isinstance(one, int):
        raise ValueError(f"{folder}: {name}={_short(value)} is no token id; save the checkpoint again.")
    if not 0 <= one < vocab_size:
        raise ValueError(f"{folder}: {name}={one} is outside of the vocabulary of {vocab_size} tokens.")


def _check_tokenizer(folder: Path, parsed: Any) -> None:
    """Refuse a tokenizer with more tokens than the model, or with other special tokens."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # of many kinds: tokenizers raises Exception itself
        raise ValueError(f"{folder}: the tokenizer cannot be loaded ({type(error).__name__}: {error}).") from error
    largest, token = max((id, token) for token, id in tokenizer.get_vocab().items())
    if largest >= parsed.vocab_size:
        raise ValueError(
            f"{folder}: the tokenizer has {len(tokenizer)} tokens ({token!r} is number {largest}) and the model "
            f"vocab_size={parsed.vocab_size}; publish the tokenizer that it was trained with, or "
            "resize_token_embeddings."
        )
    for role in ("pad_token_id", "eos_token_id"):
        theirs, ours = getattr(tokenizer, role), getattr(parsed, role)
        if theirs is not None and ours is not None and theirs not in (ours if isinstance(ours, list) else [ours]):
            raise ValueError(
                f"{folder}: {role} is {theirs} in the tokenizer and {ours} in config.json; make them the same."
            )


def has_tokenizer(folder: Path) -> bool:
    """Return whether a folder holds a tokenizer."""
    return (folder / "tokenizer_config.json").is_file() or (folder / "tokenizer.json").is_file()


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}…"


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
