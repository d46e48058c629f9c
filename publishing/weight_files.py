"""The weights of a checkpoint, read from safetensors one tensor at a time. The whole package reads them here."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from safetensors import SafetensorError, safe_open

from ..configuration.checkpoint_files import INDEX_NAME, read_weight_map

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS_NAME = "model.safetensors"


def weight_files(folder: str | os.PathLike[str]) -> list[Path]:
    """Return the files with the weights that load by default: those that the index names, else `model.safetensors`.

    Raises:
        ValueError: the index is damaged or names a file that is not safetensors. Missing files are not noticed.
    """
    index = Path(folder) / INDEX_NAME
    names = set(read_weight_map(index).values()) if index.is_file() else {WEIGHTS_NAME}
    return [Path(folder) / name for name in sorted(names)]


class TensorEntry(NamedTuple):
    """What is known of a tensor before it is read: its file, its dtype as safetensors calls it (`BF16`), its shape."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


class WeightFiles(Mapping[str, "Tensor"]):
    """The tensors of several safetensors files, by name. A tensor is read when it is asked for.

    No file stays open. A file is mapped into memory, so an open one would keep all that was read of it. Where two files
    hold a name, the later file counts.

    Args:
        files: the paths.

    Attributes:
        files: the paths.
        entries: what is known of each tensor, by name.
        metadata: the free text in the header of each file.

    Raises:
        ValueError: a file is damaged or truncated.
        FileNotFoundError: a file is missing.
    """

    def __init__(self, files: Iterable[str | os.PathLike[str]]):
        self.files = [Path(file) for file in files]
        self.entries: dict[str, TensorEntry] = {}
        self.metadata: dict[Path, dict[str, str]] = {}
        for path in self.files:
            with _opened(path) as file:
                self.metadata[path] = file.metadata() or {}
                for name in file.keys():
                    tensor = file.get_slice(name)
                    self.entries[name] = TensorEntry(path, tensor.get_dtype(), tuple(tensor.get_shape()))

    def __getitem__(self, name: str) -> Tensor:
        with _opened(self.entries[name].file) as file:
            return file.get_tensor(name)

    def __contains__(self, name: object) -> bool:  # Mapping's own would read the tensor
        return name in self.entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or not complete ({error}); save the model again.") from error
