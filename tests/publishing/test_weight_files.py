"""The one reader of weights, against safetensors' own `load_file`."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from urform.publishing.weight_files import WeightFiles, weight_files

FIRST = {"a": torch.arange(6.0).reshape(2, 3), "scalar": torch.tensor(3, dtype=torch.int64)}
SECOND = {"b": torch.ones(4, dtype=torch.bfloat16), "empty": torch.zeros(0, 5), "flag": torch.tensor([True, False])}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file(FIRST, tmp_path / "model-1.safetensors", metadata={"format": "pt", "note": "first"})
    save_file(SECOND, tmp_path / "model-2.safetensors")
    weight_map = {name: f"model-{1 if name in FIRST else 2}.safetensors" for name in (*SECOND, *FIRST)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return tmp_path


def test_tensors_and_what_is_known_before_they_are_read(folder: Path) -> None:
    files = weight_files(folder)
    assert [path.name for path in files] == ["model-1.safetensors", "model-2.safetensors"]
    weights = WeightFiles(files)
    want = {name: tensor for path in files for name, tensor in load_file(path).items()}
    assert weights.keys() == want.keys() and len(weights) == 5 and "a" in weights and "c" not in weights
    for name, tensor in want.items():
        assert torch.equal(weights[name], tensor) and weights[name].dtype == tensor.dtype
        assert weights.entries[name].shape == tuple(tensor.shape)
        assert weights.entries[name].file == files[name in SECOND]
    assert [weights.entries[name].dtype for name in ("a", "scalar", "b", "flag")] == ["F32", "I64", "BF16", "BOOL"]
    assert weights.metadata == {files[0]: {"format": "pt", "note": "first"}, files[1]: {}}


def test_without_an_index_it_is_one_file(tmp_path: Path) -> None:
    assert weight_files(tmp_path) == [tmp_path / "model.safetensors"]
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        WeightFiles(weight_files(tmp_path))


def test_a_name_in_two_files_is_the_later_one(folder: Path) -> None:
    save_file({**SECOND, "a": torch.zeros(1)}, folder / "model-2.safetensors")
    assert WeightFiles(weight_files(folder))["a"].shape == (1,)


def test_no_file_stays_open(folder: Path) -> None:
    """What a file held is not kept in memory: its mapping goes with the last tensor that was read from it."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("no /proc/self/maps here")
    weights = WeightFiles(weight_files(folder))
    tensor = weights["a"]
    assert tensor.sum() == 15
    del tensor
    assert str(folder) not in maps.read_text()


@pytest.mark.parametrize("keep", [0, 4, 40, -1])
def test_a_damaged_file_is_named(folder: Path, keep: int) -> None:
    path = folder / "model-2.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model-2\.safetensors is damaged or not complete"):
        WeightFiles(weight_files(folder))
