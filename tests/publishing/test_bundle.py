"""The flat bundle: its rules, and that what `save_pretrained` writes loads where Urform is not installed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from numerics import assert_within, twice

import urform
from urform import hub_upload
from urform.configuration import bundle_urform
from urform.configuration.heads_urform import HEADS, auto_map
from urform.publishing.bundle_code import ENTRIES, FOLDERS, flatten_package

ROOT = Path(urform.__file__).resolve().parent
TINY = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
ARCHITECTURES = ("encoder", "decoder", "encoder-decoder")
SERVED = [(auto, name, a) for auto, (name, served) in HEADS.items() for a in served]


# ------------------------------------------------------------------------------------------------------------- rules

FAKE = {
    "configuration/configuration_urform.py": '"""Config."""\nfrom typing import Any\n\nSIZE = 3  # über\n',
    "modeling/modeling_urform.py": (
        "from ..configuration.configuration_urform import SIZE\n"
        "from .kernels.fast_kernel import (\n    run,  # comment\n)\n"
        "if SIZE:\n    x = 'ü'\n    from   .layers   import Layer as L\n"
    ),
    "modeling/layers.py": "import torch\n\n\ndef later():\n    from ..configuration.configuration_urform import SIZE\n",
    "modeling/kernels/fast_kernel.py": "try:\n    import triton\nexcept ImportError:\n    triton = None\nrun = len\n",
    "modeling/kernels/__init__.py": "",
    "modeling/__init__.py": "",
    "modeling/unused.py": "import surely_missing\n",
    "tokenization/tokenization_urform.py": "from transformers import TokenizersBackend\n",
}


def fake(root: Path, **changed: str) -> Path:
    """Write the fake package; a changed file is given as folder__name="text"."""
    files = {**FAKE, **{name.replace("__", "/") + ".py": text for name, text in changed.items()}}
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    return root


def test_only_the_imports_change(tmp_path: Path):
    written = flatten_package(tmp_path / "flat", root=fake(tmp_path / "pkg"), package="pkg")
    text = {path.stem: path.read_text(encoding="utf-8") for path in written}
    assert sorted(text) == ["configuration_urform", "fast_kernel", "layers", "modeling_urform", "tokenization_urform"]
    assert text["configuration_urform"] == FAKE["configuration/configuration_urform.py"]
    assert text["fast_kernel"] == FAKE["modeling/kernels/fast_kernel.py"]
    assert text["modeling_urform"] == (
        "from .configuration_urform import SIZE\n"
        "from .fast_kernel import (\n    run,  # comment\n)\n"
        "if SIZE:\n    x = 'ü'\n    from   .layers   import Layer as L\n"
    )
    assert "    from .configuration_urform import SIZE\n" in text["layers"]
    assert sorted(p.name for p in (tmp_path / "flat").iterdir()) == sorted(p.name for p in written)  # no leftovers


@pytest.mark.parametrize(
    ("line", "text", "why"),
    [
        (2, "\nfrom . import layers\n", "imports from a package"),
        (1, "from .kernels import fast_kernel\n", "imports from a package"),
        (1, "from ..configuration import configuration_urform\n", "imports from a package"),
        (1, "from ..training.loop import x\n", "names no module of"),
        (1, "from .nowhere import x\n", "names no module of"),
        (3, "import os\n\nimport pkg.modeling.layers\n", "absolute name"),
        (1, "from pkg.modeling.layers import Layer\n", "absolute name"),
        (1, "import triton\n", "outside of try"),
        (3, "def f():\n    import os\n    import triton.language as tl\n", "outside of try"),
        (1, "x = 1; from .layers import Layer\n", "begin its line"),
        (1, "from \\\n  .layers import Layer\n", "begin its line"),
        (3, '"""Title.\n\n  from .layers import Layer\n"""\n', "is no import"),
        (5, '"""Title.\n\n\n\n  from .layers import Layer\n"""\n', "is no import"),
        (2, '"""Title.\nimport .layers\n"""\n', "is no import"),
    ],
)
def test_refused_with_file_and_line(tmp_path: Path, line: int, text: str, why: str):
    root = fake(tmp_path / "pkg", modeling__modeling_urform=text)
    with pytest.raises(ValueError, match=why) as error:
        flatten_package(tmp_path / "flat", root=root, package="pkg")
    assert f"modeling_urform.py:{line}: " in str(error.value)
    assert not (tmp_path / "flat").exists()  # nothing is written unless everything can be


def test_two_modules_of_one_name_are_refused(tmp_path: Path):
    root = fake(tmp_path / "pkg", modeling__kernels__layers="")
    with pytest.raises(ValueError, match="'layers' exists already"):
        flatten_package(tmp_path / "flat", root=root, package="pkg")


def test_the_real_package_keeps_the_rules(tmp_path: Path):
    """Every module of the bundle's folders can be laid flat, is reached from an entry, and every import is followed."""
    from transformers.dynamic_module_utils import check_imports, get_relative_import_files

    written = flatten_package(tmp_path)
    modules = {p.stem for f in FOLDERS for p in (ROOT / f).glob("*.py") if p.stem != "__init__"}
    assert {p.stem for p in written} == modules, "modules that no entry imports: not shipped, perhaps not needed"
    followed = {Path(f).stem for entry in ENTRIES for f in get_relative_import_files(tmp_path / f"{entry}.py")}
    assert followed | set(ENTRIES) == modules
    for path in written:
        check_imports(path)


def test_auto_map_names_what_exists():
    for architecture in ARCHITECTURES:
        for auto, reference in auto_map(architecture).items():
            module, name = reference.split(".")
            assert hasattr(urform, name), f"{auto}: {name}"
            assert getattr(urform, name).__module__.endswith(f".{module}")


@pytest.mark.parametrize("auto", HEADS)
def test_table_of_heads_is_what_the_heads_accept(auto: str):
    name, served = HEADS[auto]
    for architecture in ARCHITECTURES:
        config = urform.UrformConfig(architecture=architecture, **TINY)
        if architecture in served:
            getattr(urform, name)(config)
        else:
            with pytest.raises(ValueError, match=architecture):
                getattr(urform, name)(config)


# ------------------------------------------------------------------------------------------------- save, then load

LOAD = """
import json, sys, torch, transformers
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("urform", "triton"):
            raise ModuleNotFoundError("No module named " + repr(name), name=name)
sys.meta_path.insert(0, Absent())
for folder, auto, name in json.loads(sys.argv[1]):
    model = getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True).eval()
    assert type(model).__name__ == name and type(model).__module__.startswith("transformers_modules."), type(model)
    with torch.no_grad():
        out = model(**torch.load(folder + "/inputs.pt"))[0]
    torch.save(out, f"{folder}/{auto}.pt")
    model.save_pretrained(folder + "/again")  # the flat copy saves itself by transformers' own copying
"""


@pytest.fixture
def registered():
    """Register every class for its Auto class, as somebody who wants the code in the checkpoint does."""
    classes = {getattr(urform, name): auto for auto, (name, _) in HEADS.items()}
    classes |= {urform.UrformConfig: "AutoConfig", urform.UrformTokenizer: "AutoTokenizer"}
    for cls, auto in classes.items():
        cls.register_for_auto_class(auto)
    yield
    for cls in classes:
        cls._auto_class = None


def make(name: str, architecture: str, auto: str):
    torch.manual_seed(0)
    model = getattr(urform, name)(urform.UrformConfig(architecture=architecture, **TINY)).eval()
    inputs = {"input_ids": torch.arange(8).reshape((1, 2, 4) if "MultipleChoice" in auto else (2, 4)) + 3}
    if architecture == "encoder-decoder" and auto in ("AutoModel", "AutoModelForSeq2SeqLM"):
        inputs["decoder_input_ids"] = inputs["input_ids"] + 1
    return model, inputs


def load_elsewhere(jobs: list[tuple[str, str, str]], cache: Path, script: str = LOAD) -> subprocess.CompletedProcess:
    env = {**os.environ, "HF_MODULES_CACHE": str(cache), "PYTHONPATH": ""}
    command = [sys.executable, "-c", script, json.dumps(jobs)]
    return subprocess.run(command, cwd=cache.parent, env=env, capture_output=True, text=True, check=False)


FIRST = [next(head for head in SERVED[3:] if head[2] == architecture) for architecture in ARCHITECTURES]


@pytest.mark.parametrize("heads", [FIRST, pytest.param(SERVED, marks=pytest.mark.slow)], ids=["first", "all"])
def test_every_head_loads_without_urform(tmp_path: Path, registered, heads: list[tuple[str, str, str]]):
    jobs, expected = [], {}
    for auto, name, architecture in heads:
        folder = tmp_path / f"{name}-{architecture}"
        model, inputs = make(name, architecture, auto)
        model.save_pretrained(folder)
        torch.save(inputs, folder / "inputs.pt")
        loaded = (
            type(model).from_pretrained(folder).eval()
        )  # weights in a file are aligned otherwise: 1e-10 off `model`
        with torch.no_grad():
            expected[folder, auto] = loaded(**inputs)[0]
            assert_within(expected[folder, auto], *twice(model, lambda m, inputs=inputs: m(**inputs)[0]))
        saved = json.loads((folder / "config.json").read_text())
        assert saved["auto_map"] == auto_map(architecture)
        assert "_auto_class" not in saved
        jobs.append((str(folder), auto, name))
    done = load_elsewhere(jobs, tmp_path / "modules")
    assert done.returncode == 0, done.stderr
    for (folder, auto), want in expected.items():
        torch.testing.assert_close(torch.load(folder / f"{auto}.pt"), want, rtol=0, atol=0)
        assert (folder / "again" / "modeling_urform.py").is_file()


@pytest.mark.slow  # by name, over HTTP, in test_hub_push.py
def test_tokenizer_loads_without_urform(tmp_path: Path, registered):
    tokenizer = urform.UrformTokenizer.train(["the cat sat on the mat", "Überall Käse"] * 5, vocab_size=300)
    tokenizer.save_pretrained(tmp_path / "tok")
    saved = json.loads((tmp_path / "tok" / "tokenizer_config.json").read_text())
    assert saved["auto_map"] == {"AutoTokenizer": ["tokenization_urform.UrformTokenizer", None]}
    assert "_auto_map" not in vars(tokenizer) and "_auto_class" not in vars(tokenizer)
    script = LOAD.partition("for folder")[0] + (
        "tokenizer = transformers.AutoTokenizer.from_pretrained(json.loads(sys.argv[1])[0], trust_remote_code=True)\n"
        "assert type(tokenizer).__module__.startswith('transformers_modules.'), type(tokenizer)\n"
        "print(tokenizer('the Käse')['input_ids'])\n"
    )
    done = load_elsewhere([str(tmp_path / "tok")], tmp_path / "modules", script)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == tokenizer("the Käse")["input_ids"]


def test_without_registration_nothing_is_added(tmp_path: Path):
    model, _ = make("UrformForCausalLM", "decoder", "AutoModelForCausalLM")
    model.save_pretrained(tmp_path)
    urform.UrformTokenizer.train(["a b"], vocab_size=300).save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.py"))
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())
    assert "auto_map" not in json.loads((tmp_path / "tokenizer_config.json").read_text())


def test_config_alone_and_restored_state(tmp_path: Path, registered):
    config = urform.UrformConfig(architecture="encoder", **TINY)
    config.save_pretrained(tmp_path)
    assert (tmp_path / "configuration_urform.py").is_file()
    assert not {"_auto_class", "is_remote_code"} & vars(config).keys()
    model, _ = make("UrformModel", "encoder", "AutoModel")
    model.save_pretrained(tmp_path)
    assert not {"_auto_class", "is_remote_code"} & vars(model).keys()
    assert model.is_remote_code()


def test_upload_takes_the_code_along(tmp_path: Path, registered):
    """`save_pretrained(push_to_hub=True)` uploads what is newer than before: the code must be in it."""
    model, _ = make("UrformModel", "encoder", "AutoModel")
    sent: list[set[str]] = []

    class Captured(Exception):
        pass

    def upload(self, working_dir, repo_id, files_timestamps, **kwargs):
        new = {f for f in os.listdir(working_dir) if f not in files_timestamps}
        sent.append(new)

    class Api:
        def create_repo(self, repo_id, **kwargs):
            return type("Url", (), {"repo_id": repo_id})

    import transformers.modeling_utils as modeling_utils

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(model), "_upload_modified_files", upload)
        patch.setattr(modeling_utils, "hf_api", lambda *a, **k: Api())
        patch.setattr(modeling_utils, "create_and_tag_model_card", lambda *a, **k: type("C", (), {"save": print})())
        model.save_pretrained(tmp_path, push_to_hub=True, repo_id="me/model")
    assert {"modeling_urform.py", "configuration_urform.py", "bundle_urform.py", "config.json"} <= sent[0]


def test_subclass_elsewhere_is_left_to_transformers(tmp_path: Path, registered, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "mine.py").write_text("import urform\n\nclass Mine(urform.UrformModel):\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    import mine

    mine.Mine.register_for_auto_class("AutoModel")
    model = mine.Mine(urform.UrformConfig(architecture="encoder", **TINY))
    model.save_pretrained(tmp_path / "out")
    assert (tmp_path / "out" / "mine.py").is_file()
    token = bundle_urform._publishing.set(True)  # as in push_to_hub
    model.save_pretrained(tmp_path / "pushed")
    bundle_urform._publishing.reset(token)
    assert json.loads((tmp_path / "pushed" / "config.json").read_text())["auto_map"]["AutoModel"] == "mine.Mine"


# -------------------------------------------------------------------------------------------------------- hub_upload


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    config = urform.UrformConfig(architecture="encoder-decoder", **{**TINY, "vocab_size": 300})
    urform.UrformForConditionalGeneration(config).save_pretrained(tmp_path / "checkpoint")
    tokenizer = urform.UrformTokenizer.train(["1 2 3 four five"] * 5, vocab_size=300)
    tokenizer.save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def test_bundle_only_writes_and_verifies(checkpoint: Path, tmp_path: Path, capsys):
    (checkpoint / "training_args.bin").write_bytes(b"pickle")
    bundle = tmp_path / "bundle"
    assert hub_upload.main([str(checkpoint), "--bundle-only", str(bundle), "--repo-id", "me/it"]) == 0
    out = capsys.readouterr().out
    assert "verified: loads and runs without urform" in out and "verified: 3 snippets of the card ran" in out
    assert "verified: loads and runs with the installed urform, with the same outputs to the bit" in out
    assert "not published: training_args.bin" in out and "nothing is uploaded" in out
    assert not (bundle / "training_args.bin").exists()
    assert (bundle / "model.safetensors").read_bytes() == (checkpoint / "model.safetensors").read_bytes()
    assert "me/it" in (bundle / "README.md").read_text()


NUDGE = """
import functools
_forward = UrformForConditionalGeneration.forward
@functools.wraps(_forward)
def _nudged(self, *args, **kwargs):
    outputs = _forward(self, *args, **kwargs)
    outputs.logits = outputs.logits * (1 + 1e-6)
    return outputs
UrformForConditionalGeneration.forward = _nudged
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("raise RuntimeError('broken')", "broken"),
        ("import surely_missing", "surely_missing"),
        ("import triton", "triton"),  # it may be installed here; it is not there
        ("import urform", "urform"),
        (NUDGE, "differ in 'output'"),
    ],
)
def test_verification_notices_different_code(checkpoint: Path, tmp_path: Path, line: str, says: str):
    bundle = hub_upload.write_bundle(checkpoint, tmp_path / "bundle")
    code = bundle / "modeling_urform.py"
    code.write_text(code.read_text() + f"\n{line}\n")
    with pytest.raises(ValueError, match=says):
        hub_upload.verify_bundle(bundle)


def test_outputs_must_be_equal_bit_by_bit(tmp_path: Path):
    from safetensors.torch import save_file

    from urform.publishing.verification import _compare

    output = torch.ones(3)
    for name, tensors in {
        "a": {"output": output}, "b": {"output": output.clone()}, "c": {"output": output.nextafter(2 * output)},
        "d": {"generated": output},
    }.items():  # fmt: skip
        save_file(tensors, tmp_path / name)
    _compare([tmp_path / "a", tmp_path / "b"])
    for other in "cd":
        with pytest.raises(ValueError, match="differ in 'output'"):
            _compare([tmp_path / "a", tmp_path / other])


def test_bad_checkpoints_are_named(checkpoint: Path, tmp_path: Path, capsys):
    assert hub_upload.main([str(tmp_path / "none"), "--dry-run"]) == 1
    assert "has no config.json" in capsys.readouterr().err
    (checkpoint / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin"):
        hub_upload.check_checkpoint(checkpoint)
    (checkpoint / "pytorch_model.bin").unlink()
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"lacks model\.safetensors"):
        hub_upload.check_checkpoint(checkpoint)
    with pytest.raises(SystemExit):
        hub_upload.main([str(checkpoint)])


def test_flat_copy_knows_that_it_is_flat():
    assert not bundle_urform.IS_FLAT_COPY
