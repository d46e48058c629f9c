# Copyright 2026 The Urform authors. Licensed under the Apache License, Version 2.0.
"""Conversion of checkpoints, tensor by tensor: folders and Hub ids of safetensors, both ways.

No model is ever in memory: the tensors of one rule are read, turned and written, then those of the next. The target
folder appears when it is complete, or not at all.
"""

import json
import math
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedConfig, PreTrainedModel

from ..configuration.checkpoint_files import INDEX_NAME, read_json, read_weight_map, refuse_link
from ..configuration.checks_urform import LARGEST, check_architectures
from ..configuration.configuration_urform import UrformConfig
from ..publishing.checkpoint_source import need_source
from .convert import Conversion, assemble, our_class, prepare_from, prepare_to, stock_class
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


# ------------------------------------------------------------------------------------------------------------ reading


def find_folder(source: str | os.PathLike, **hub: Any) -> Path:
    """The folder of a checkpoint: itself, or the cached files of a Hub id (safetensors and small files, no code).

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
        files = _weight_files(folder)
        folder = Path(snapshot_download(str(source), allow_patterns=files, **hub))
    if not (folder / "config.json").is_file():
        adapter = " but an adapter: merge it into its model first" if (folder / "adapter_config.json").is_file() else ""
        raise ValueError(f"{source} has no config.json{adapter}; give a folder with a whole checkpoint")
    return folder


def _weight_files(folder: Path) -> list[str]:
    index = folder / INDEX_NAME
    if not index.is_file():
        return ["model.safetensors"]
    return sorted(set(read_weight_map(index).values()))


class Shards(Mapping[str, Tensor]):
    """The tensors of a folder's safetensors, read when asked for, one file open at a time.

    Args:
        folder: With `model.safetensors`, or with an index and its shards.

    Raises:
        ValueError: There are none, one is missing, or all there is would be unpickled.
    """

    def __init__(self, folder: Path):
        names = _weight_files(folder)
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            pickled = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".ckpt"))
            hint = f"; {', '.join(pickled)} would be unpickled: save them as safetensors first" if pickled else ""
            raise ValueError(f"{folder} has no {', '.join(missing)}{hint}")
        self.files = [folder / name for name in names]
        self._open: tuple[Path | None, Any] = (None, None)
        self._places = {name: (path, name) for path in self.files for name in self._handle(path).keys()}

    def _handle(self, path: Path) -> Any:
        if self._open[0] != path:
            self._open = (path, safe_open(path, framework="pt"))
        return self._open[1]

    def rename(self, side: Side, head: Head | None = None) -> None:
        """Read the tensors by the names of a class.

        A backbone's checkpoint differs from that of a class with a head by its prefix; old ones say gamma and beta.
        """
        places = {}
        for name, place in self._places.items():
            now = name if head is None else head.renamed.get(name, name)
            now = now.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
            known = [n for n in (now, side.prefix + now, now.removeprefix(side.prefix)) if n in side.shapes]
            places[known[0] if known else name] = place
        self._places = places

    def order(self, names: tuple[str, ...]) -> int:
        """The number of the file in which the first of these is."""
        return min((self.files.index(self._places[name][0]) for name in names if name in self._places), default=-1)

    def dtype(self, name: str) -> str:
        """As safetensors call it: `BF16`."""
        path, stored = self._places[name]
        return self._handle(path).get_slice(stored).get_dtype()

    def __getitem__(self, name: str) -> Tensor:
        path, stored = self._places[name]
        return self._handle(path).get_tensor(stored)

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def _config(folder: Path) -> tuple[PreTrainedConfig, str]:
    """The config of a checkpoint and the class that it is of."""
    given = read_json(folder / "config.json")
    check_architectures(given.get("architectures"))
    for name in _LAYERS & given.keys():  # before the library makes lists of that length
        if isinstance(given[name], int) and given[name] > LARGEST["num_hidden_layers"]:
            raise ValueError(
                f"{folder / 'config.json'}: {name}={given[name]} is more than {LARGEST['num_hidden_layers']}"
            )
    model_type = given.get("model_type")
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
    """What to do with a checkpoint, its tensors, and whether it is the way from Urform to a family."""
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


def load_stock(source: str | os.PathLike, *, dtype: torch.dtype | str | None = None, **hub: Any) -> PreTrainedModel:
    """The Urform model of a stock checkpoint, in eval mode.

    Args:
        source: Folder, or id on the Hub.
        dtype: Of the weights. None: as stored.
        **hub: See `find_folder`.
    """
    folder = find_folder(source, **hub)
    conversion, shards, back = _prepare(folder, None)
    if back:
        raise ValueError(f"{source} is a checkpoint of Urform already; load it with from_pretrained")
    stored = _DTYPES[shards.dtype(next(iter(shards)))]
    wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    model = assemble(conversion, shards, wanted or stored, back=False, cast=wanted is not None)
    model.config._name_or_path = str(source)
    if model.can_generate():
        model.generation_config = _generation_config(folder)
    return model.eval()


def _generation_config(folder: Path) -> GenerationConfig:
    """As transformers finds it: in its own file, else in the model's config (BART's checkpoints)."""
    try:
        return GenerationConfig.from_pretrained(folder)
    except OSError:
        return GenerationConfig.from_pretrained(folder, config_file_name="config.json", _from_model_config=True)


# ------------------------------------------------------------------------------------------------------------ writing


class _Entry(NamedTuple):
    """A tensor of the target, known before it is made."""

    name: str
    dtype: str
    shape: torch.Size

    @property
    def size(self) -> int:
        return math.prod(self.shape) * _DTYPES[self.dtype].itemsize


def _entries(conversion: Conversion, shards: Shards, back: bool) -> dict[str, _Entry]:
    """Every tensor that the steps make and that is saved, by name, in their order."""
    tied, names = conversion.source.tied, {now: stored for stored, now in conversion.head.renamed.items() if back}
    entries: dict[str, _Entry] = {}
    taken: set[str] = set()
    usual = shards.dtype(next(iter(shards)))
    missing = [name for step in conversion.steps for name in step.sources if not any(n in shards for n in tied[name])]
    if missing:
        raise ValueError(f"the checkpoint lacks {', '.join(missing)}; it is incomplete or of another class")
    for step in conversion.steps:
        read = [next(twin for twin in (name, *tied[name]) if twin in shards) for name in step.sources]
        dtypes = {shards.dtype(name) for name in read} or {usual}
        if len(dtypes) > 1 or not dtypes <= _DTYPES.keys():
            raise ValueError(f"{', '.join(read)} are stored as {', '.join(sorted(dtypes))}; cast them to one dtype")
        for name, shape in zip(step.targets, step.shapes, strict=True):
            saved = conversion.target.saved.get(name, name)
            saved = names.get(saved, saved)
            if saved is not None and saved not in taken:
                entries[name] = _Entry(saved, min(dtypes), shape)
                taken.add(saved)
    return entries


def _files(entries: dict[str, _Entry], limit: int) -> list[dict[str, _Entry]]:
    """The entries of each file, of at most `limit` bytes if they have more than one."""
    files: list[dict[str, _Entry]] = [{}]
    size = 0
    for name, entry in entries.items():
        if files[-1] and size + entry.size > limit:
            files.append({})
            size = 0
        files[-1][name] = entry
        size += entry.size
    return files


def _header(entries: dict[str, _Entry]) -> bytes:
    """The head of a safetensors file: what is in it, and where."""
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in entries.values():
        start, end = end, end + entry.size
        table[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [start, end]}
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_weights(conversion: Conversion, shards: Shards, folder: Path, back: bool) -> None:
    """Write the target's tensors while the source's are read, a rule at a time."""
    conversion.steps.sort(key=lambda step: shards.order(step.sources))
    entries = _entries(conversion, shards, back)
    files = _files(entries, max(path.stat().st_size for path in shards.files))
    names = ["model.safetensors"]
    if len(files) > 1:
        names = [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
        index = {
            "metadata": {"total_size": sum(entry.size for entry in entries.values())},
            "weight_map": {e.name: n for n, part in zip(names, files, strict=True) for e in part.values()},
        }
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    tensors = (pair for pair in _made(conversion, shards) if pair[0] in entries)
    for name, part in zip(names, files, strict=True):
        with open(folder / name, "wb") as file:
            file.write(_header(part))
            for expected, entry in part.items():
                made, tensor = next(tensors)
                if made != expected:
                    raise ValueError(f"{made} was made where {expected} was to be written")
                tensor = tensor.to(_DTYPES[entry.dtype]).contiguous().reshape(-1)
                tensor.view(torch.uint8).numpy().tofile(file)
                del tensor
    for _ in tensors:  # steps that only look whether a tensor without a place here is what it must be
        pass


def _made(conversion: Conversion, shards: Shards) -> Iterator[tuple[str, Tensor]]:
    read = reader(shards, conversion.source)
    for step in conversion.steps:
        yield from run_step(step, read, conversion.ours)


def _carry_files(source: Path, target: Path) -> None:
    """Copy tokenizer, chat template, licence; and say which tokenizer it is where only the model type did."""
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
    source: str | os.PathLike, target: str | os.PathLike, family: str | None = None, **hub: Any
) -> Path:
    """Convert a checkpoint of a stock class to Urform, or one of Urform to a stock class; returns the target.

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
        config.dtype = _DTYPES[shards.dtype(next(iter(shards)))]
        config.save_pretrained(temporary)
        if model_class.can_generate():
            _generation_config(folder).save_pretrained(temporary)
        _carry_files(folder, temporary)
        os.replace(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return target
