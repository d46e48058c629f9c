# Copyright 2026 The Urform authors. Licensed under the Apache License, Version 2.0.
"""Conversion of checkpoints, tensor by tensor: folders and Hub ids of safetensors, both ways.

No model is ever in memory. The tensors of one rule are read and converted, then those of the next, and a file of the
target is written as soon as its tensors are there. So memory holds one file of the source and one of the target. The
target folder appears when it is complete, or not at all.
"""

import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download, split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedConfig, PreTrainedModel

from ..configuration.checkpoint_files import INDEX_NAME, read_json, refuse_link
from ..configuration.checks_urform import LARGEST, check_architectures
from ..configuration.configuration_urform import UrformConfig
from ..publishing.checkpoint_source import need_source
from ..publishing.weight_files import WeightFiles, weight_files
from .engine import Conversion, assemble, our_class, prepare_from, prepare_to, stock_class
from .families import FAMILIES
from .family import Head
from .tensors import Side, reader, run_step

_CARRIED = ["*.json", "*.txt", "*.model", "*.jinja", "*.spm", "*.tiktoken", "LICENSE*", "NOTICE*"]
_NOT_CARRIED = ("config.json", "*.index.json", "requirements.txt", "generation_config.json", "adapter_config.json")
_LAYERS = set("num_hidden_layers n_layer n_layers num_layers num_decoder_layers encoder_layers decoder_layers".split())
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}  # names of safetensors
_LARGEST_FILE = 5 * 10**9  # bytes, as in huggingface_hub: a file is in memory until it is written


# ------------------------------------------------------------------------------------------------------------ reading


def find_folder(source: str | os.PathLike[str], **hub: Any) -> Path:
    """Return the folder of a checkpoint: itself, or the cached files of a Hub id (safetensors, small files, no code).

    Args:
        source: Folder, or id on the Hub.
        **hub: For `huggingface_hub.snapshot_download`: `revision`, `token`, `cache_dir`, `local_files_only`.

    Raises:
        NoSuchSourceError: Neither a folder nor an id (a FileNotFoundError and a ValueError).
        ValueError: No checkpoint in it.
    """
    folder = Path(source)
    need_source(source, **hub)
    if not folder.is_dir():
        folder = Path(snapshot_download(str(source), allow_patterns=_CARRIED, ignore_patterns=["*/*"], **hub))
        names = [path.name for path in weight_files(folder)]
        folder = Path(snapshot_download(str(source), allow_patterns=names, **hub))
    if not (folder / "config.json").is_file():
        adapter = " but an adapter: merge it into its model first" if (folder / "adapter_config.json").is_file() else ""
        raise ValueError(f"{source} has no config.json{adapter}; give a folder with a whole checkpoint")
    return folder


class Shards(Mapping[str, Tensor]):
    """The tensors of a checkpoint's folder, by the names of a class.

    Args:
        folder: With `model.safetensors`, or with an index and its shards.

    Raises:
        ValueError: There are none, one is missing or damaged, or all there is would be unpickled.
    """

    def __init__(self, folder: Path):
        paths = weight_files(folder)
        missing = [path.name for path in paths if not path.is_file()]
        if missing:
            pickled = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".ckpt"))
            hint = f"; {', '.join(pickled)} would be unpickled: save them as safetensors first" if pickled else ""
            raise ValueError(f"{folder} has no {', '.join(missing)}{hint}")
        self._stored = WeightFiles(paths)
        self._stored_name = {name: name for name in self._stored}

    def rename(self, side: Side, head: Head | None = None) -> None:
        """Let the tensors go by the names of a class.

        The names in a backbone's checkpoint differ from those of a class with a head by a prefix, and old checkpoints
        say gamma and beta.
        """
        renamed = {}
        for name, stored in self._stored_name.items():
            new = name if head is None else head.renamed.get(name, name)
            new = new.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
            known = [n for n in (new, side.prefix + new, new.removeprefix(side.prefix)) if n in side.shapes]
            renamed[known[0] if known else name] = stored
        self._stored_name = renamed

    def first_file(self, names: tuple[str, ...]) -> int:
        """Return the number of the first file that holds one of these tensors; -1 if none does."""
        files = [self._stored.entries[self._stored_name[name]].file for name in names if name in self]
        return min(map(self._stored.files.index, files), default=-1)

    def largest_file(self) -> int:
        """Return the size of the largest file in bytes."""
        return max(path.stat().st_size for path in self._stored.files)

    def dtype(self, name: str) -> str:
        """Return a tensor's dtype as safetensors calls it: `BF16`."""
        return self._stored.entries[self._stored_name[name]].dtype

    def main_dtype(self) -> str:
        """Return the dtype of the first tensor, which stands for the checkpoint's."""
        return self.dtype(next(iter(self)))

    def __getitem__(self, name: str) -> Tensor:
        return self._stored[self._stored_name[name]]

    def __contains__(self, name: object) -> bool:
        return name in self._stored_name

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored_name)

    def __len__(self) -> int:
        return len(self._stored_name)


def _config(folder: Path) -> tuple[PreTrainedConfig, str]:
    """Return the config of a checkpoint and the name of its class."""
    fields = read_json(folder / "config.json")
    check_architectures(fields.get("architectures"))
    for name in _LAYERS & fields.keys():  # before the library makes lists of that length
        if isinstance(fields[name], int) and fields[name] > LARGEST["num_hidden_layers"]:
            raise ValueError(
                f"{folder / 'config.json'}: {name}={fields[name]} is more than {LARGEST['num_hidden_layers']}"
            )
    model_type = fields.get("model_type")
    if model_type != UrformConfig.model_type and model_type not in FAMILIES:
        raise ValueError(
            f"{folder} is of model_type={model_type!r}, no family that Urform converts; there are: "
            f"{', '.join(sorted(FAMILIES))}"
        )
    loader = UrformConfig if model_type == UrformConfig.model_type else AutoConfig
    config = loader.from_pretrained(folder)
    if not config.architectures:
        raise ValueError(f'{folder / "config.json"} names no architectures; add the class, e.g. ["LlamaForCausalLM"]')
    return config, config.architectures[0]


def _prepare(folder: Path, family: str | None) -> tuple[Conversion, Shards, bool]:
    """Return what to do with a checkpoint, its tensors, and whether it goes from Urform to a family."""
    config, name = _config(folder)
    shards = Shards(folder)
    if not isinstance(config, UrformConfig):
        if family is not None:
            raise ValueError(
                f"family={family!r} is for a checkpoint of Urform; {folder} is a {config.model_type}: convert it "
                "to Urform first (without a family)"
            )
        return prepare_from(config, name, shards, shards.rename), shards, False
    conversion = prepare_to(config, name, family)
    shards.rename(conversion.source)
    return conversion, shards, True


def load_stock(
    source: str | os.PathLike[str], *, dtype: torch.dtype | str | None = None, **hub: Any
) -> PreTrainedModel:
    """Return the Urform model of a stock checkpoint, in eval mode.

    Args:
        source: Folder, or id on the Hub.
        dtype: Of the weights. None: as stored.
        **hub: See `find_folder`.
    """
    folder = find_folder(source, **hub)
    conversion, shards, back = _prepare(folder, None)
    if back:
        raise ValueError(f"{source} is a checkpoint of Urform already; load it with from_pretrained")
    stored = _DTYPES[shards.main_dtype()]
    wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    model = assemble(conversion, shards, wanted or stored, back=False, cast=wanted is not None)
    model.config._name_or_path = str(source)
    if model.can_generate():
        model.generation_config = _generation_config(folder)
    return model.eval()


def _generation_config(folder: Path) -> GenerationConfig:
    """Return it as transformers does: from its own file, else from the model's config (BART's checkpoints)."""
    try:
        return GenerationConfig.from_pretrained(folder)
    except OSError:
        return GenerationConfig.from_pretrained(folder, config_file_name="config.json", _from_model_config=True)


# ------------------------------------------------------------------------------------------------------------ writing


def _saved_names(conversion: Conversion, back: bool) -> dict[str, str]:
    """Return {target of a step: its name in the file}, in the order of the steps. Of tied tensors one is saved."""
    renamed = {new: stored for stored, new in conversion.head.renamed.items()} if back else {}
    first: dict[str, str] = {}  # of the targets with one name in the file
    for name in (name for step in conversion.steps for name in step.targets):
        saved = conversion.target.saved.get(name, name)
        if saved is not None:
            first.setdefault(renamed.get(saved, saved), name)
    return {name: saved for saved, name in first.items()}


def _targets(conversion: Conversion, shards: Shards) -> dict[str, Tensor]:
    """Return every tensor that the steps make, on the meta device: shapes and dtypes are known before it is made.

    Raises:
        ValueError: The checkpoint lacks a tensor, or several that become one differ in dtype.
    """
    tied = conversion.source.tied
    missing = [name for step in conversion.steps for name in step.sources if not any(n in shards for n in tied[name])]
    if missing:
        raise ValueError(f"the checkpoint lacks {', '.join(missing)}; it is incomplete or of another class")
    targets = {}
    for step in conversion.steps:
        read = [next(twin for twin in (name, *tied[name]) if twin in shards) for name in step.sources]
        dtype = _common_dtype(read, shards)
        for name, shape in zip(step.targets, step.shapes, strict=True):
            targets[name] = torch.empty(shape, dtype=dtype, device="meta")
    return targets


def _common_dtype(names: list[str], shards: Shards) -> torch.dtype:
    """Return the dtype of tensors that are read together; the checkpoint's for none."""
    dtypes = {shards.dtype(name) for name in names} or {shards.main_dtype()}
    if len(dtypes) > 1 or not dtypes <= _DTYPES.keys():
        raise ValueError(f"{', '.join(names)} are stored as {', '.join(sorted(dtypes))}; cast them to one dtype")
    return _DTYPES[dtypes.pop()]


def _write_weights(conversion: Conversion, shards: Shards, folder: Path, back: bool) -> None:
    """Write the target's tensors while the source's are read, a rule at a time. A file is written when it is whole."""
    steps = sorted(conversion.steps, key=lambda step: shards.first_file(step.sources))
    conversion = conversion._replace(steps=steps)
    targets, names = _targets(conversion, shards), _saved_names(conversion, back)
    split = split_torch_state_dict_into_shards(
        {saved: targets[name] for name, saved in names.items()},
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=min(shards.largest_file(), _LARGEST_FILE),
    )
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    incomplete: dict[str, dict[str, Tensor]] = {}
    for name, tensor in _made(conversion, shards):
        if name not in names:
            continue
        file = split.tensor_to_filename[names[name]]
        tensors = incomplete.setdefault(file, {})
        tensors[names[name]] = tensor.to(targets[name].dtype).contiguous()
        if len(tensors) == len(split.filename_to_tensors[file]):
            save_file(incomplete.pop(file), folder / file, metadata={"format": "pt"})


def _made(conversion: Conversion, shards: Shards) -> Iterator[tuple[str, Tensor]]:
    read = reader(shards, conversion.source)
    for step in conversion.steps:
        yield from run_step(step, read, conversion.ours)


def _carry_files(source: Path, target: Path) -> None:
    """Copy tokenizer, chat template and licence; name the tokenizer's class where only the model type said it."""
    for path in sorted(source.iterdir()):
        if path.is_file() and any(path.match(p) for p in _CARRIED) and not any(path.match(p) for p in _NOT_CARRIED):
            refuse_link(source, path)  # the target may be published
            shutil.copyfile(path, target / path.name)
    path = target / "tokenizer_config.json"
    settings = read_json(path) if path.is_file() else {}
    if not settings and not (target / "tokenizer.json").is_file():
        return
    found = type(AutoTokenizer.from_pretrained(source))
    settings.pop("auto_map", None)  # Urform's own: its code is not in a stock checkpoint
    settings["tokenizer_class"] = (
        found.__name__ if found.__module__.startswith("transformers.") else "TokenizersBackend"
    )
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def convert_checkpoint(
    source: str | os.PathLike[str], target: str | os.PathLike[str], family: str | None = None, **hub: Any
) -> Path:
    """Convert a checkpoint of a stock class to Urform, or one of Urform to a stock class. Return the target.

    Args:
        source: Folder, or id on the Hub; safetensors, one file or many.
        target: Folder to make; it may exist if it is empty.
        family: For a source of Urform: the `model_type` to convert to. None: where it comes from, else the first that
            can express it.
        **hub: See `find_folder`.

    Raises:
        ValueError: No such family or class; a config that cannot be expressed, with the fields that stand in the way;
            weights that are missing, pickled or of no known dtype; a target that is not empty.
    """
    target = Path(target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} exists and is not empty; remove it or name another folder")
    folder = find_folder(source, **hub)
    conversion, shards, back = _prepare(folder, family)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    temporary.mkdir(parents=True)
    try:
        head, config = conversion.head, conversion.stock if back else conversion.ours
        model_class = stock_class(head) if back else our_class(head)
        _write_weights(conversion, shards, temporary, back)
        config.architectures = [model_class.__name__]
        config.dtype = _DTYPES[shards.main_dtype()]
        config.save_pretrained(temporary)
        if model_class.can_generate():
            _generation_config(folder).save_pretrained(temporary)
        _carry_files(folder, temporary)
        for path in temporary.glob("*.safetensors"):  # safetensors writes files that only their owner can read
            shutil.copymode(temporary / "config.json", path)
        os.replace(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return target
