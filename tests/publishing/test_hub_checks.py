"""What is refused before anything is published: each fault of a checkpoint by name."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import urform
from urform import hub_upload
from urform.configuration import version_urform
from urform.diagnostics.bundle import check_bundle, installed_code_hash
from urform.publishing import bundle_stamp, training_record
from urform.publishing.checkpoint_checks import check_checkpoint

TINY = {"vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in several shards, with its tokenizer."""
    folder = tmp_path_factory.mktemp("checkpoint") / "ck"
    model = urform.UrformForConditionalGeneration(urform.UrformConfig(architecture="encoder-decoder", **TINY))
    model.save_pretrained(folder, max_shard_size="20KB")
    urform.UrformTokenizer.train(["1 2 3 four five"] * 5, vocab_size=300).save_pretrained(folder)
    return folder


@pytest.fixture
def checkpoint(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "ck"))


def edit(path: Path, **fields: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def reweigh(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change the weights and save them as one file."""
    weights = {
        name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()
    }
    for path in [*folder.glob("*.safetensors"), folder / "model.safetensors.index.json"]:
        path.unlink()
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def exchange(index: Path) -> None:
    """Let the index look for two weights in each other's shards."""
    where = json.loads(index.read_text())["weight_map"]
    one, two = min(where, key=where.__getitem__), max(where, key=where.__getitem__)
    edit(index, weight_map={**where, one: where[two], two: where[one]})


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "broken config": (lambda f: truncate(f / "config.json"), "cannot be read as JSON"),
    "other family": (lambda f: edit(f / "config.json", model_type="bert"), "only 'urform' is served"),
    "other class": (lambda f: edit(f / "config.json", architectures=["Mine"]), "no class of Urform"),
    "quantized": (lambda f: edit(f / "config.json", quantization_config={"bits": 4}), "is quantized"),
    "missing shard": (lambda f: shards(f)[1].unlink(), r"lacks model-00002"),
    "truncated shard": (lambda f: truncate(shards(f)[0]), "damaged or not complete"),
    "no weights": (lambda f: [p.unlink() for p in f.glob("model*")], r"lacks model\.safetensors"),
    "missing weight": (lambda f: reweigh(f, lambda w: w.pop(max(w))), "lacks the weights"),
    "unknown weight": (lambda f: reweigh(f, lambda w: w.update(extra=torch.ones(2))), "that the model has not: extra"),
    "other shape": (lambda f: reweigh(f, lambda w: w.update({max(w): torch.ones(3)})), r"has shape \(3,\)"),
    "not a number": (lambda f: reweigh(f, lambda w: w[max(w)].view(-1)[0].fill_(math.nan)), "1 values that are"),
    "infinite": (lambda f: reweigh(f, lambda w: w[min(w)].view(-1)[3].fill_(math.inf)), "1 values that are"),
    "untied": (
        lambda f: reweigh(f, lambda w: w.update({"lm_head.weight": torch.ones(300, 16)})),
        "differ, but the config ties them",
    ),
    "index leaves the folder": (
        lambda f: edit(f / "model.safetensors.index.json", weight_map={"a": "../other/model.safetensors"}),
        "a shard is a .safetensors file beside the index",
    ),
    "index and shards disagree": (lambda f: exchange(f / "model.safetensors.index.json"), "disagree about"),
    "pickled weights": (lambda f: (f / "pytorch_model.bin").write_bytes(b"pickle"), r"pytorch_model\.bin"),
    "tokenizer too large": (lambda f: urform.UrformTokenizer.train(
        ["many other words than the model knows"] * 9, vocab_size=310).save_pretrained(f), "vocab_size=300"),
    "another end": (lambda f: edit(f / "config.json", eos_token_id=7), "eos_token_id is 2 in the tokenizer and 7"),
    "start outside": (lambda f: edit(f / "generation_config.json", decoder_start_token_id=300), "=300 is outside"),
    "a token": (lambda f: edit(f / "tokenizer_config.json", note="hf_" + "a" * 34), "a Hugging Face token"),
    "a key": (lambda f: (f / "README.md").write_text("\n-----BEGIN RSA PRIVATE KEY-----"), r"README\.md:2: .*private"),
    "a password": (lambda f: edit(f / "generation_config.json", origin="https://me:pass@host/x"), "a password"),
    "a token in the weights' metadata": (
        lambda f: save_file(load_file(shards(f)[0]), shards(f)[0], metadata={"format": "pt", "by": "hf_" + "b" * 34}),
        "a Hugging Face token",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_refused_by_name(checkpoint: Path, fault: str):
    make, message = FAULTS[fault]
    make(checkpoint)
    with pytest.raises(ValueError, match=message) as error:
        check_checkpoint(checkpoint)
    assert "a" * 34 not in str(error.value) and "b" * 34 not in str(error.value) and "pass@" not in str(error.value)


def test_good_checkpoints_pass(checkpoint: Path):
    assert check_checkpoint(checkpoint)["architectures"] == ["UrformForConditionalGeneration"]
    for name in ("training_args.bin", "optimizer.pt", "rng_state.pth", "scheduler.pt"):
        (checkpoint / name).write_bytes(b"pickle")
    reweigh(checkpoint, lambda w: w.update({"lm_head.weight": w["model.encoder.embed_tokens.weight"].clone()}))
    check_checkpoint(checkpoint)


def test_your_own_token_is_found_whatever_it_looks_like(checkpoint: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", "an unusual one")
    edit(checkpoint / "generation_config.json", note="an unusual one")
    with pytest.raises(ValueError, match="your own token") as error:
        check_checkpoint(checkpoint)
    assert "an unusual one" not in str(error.value)


# ------------------------------------------------------------------------------------------------------- the bundle


def test_bundle_takes_what_belongs_to_it_and_nothing_else(checkpoint: Path, tmp_path: Path):
    for name in ("training_args.bin", "test_predictions.txt", "results.json", "notes.py", ".env"):
        (checkpoint / name).write_text("{}")
    (checkpoint / "additional_chat_templates").mkdir()
    (checkpoint / "additional_chat_templates" / "tools.jinja").write_text("{{ messages }}")
    bundle = hub_upload.write_bundle(checkpoint, tmp_path / "bundle", "me/it")
    names = {p.relative_to(bundle).as_posix() for p in bundle.rglob("*") if p.is_file()}
    assert "additional_chat_templates/tools.jinja" in names and "modeling_urform.py" in names
    assert not {"training_args.bin", "test_predictions.txt", "results.json", "notes.py", ".env"} & names
    assert hub_upload._left_out(checkpoint, bundle) == [
        ".env",
        "results.json",
        "test_predictions.txt",
        "training_args.bin",
    ]
    with pytest.raises(ValueError, match="is not empty"):
        hub_upload.write_bundle(checkpoint, bundle)
    report = check_bundle(bundle)
    assert report.ok and not report.notes and report.files == len(names) - 2  # without the card and the stamp itself
    assert (bundle / "requirements.txt").read_text().split() == [
        "torch>=2.11",
        "transformers>=5.17",
        "safetensors>=0.6",
    ]


def test_without_code(checkpoint: Path, tmp_path: Path):
    bundle = hub_upload.write_bundle(checkpoint, tmp_path / "bundle", "me/it", code=False)
    assert not list(bundle.glob("*.py"))
    assert "auto_map" not in json.loads((bundle / "config.json").read_text())
    assert "auto_map" not in json.loads((bundle / "tokenizer_config.json").read_text())
    assert "trust_remote_code" not in (bundle / "README.md").read_text()
    assert check_bundle(bundle).ok


def test_a_checkpoint_that_was_published_can_be_published_again(checkpoint: Path, tmp_path: Path):
    first = hub_upload.write_bundle(checkpoint, tmp_path / "first", "me/it")
    second = hub_upload.write_bundle(first, tmp_path / "second", "me/it")
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes(), path.name


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"repo_id": "plain"}, "NAMESPACE/NAME"),
        ({"repo_id": "me/../up"}, "NAMESPACE/NAME"),
        ({"repo_id": "me/a b"}, "Repo id must"),
        ({"repo_id": None}, "NAMESPACE/NAME"),
        ({"repo_id": "me/it"}, "no Hugging Face token"),
    ],
)
def test_bad_names_are_refused_at_once(tmp_path: Path, arguments: dict, says: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(ValueError, match=says):
        hub_upload.publish(tmp_path / "none", **arguments)


# -------------------------------------------------------------------------------------------------------- the stamp


@pytest.fixture
def bundle(checkpoint: Path, tmp_path: Path) -> Path:
    return hub_upload.write_bundle(checkpoint, tmp_path / "bundle", "me/it")


STAMP_FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "edited code": (lambda b: (b / "layers_urform.py").write_text("import os\n"), "layers_urform.py: 10 bytes instead"),
    "flipped bit": (
        lambda b: (b / "tokenizer.json").write_bytes(bytes([(b / "tokenizer.json").read_bytes()[0] ^ 1])
        + (b / "tokenizer.json").read_bytes()[1:]),
        "tokenizer.json: changed",
    ),
    "truncated": (lambda b: truncate(sorted(b.glob("*.safetensors"))[0]), "bytes instead of"),
    "deleted": (lambda b: (b / "generation_config.json").unlink(), "generation_config.json: missing"),
    "added code": (lambda b: (b / "evil.py").write_text("1"), "evil.py: not in the stamp"),
    "edited stamp": (lambda b: edit(b / "urform_bundle.json", urform="0.0.1"), "changed by hand"),
    "no stamp": (lambda b: (b / "urform_bundle.json").unlink(), "urform_bundle.json: missing"),
    "a name outside": (
        lambda b: edit(b / "urform_bundle.json", files={"../../etc/passwd": {"sha256": "0", "size": 1}}),
        "'../../etc/passwd': no name of a bundle's file",
    ),
    "code of another repository": (
        lambda b: edit(b / "config.json", auto_map={"AutoModel": "evil/repo--modeling_urform.UrformModel"}),
        "AutoModel would run 'evil/repo--modeling_urform.UrformModel'",
    ),
    "pickle": (lambda b: (b / "pytorch_model.bin").write_bytes(b""), "pytorch_model.bin: pickled weights"),
}  # fmt: skip


@pytest.mark.parametrize("fault", STAMP_FAULTS)
def test_doctor_names_every_change(bundle: Path, fault: str):
    make, message = STAMP_FAULTS[fault]
    make(bundle)
    report = check_bundle(bundle)
    assert not report.ok and message in "\n".join(report.faults), report.to_text()
    assert "FAULT" in report.to_text() and report.to_dict()["ok"] is False


def test_cards_and_pictures_may_change(bundle: Path):
    (bundle / "README.md").write_text("# mine\n")
    (bundle / "curve.png").write_bytes(b"png")
    assert check_bundle(bundle).ok


def test_a_stamp_that_is_none_is_an_error(bundle: Path):
    (bundle / "urform_bundle.json").write_text('{"files": 3}')
    with pytest.raises(ValueError, match="is no stamp of Urform"):
        check_bundle(bundle)


def test_code_of_the_same_version_that_differs_is_noted(bundle: Path, monkeypatch: pytest.MonkeyPatch):
    code = bundle / "layers_urform.py"
    code.write_text(code.read_text() + "# changed, and stamped again\n")
    bundle_stamp.write_stamp(bundle, urform.__version__)
    report = check_bundle(bundle)
    assert report.ok and "not that of the installed urform" in report.notes[0]
    assert bundle_stamp.read_stamp(bundle)["code"] != installed_code_hash()


def test_parts_stamped_one_after_the_other_add_up(bundle: Path, tmp_path: Path):
    """A model and a tokenizer pushed to one repository by themselves: the stamp covers both."""
    whole = bundle_stamp.read_stamp(bundle)
    part = tmp_path / "part"
    part.mkdir()
    shutil.copyfile(bundle / "tokenizer.json", part / "tokenizer.json")
    edit(part / "tokenizer.json", changed=True)
    merged = bundle_stamp.write_stamp(part, urform.__version__, whole)
    assert merged["files"].keys() == whole["files"].keys() and merged["code"] == whole["code"]
    shutil.copytree(part, bundle, dirs_exist_ok=True)
    assert check_bundle(bundle).ok


@pytest.mark.parametrize(
    ("stamp", "says"),
    [
        ({"format": 1, "urform": "0.1.0"}, []),
        ({"format": 1, "urform": "0.0.9"}, []),
        ({"format": 1, "urform": "0.2.0"}, ["urform 0.2.0 and urform 0.1.0 is installed"]),
        ({"format": 1, "urform": "0.1.1.dev3"}, ["urform 0.1.1.dev3 and urform 0.1.0 is installed"]),
        (
            {"format": 0, "urform": "0.0.9"},
            ["format 0 (urform 0.0.9) and urform 0.1.0 writes format 1: publish it again"],
        ),
        (
            {"format": 2, "urform": "0.2"},
            ["urform 0.2 and", "format 2 (urform 0.2) and urform 0.1.0 writes format 1: update"],
        ),
        ({"urform": "new"}, ["cannot be read"]),
        ("text", ["cannot be read"]),
    ],
)
def test_version_warnings(stamp: object, says: list[str]):
    lines = list(version_urform.version_warnings(stamp, "0.1.0"))
    assert len(lines) == len(says) and all(part in line for part, line in zip(says, lines, strict=True)), lines


def test_libraries_that_are_too_old_are_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(version_urform, "version", lambda name: {"transformers": "4.57.1"}.get(name, "99"))
    with pytest.raises(ImportError, match=r"transformers>=5\.17, and 4\.57\.1 is installed: pip install -U"):
        version_urform.need_libraries()
    monkeypatch.setattr(version_urform, "version", lambda name: "99.0.dev0+cpu")
    version_urform.need_libraries()


def test_needs_are_those_of_the_package():
    import re

    text = (Path(urform.__file__).parent / "pyproject.toml").read_text()
    for name, least in version_urform.NEEDS.items():
        assert re.search(rf'^\s*"{name}>={re.escape(least)}",$', text, re.MULTILINE), name


def test_records_are_read_without_unpickling(tmp_path: Path):
    """`training_args.bin` beside the rest is not looked at; the newest checkpoint's state is."""
    for step in (9, 10):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "training_args.bin").write_bytes(b"not a pickle")
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step, "log_history": []}))
    assert training_record.read_record(tmp_path).steps == 10
    assert training_record.read_record(tmp_path / "checkpoint-9").steps == 9
    assert training_record.read_record(tmp_path / "none").steps is None


def test_an_average_of_published_checkpoints_has_a_stamp_of_its_own(saved: Path, tmp_path: Path):
    from urform.configuration.bundle_urform import publish_with
    from urform.training.averaging import average_checkpoints

    model = urform.UrformForConditionalGeneration.from_pretrained(saved)
    publish_with(model)
    for number in (1, 2):
        with torch.no_grad():
            model.lm_head.weight.mul_(number)
        model.save_pretrained(tmp_path / f"{number}")
        assert check_bundle(tmp_path / f"{number}").ok
    report = check_bundle(average_checkpoints([tmp_path / "1", tmp_path / "2"], tmp_path / "average"))
    assert report.ok and not report.notes, report.to_text()
