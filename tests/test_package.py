"""The package as such: the cost of its import, registration in any order, its layering, what is in the wheel."""

import ast
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from email.message import Message
from email.parser import HeaderParser
from pathlib import Path

import pytest
import yaml
from complexity import EXCEPTIONS, MOST_EXCEPTIONS, complaints
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import urform
from urform.configuration.version_urform import NEEDS
from urform.dependencies import TESTED
from urform.publishing.bundle_code import FOLDERS

ROOT = Path(urform.__file__).resolve().parent
SKIPPED = {"__pycache__", ".venv", "build", "dist", "urform.egg-info"}


def run(code: str, **env: str) -> str:
    """Run code in a fresh interpreter outside the checkout; return what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=os.environ["HF_HOME"],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# ------------------------------------------------------------------------------------------------------------ import


def _seconds(code: str) -> float:
    start = time.perf_counter()
    run(code)
    return time.perf_counter() - start


def test_import_costs_at_most_15_percent_over_transformers():
    """Minimum of interleaved runs: noise only ever adds time."""
    alone, both = [], []
    for _ in range(5):
        alone.append(_seconds("import transformers"))
        both.append(_seconds("import transformers, urform"))
    assert min(both) <= 1.15 * min(alone), f"import transformers: {min(alone):.3f} s; with urform: {min(both):.3f} s"


def test_import_loads_neither_torch_nor_transformers():
    heavy = ("torch", "transformers", "triton", "numpy", "peft", "accelerate")
    assert run(f"import sys, urform; print([m for m in {heavy} if m in sys.modules])") == "[]"


@pytest.mark.parametrize(
    ("torch_version", "transformers_version", "named"),
    [
        ("2.11.0", "5.24.3", []),
        ("2.14.1+cpu", "5.17.0", []),
        ("2.14.0", "5.25.0.dev0", ["transformers 5.25.0.dev0"]),
        ("3.0", "6.0.1", ["torch 3.0", "transformers 6.0.1"]),
        ("2.9.1", "5.17.0", ["torch 2.9.1"]),
    ],
)
def test_untested_releases_are_warned_of_once(
    torch_version: str, transformers_version: str, named: list[str], tmp_path: Path
):
    """By the metadata that stands first on the path, whatever else is installed; the modules are not imported."""
    for name, number in (("torch", torch_version), ("transformers", transformers_version)):
        folder = tmp_path / f"{name}-{number}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {number}\n", encoding="utf-8")
    code = """
import sys, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import urform
    from urform.dependencies import TESTED
    import urform.registration
assert not {"torch", "transformers"} & sys.modules.keys()
print(*(str(warning.message) for warning in caught), sep="\\n")
assert [warning.filename for warning in caught] == ["<string>"] * len(caught)  # where it was imported
"""
    said = run(code, PYTHONPATH=str(tmp_path))
    assert said.count("urform is tested with") == bool(named)
    if named:
        ranges = " and ".join(f"{name} {oldest} to {newest}" for name, (oldest, newest) in TESTED.items())
        assert f"urform is tested with {ranges}; installed here: {', '.join(named)}." in said
        assert run("import urform", PYTHONPATH=str(tmp_path), PYTHONWARNINGS="ignore:urform is tested with") == ""


def test_model_import_adds_no_compiler_triton_or_cuda():
    """Transformers' own models import parts of torch's compiler; ours import nothing beyond that."""
    code = """
import sys, torch
{}
assert not torch.cuda.is_initialized()
print(*sorted(m for m in sys.modules if m.startswith(("torch._inductor", "torch._dynamo", "triton", "peft"))))
"""
    assert run(code.format("import urform; urform.attention")) == ""
    stock = run(code.format("from transformers import BertModel"))
    assert set(run(code.format("import urform; urform.UrformModel")).split()) <= set(stock.split())


def test_every_public_name_resolves():
    for name in urform.__all__:
        assert getattr(urform, name) is not None
    assert set(urform.__all__) <= set(dir(urform))
    with pytest.raises(AttributeError, match="UrformForNothing"):
        _ = urform.UrformForNothing


def test_hub_upload_is_an_attribute_and_lazy():
    code = """
import sys, urform
assert "hub_upload" in dir(urform) and "urform.hub_upload" not in sys.modules
print(urform.hub_upload.publish.__module__, urform.hub_upload is sys.modules["urform.hub_upload"])
"""
    assert run(code) == "urform.hub_upload True"


# ------------------------------------------------------------------------------------------------------ registration

CHECK = """
import sys, torch
import transformers
from transformers import AutoConfig, AutoTokenizer
from transformers.models.auto import modeling_auto, tokenization_auto
import urform
from urform.configuration.heads_urform import HEADS
config = AutoConfig.for_model("urform", architecture="encoder", vocab_size=32, hidden_size=16, num_hidden_layers=1,
                              num_attention_heads=2, intermediate_size=32)
assert type(config) is urform.UrformConfig
for auto, (name, _) in HEADS.items():
    mapping = getattr(transformers, auto)._model_mapping
    assert mapping[urform.UrformConfig] is getattr(urform, name), auto
    assert mapping._model_mapping["urform"] == name
    assert type(config) in mapping and getattr(urform, name) in mapping._extra_content.values()
    assert dict(mapping._extra_content)[urform.UrformConfig] is getattr(urform, name)
assert type(transformers.AutoModel.from_config(config)) is urform.UrformModel
assert urform.UrformConfig not in tokenization_auto.TOKENIZER_MAPPING  # see test_installed_code_wins
assert tokenization_auto.tokenizer_class_from_name("UrformTokenizer") is urform.UrformTokenizer
assert "UrformForCausalLM" in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
for module in (transformers, sys.modules["transformers"]):  # two where transformers has executed its __init__ twice
    assert module.UrformForCausalLM is urform.UrformForCausalLM and module.UrformTokenizer is urform.UrformTokenizer
    assert not hasattr(module, "UrformForNothing") and not hasattr(module.models, "UrformForCausalLM")
    assert "UrformForCausalLM" not in dir(module) and not hasattr(module.models.bert, "UrformForCausalLM")
from transformers import UrformConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
assert "urform" in ALL_ATTENTION_FUNCTIONS.valid_keys() and "urform" in ALL_MASK_ATTENTION_FUNCTIONS.valid_keys()
print("ok")
"""


QUICK_ORDERS = [
    "import urform",
    "import urform.modeling.stock_models.attention_interface",
    "from urform import UrformModel",
    "from transformers import Trainer, pipeline; import urform",
]
MORE_ORDERS = [
    "import transformers, urform",
    "import urform; urform.UrformConfig; urform.UrformTokenizer",
    "from urform.configuration.configuration_urform import UrformConfig",
    "from transformers import AutoModel, AutoTokenizer, AutoConfig; import urform",
    "from transformers.modeling_layers import GradientCheckpointingLayer; import urform",
    "import urform; import transformers.models.auto.modeling_auto",
    "import urform; from transformers.models.auto import AutoTokenizer",
    "import urform; import transformers.generation",
    "import urform; import transformers.masking_utils",
    "import urform; import transformers.tokenization_utils_base; import transformers.processing_utils",
    "import pickle; pickle.loads(b'curform.configuration.configuration_urform\\nUrformConfig\\n.')",
    "import pickle; pickle.loads(b'curform.modeling.modeling_urform\\nUrformForCausalLM\\n.')",
    "import importlib, urform, transformers.models.auto.modeling_auto as m; importlib.reload(m)",
]


@pytest.mark.parametrize("first", [*QUICK_ORDERS, *(pytest.param(o, marks=pytest.mark.slow) for o in MORE_ORDERS)])
def test_registered_in_any_order_of_imports(first: str):
    assert run(first + "\n" + CHECK) == "ok"


def test_classes_as_attributes_of_transformers_wait_until_they_are_asked_for():
    code = """
import sys, urform, transformers
first = transformers
import transformers.processing_utils  # executes transformers/__init__.py a second time
second = sys.modules["transformers"]
assert first is not second and first.UrformForCausalLM is second.UrformForCausalLM is urform.UrformForCausalLM
"""
    run(code)
    code = """
import sys, urform, transformers
assert not hasattr(transformers, "NoSuchClass") and "torch" not in sys.modules
transformers.UrformForMaskedLM.__name__
transformers.UrformModel = 7  # whoever sets an attribute of that name has it
print("torch" in sys.modules, transformers.UrformModel, transformers.BertModel.__name__)
"""
    assert run(code) == "True 7 BertModel"


def test_stock_model_with_our_attention_after_a_bare_import():
    code = """
import urform, torch
from transformers import LlamaConfig, LlamaForCausalLM
sizes = dict(vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
model = LlamaForCausalLM(LlamaConfig(**sizes, attn_implementation="urform")).eval().double()
assert model.config._attn_implementation == "urform"
ids = torch.arange(8)[None]
ours = model(ids).logits
model.set_attn_implementation("eager")
torch.testing.assert_close(ours, model(ids).logits)
print("ok")
"""
    assert run(code) == "ok"


def test_tokenizer_folder_without_a_config(tmp_path: Path):
    urform.UrformTokenizer.train(["one two three"] * 9, vocab_size=300).save_pretrained(tmp_path)
    code = f"""
import urform
from transformers import AutoTokenizer
print(type(AutoTokenizer.from_pretrained({str(tmp_path)!r})) is urform.UrformTokenizer)
"""
    assert run(code) == "True"


def test_registration_survives_pickling_of_the_mappings():
    import pickle

    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    assert pickle.loads(pickle.dumps(CONFIG_MAPPING))["urform"] is urform.UrformConfig


@pytest.mark.slow
def test_spawned_process_needs_only_the_import():
    code = """
import multiprocessing, urform
if __name__ == "__main__":
    config = urform.UrformConfig(architecture="encoder", vocab_size=32)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(pool.apply(type, (config,)).__name__)
"""
    assert run(code) == "UrformConfig"


@pytest.mark.parametrize("first", ["import peft, urform", "import urform, peft", "import urform"])
def test_lora_needs_no_target_modules(first: str):
    pytest.importorskip("peft")
    code = """
from urform import UrformConfig, UrformForCausalLM
from peft import LoraConfig, get_peft_model
model = UrformForCausalLM(UrformConfig(architecture="decoder", vocab_size=32, hidden_size=16, num_hidden_layers=1,
                                       num_attention_heads=2, intermediate_size=32))
names = {n.split(".lora_")[0].rsplit(".", 1)[1] for n, p in get_peft_model(model, LoraConfig()).named_parameters()
         if "lora_" in n}
print(sorted(names))
"""
    assert run(first + code) == "['q_proj', 'v_proj']"


def test_other_peoples_trainers_are_as_they_were():
    """The same classes, attributes and default callbacks; nothing of ours is in the Trainer of a stock model."""
    pytest.importorskip("accelerate")
    code = """
import transformers
from transformers import Trainer, TrainingArguments, Seq2SeqTrainer, Seq2SeqTrainingArguments, trainer
from transformers import trainer_callback, training_args
things = [Trainer, TrainingArguments, Seq2SeqTrainer, Seq2SeqTrainingArguments, trainer, trainer_callback,
          training_args, trainer_callback.CallbackHandler, trainer_callback.TrainerState]
before, callbacks = [dict(vars(thing)) for thing in things], list(trainer.DEFAULT_CALLBACKS)
import urform, urform.hub_upload, urform.publishing.trainer_push, urform.training.trainer
urform.UrformModel, urform.UrformTokenizer
for thing, attributes in zip(things, before):
    now = dict(vars(thing))
    changed = [name for name in attributes.keys() | now.keys() if attributes.get(name) is not now.get(name)]
    changed = [name for name in changed if not name.startswith("__")]  # annotations and docs, made when asked for
    assert not changed, (thing, changed)
assert transformers.Trainer is Trainer and transformers.TrainingArguments is TrainingArguments
assert trainer.DEFAULT_CALLBACKS == callbacks

from transformers import BertConfig, BertForMaskedLM
sizes = dict(vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
arguments = TrainingArguments("out", hub_token="hf_secret", report_to="none", use_cpu=True)
made = Trainer(model=BertForMaskedLM(BertConfig(**sizes)), args=arguments)
assert type(arguments.hub_token) is str and "__reduce_ex__" not in vars(type(arguments))
assert not [c for c in made.callback_handler.callbacks if type(c).__module__.startswith("urform")]
ours = Trainer(model=urform.UrformForMaskedLM(urform.UrformConfig(architecture="encoder", **sizes)), args=arguments)
assert type(arguments.hub_token).__name__ == "SecretToken" and ours.model_accepts_loss_kwargs
print("ok")
"""
    assert run(code) == "ok"


# ---------------------------------------------------------------------------------------------------------- layering

# A folder may import only from these (DESIGN.md: dependencies point downwards only). "ground" is dependencies.py.
KERNELS = ("modeling/kernels", "modeling/kernels/blockwise", "modeling/kernels/triton")
BELOW = {"publishing", "modeling", "modeling/kernels", "configuration", "tokenization", "ground"}
MAY_IMPORT = {
    "modeling/kernels": {*KERNELS},
    "modeling/kernels/blockwise": {*KERNELS},
    "modeling/kernels/triton": {*KERNELS},
    "modeling/stock_models": {"modeling/stock_models", "modeling/kernels"},
    "configuration": {"configuration"},
    "tokenization": {"tokenization", "configuration"},
    "modeling": {"modeling", "modeling/stock_models", "modeling/kernels", "configuration"},
    "training": {"training", *BELOW},
    "conversion": {"conversion", *BELOW},
    "diagnostics": {"diagnostics", *BELOW},
    "publishing": {"publishing", "modeling", "configuration", "ground"},
    "cli": {"cli", "training", "conversion", "diagnostics", "top", *BELOW},
}
# The files at the top of the package. Nothing below may import `urform` itself: that is a circle through __init__.py.
TOP = {"dependencies": "ground", "registration": "top", "hub_upload": "top", "__init__": "the package itself"}


def _modules() -> dict[str, Path]:
    """Every module of the package by its dotted name without `urform`; the package itself is `__init__`."""
    files = [*ROOT.glob("*.py"), *(p for folder in MAY_IMPORT for p in (ROOT / folder).rglob("*.py"))]
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in files if path.stem != "setup"}
    return {name.removesuffix(".__init__"): path for name, path in names.items()}


def _imports(name: str, modules: dict[str, Path]) -> list[tuple[int, str]]:
    """(line, module) of every import of urform in a module, wherever it stands: in functions and lazily, too."""
    path, found = modules[name], []
    package = name.split(".") if path.stem == "__init__" and name != "__init__" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            targets = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ["urform", *package][: len(package) + 2 - node.level] if node.level else []
            base += node.module.split(".") if node.module else []
            targets = [[*base, alias.name] for alias in node.names]
        else:
            continue
        for top, *rest in targets:
            if top == "urform":
                while rest and ".".join(rest) not in modules:  # a name in a module
                    rest.pop()
                found.append((node.lineno, ".".join(rest) or "__init__"))
    return found


def _circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """The strongly connected components of more than one module (or of one that imports itself), by reachability."""
    reached = {name: set(targets) for name, targets in graph.items()}
    changed = True
    while changed:
        changed = False
        for targets in reached.values():
            more = set().union(*(reached[target] for target in targets)) - targets
            targets |= more
            changed = changed or bool(more)
    groups = {frozenset(m for m in reached[n] if n in reached[m]) for n in graph if n in reached[n]}
    return sorted(map(set, groups), key=sorted)


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_dependencies_point_downwards(folder: str):
    modules, wrong = _modules(), []
    for name, path in modules.items():
        if path.parent != ROOT / folder:
            continue
        for line, target in _imports(name, modules):
            top = modules[target].parent == ROOT
            place = TOP[target] if top else modules[target].parent.relative_to(ROOT).as_posix()
            if place not in MAY_IMPORT[folder]:
                wrong.append(f"{path}:{line}: imports {target} ({place})")
    assert not wrong, "\n".join(wrong)


def test_no_import_goes_in_a_circle():
    """Over all imports of all files, those in functions and under TYPE_CHECKING too; and none through the package."""
    modules = _modules()
    graph = {name: {target for _, target in _imports(name, modules)} for name in modules}
    circles = _circles(graph)
    assert not circles, circles
    assert not [name for name, targets in graph.items() if "__init__" in targets]
    assert "modeling.modeling_urform" in graph["publishing.checkpoint_checks"]  # in a function: it is seen


def test_a_circle_would_be_found():
    assert _circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}, "e": {"e"}}) == [{"a", "b", "c"}, {"e"}]
    assert _circles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_kernels_know_no_transformers_and_no_config():
    for path in (ROOT / "modeling/kernels").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            names += [a.name for a in node.names] if isinstance(node, ast.Import) else []
            assert not [n for n in names if n.split(".")[0] == "transformers"], f"{path}:{node.lineno}"


def test_module_basenames_are_unique():
    names = [p.stem for f in FOLDERS for p in (ROOT / f).glob("*.py") if p.name != "__init__.py"]
    assert len(names) == len(set(names)), sorted(n for n in names if names.count(n) > 1)


# -------------------------------------------------------------------------------------------------------- house rules

# Places where a layout by hand is kept from the formatter. Lower the number when one goes; none is added.
FORMATTED_BY_HAND = {"tests": 94, "the package": 83}


def test_no_new_places_are_kept_from_the_formatter():
    found = dict.fromkeys(FORMATTED_BY_HAND, 0)
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT).parts
        if not {*SKIPPED, ".venv-newest", ".venv-oldest", ".venv-tools"} & {*parts}:
            text = path.read_text(encoding="utf-8")
            assert "fmt: " + "off" not in text, path
            found["tests" if parts[0] == "tests" else "the package"] += text.count("# fmt: " + "skip")
    assert all(found[where] <= most for where, most in FORMATTED_BY_HAND.items()), found


def test_exceptions_to_the_limit_of_branches_are_few_and_named():
    known = {"hub_upload.py:publish": 20, "modeling/kernels/a.py:attention": 26}
    assert list(complaints({}, {})) == [] == list(complaints({"a.py:f": 25}, {"a.py:f": "why"}))
    said = list(complaints(known, {"modeling/kernels/a.py:attention": "why", "modeling/x.py:f": "why"}))
    assert [line.partition(": ")[0] for line in said] == [*known, "modeling/x.py:f", "modeling/x.py:f"]
    assert len(list(complaints({f"{i}": 20 for i in range(9)}, {f"{i}": "why" for i in range(9)}))) == 1
    assert len(EXCEPTIONS) <= MOST_EXCEPTIONS


def test_the_workflow_runs_what_everybody_runs():
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))["jobs"]
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")  # Python 3.10 has no tomllib
    classifiers = re.findall(r"Programming Language :: Python :: (3\.\d+)", text)
    assert jobs["run"]["strategy"]["matrix"]["python"] == classifiers
    assert jobs["run"]["steps"][-1] == {"run": ".ci/run"} and (ROOT / ".ci/run").is_file()
    targets = {line.partition(":")[0] for line in (ROOT / "Makefile").read_text(encoding="utf-8").splitlines()}
    assert {*jobs["ends"]["strategy"]["matrix"]["target"]} == {"test-oldest", "test-newest"} <= targets


# ------------------------------------------------------------------------------------------------------------- wheel


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the files that git knows or would add, or of an unpacked sdist: the checkout stays clean."""
    listing = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    names = listing.stdout.splitlines()
    if listing.returncode:
        names = [path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*") if not SKIPPED & {*path.parts}]
    source = tmp_path_factory.mktemp("source")
    for name in names:
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, source / name)
    return source


def build(kind: str, source: Path, out: Path) -> Path:
    """Build an sdist or a wheel as pip does, in this environment; return the file."""
    out.mkdir(exist_ok=True)
    code = f"import sys, setuptools.build_meta as b; print(b.build_{kind}(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", code, str(out)], cwd=source, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return out / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def sdist(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unpacked source distribution."""
    pytest.importorskip("setuptools")
    out = tmp_path_factory.mktemp("sdist")
    with tarfile.open(build("sdist", source, out / "file")) as archive:
        archive.extractall(out, filter="data")
    return out / f"urform-{urform.__version__}"


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel, built from the source distribution."""
    return build("wheel", sdist, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def wheel_names(wheel: Path) -> list[str]:
    assert wheel.name.startswith(f"urform-{urform.__version__}-")
    return zipfile.ZipFile(wheel).namelist()


def metadata_of(wheel: Path) -> Message:
    name = f"urform-{urform.__version__}.dist-info/METADATA"
    return HeaderParser().parsestr(zipfile.ZipFile(wheel).read(name).decode())


def test_sdist_holds_the_repository(source: Path, sdist: Path):
    names = {path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()}
    names = {name for name in names if not name.startswith(("urform.egg-info/", "PKG-INFO"))}
    there = {path.relative_to(sdist).as_posix() for path in sdist.rglob("*") if path.is_file()}
    assert not names - there


@pytest.mark.slow
def test_tests_of_the_sdist_find_their_helpers(sdist: Path, tmp_path: Path):
    """Every test module is imported, and a few tests run, with the sdist's urform."""
    (tmp_path / "urform").symlink_to(sdist, target_is_directory=True)
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    code = "import pytest, sys, urform; print(urform.__file__); sys.exit(pytest.main(sys.argv[1:]))"
    command = [
        sys.executable,
        "-c",
        code,
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/modeling/test_seeds.py",
        "tests/configuration/test_presets.py",
    ]
    done = subprocess.run(
        [*command, "-k", "seed or list"], cwd=sdist, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and str(tmp_path) in done.stdout, done.stdout + done.stderr


@pytest.mark.slow
def test_all_tests_of_the_sdist_are_collected(sdist: Path, tmp_path: Path):
    (tmp_path / "urform").symlink_to(sdist, target_is_directory=True)
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=sdist, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr


def test_metadata(wheel: Path):
    said = metadata_of(wheel)
    for minor in range(10, 14):
        assert f"Programming Language :: Python :: 3.{minor}" in said.get_all("Classifier")
    assert said["Description-Content-Type"] == "text/markdown"
    text = said.get_payload()
    assert "one Transformer for the Hugging Face stack" in text and "docs/attention.md" in text
    assert not [link for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith("https://")]
    needs = said.get_all("Requires-Dist")
    for name, least in NEEDS.items():
        assert f"{name}>={least}" in needs  # no upper bound stands in a user's way
    tested = {Requirement(line).name: Requirement(line).specifier for line in needs if 'extra == "tested"' in line}
    assert tested.keys() == {"torch", "transformers"}
    for name, (oldest, newest) in TESTED.items():
        major, minor = newest.split(".")
        assert oldest == NEEDS[name] and tested[name] == SpecifierSet(f">={oldest},<{major}.{int(minor) + 1}")


def test_address_and_links():
    setup = runpy.run_path(str(ROOT / "setup.py"))
    web = setup["web_address"]
    for remote in (
        "https://host.org/me/urform.git",
        "https://me:hf_secret@host.org/me/urform",
        "https://x@host.org/me/urform/",
        "git@host.org:me/urform.git",
        "ssh://git@host.org/me/urform.git",
        "ssh://git@host.org:22/me/urform",
    ):
        assert web(remote) == "https://host.org/me/urform", remote
    for remote in ("/srv/urform.git", "../urform", "file:///srv/urform", ""):
        assert web(remote) == "", remote
    text = "[a](docs/a.md) [b](https://x.org/b) [c](#c) ![d](d.png) `e` [f, g](CONTRIBUTING.md)"
    assert setup["long_description"](text, "") == "a [b](https://x.org/b) [c](#c) ![d](d.png) `e` f, g"
    assert setup["long_description"](text, "https://h.org/u") == (
        "[a](https://h.org/u/blob/HEAD/docs/a.md) [b](https://x.org/b) [c](#c) ![d](d.png) `e` "
        "[f, g](https://h.org/u/blob/HEAD/CONTRIBUTING.md)"
    )


def test_pictures_of_the_long_description():
    setup = runpy.run_path(str(ROOT / "setup.py"))
    text = '<img src="docs/images/a.png" width="50%" alt="a"> and <img alt="b" src="https://x.org/b.png">'
    kept = '<img alt="b" src="https://x.org/b.png">'
    assert setup["long_description"](text, "") == f" and {kept}"
    there = '<img src="https://h.org/u/raw/HEAD/docs/images/a.png" width="50%" alt="a">'
    assert setup["long_description"](text, "https://h.org/u") == f"{there} and {kept}"


def test_a_checkout_with_a_public_remote_names_it(source: Path, tmp_path: Path):
    """In the metadata of the sdist, and of the wheel that is built from it elsewhere."""
    checkout = Path(shutil.copytree(source, tmp_path / "checkout"))
    subprocess.run(["git", "init", "-q"], cwd=checkout, check=True)
    subprocess.run(
        ["git", "remote", "add", "origin", "https://me:secret@host.org/me/urform.git"], cwd=checkout, check=True
    )
    with tarfile.open(build("sdist", checkout, tmp_path / "file")) as archive:
        archive.extractall(tmp_path, filter="data")
    said = metadata_of(build("wheel", tmp_path / f"urform-{urform.__version__}", tmp_path / "wheel"))
    assert "Repository, https://host.org/me/urform" in said.get_all("Project-URL")
    assert "(https://host.org/me/urform/blob/HEAD/docs/attention.md)" in said.get_payload()
    assert "secret" not in str(said)


def test_constraints_suit_the_tools_that_users_bring():
    """pip takes versions that are years old, without a word, where a pin and a tool's newest do not go together."""
    lines = [line.partition(" #")[0] for line in (ROOT / "constraints.txt").read_text().splitlines() if line[0] != "#"]
    pins = {r.name.lower(): next(iter(r.specifier)).version for r in map(Requirement, lines)}
    wanted = ["pillow>=8,<13", "typer>=0.12,<1", "pydantic>=2,<=3", "numpy>=1,<3", "jinja2<4", "markupsafe>=2,<4",
              "huggingface_hub>=1.16,<3", "pyyaml>=5,<7"]  # gradio 6.31, trackio 0.43  # fmt: skip
    for requirement in map(Requirement, wanted):
        assert requirement.specifier.contains(pins[requirement.name]), requirement


def test_wheel_holds_one_package_and_no_tests_or_data(wheel_names: list[str]):
    tops = {name.split("/")[0] for name in wheel_names}
    assert tops == {"urform", f"urform-{urform.__version__}.dist-info"}
    folders = {name.split("/")[1] for name in wheel_names if name.startswith("urform/") and name.count("/") > 1}
    allowed = {*"configuration modeling tokenization training conversion diagnostics publishing cli".split()}
    assert folders <= allowed, folders - allowed
    suffixes = {Path(name).suffix for name in wheel_names if name.startswith("urform/")}
    assert suffixes <= {".py", ".yaml", ".typed"}, suffixes


def test_wheel_holds_every_module(wheel_names: list[str]):
    top = {"__init__.py", "hub_upload.py", "registration.py", "dependencies.py", "py.typed"}
    assert {f"urform/{name}" for name in top} <= set(wheel_names)
    assert "urform/setup.py" not in wheel_names
    packages = [*FOLDERS, "conversion", "training", "training/recipes", "diagnostics", "publishing", "cli"]
    for folder in packages:
        for path in (ROOT / folder).iterdir():
            if path.suffix in (".py", ".yaml"):
                assert f"urform/{folder}/{path.name}" in wheel_names, path
    assert any(name.endswith("licenses/LICENSE") for name in wheel_names)
