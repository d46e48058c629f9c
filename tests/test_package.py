"""The package as such: the cost of its import, registration in any order, its layering, what is in the wheel."""

import ast
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

import urform

ROOT = Path(urform.__file__).resolve().parent


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


# ------------------------------------------------------------------------------------------------------ registration

CHECK = """
import sys, torch
import transformers
from transformers import AutoConfig, AutoTokenizer
from transformers.models.auto import modeling_auto, tokenization_auto
import urform
from urform.configuration.bundle_urform import HEADS
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
assert urform.UrformConfig not in tokenization_auto.TOKENIZER_MAPPING  # see test_hub_precedence.py
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
    "import urform.modeling.attention_interface",
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
model = LlamaForCausalLM(LlamaConfig(**sizes, attn_implementation="urform")).eval()
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


# ---------------------------------------------------------------------------------------------------------- layering

# A folder may import only from these (DESIGN.md: dependencies point downwards only).
MAY_IMPORT = {
    "modeling/kernels": {"modeling/kernels"},
    "configuration": {"configuration"},
    "tokenization": {"tokenization", "configuration"},
    "modeling": {"modeling", "modeling/kernels", "configuration"},
    "training": {"training", "publishing", "modeling", "modeling/kernels", "configuration", "tokenization", ""},
    "conversion": {"conversion", "modeling", "modeling/kernels", "configuration", "tokenization", ""},
    "diagnostics": {"diagnostics", "modeling", "modeling/kernels", "configuration"},
    "publishing": {"publishing", "configuration", ""},
}


def _urform_imports(path: Path) -> list[tuple[int, str]]:
    """(line, folder relative to the root) of every import of urform in a file; "" is the top of the package."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        targets = []
        if isinstance(node, ast.ImportFrom) and node.level:
            base = path.parent
            for _ in range(node.level - 1):
                base = base.parent
            targets.append(base.joinpath(*(node.module or "").split(".")))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "urform":
            targets.append(ROOT.joinpath(*(node.module or "").split(".")[1:]))
        elif isinstance(node, ast.Import):
            names = [a.name.split(".") for a in node.names]
            targets += [ROOT.joinpath(*parts[1:]) for parts in names if parts[0] == "urform"]
        for target in targets:
            folder = target if target.is_dir() else target.parent
            relative = folder.relative_to(ROOT).as_posix()
            found.append((node.lineno, "" if relative == "." else relative))
    return found


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_dependencies_point_downwards(folder: str):
    wrong = [
        f"{path}:{line}: imports from {target or 'the top of the package'}"
        for path in sorted((ROOT / folder).glob("*.py"))
        for line, target in _urform_imports(path)
        if target not in MAY_IMPORT[folder]
    ]
    assert not wrong, "\n".join(wrong)


def test_kernels_know_no_transformers_and_no_config():
    for path in (ROOT / "modeling/kernels").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            names += [a.name for a in node.names] if isinstance(node, ast.Import) else []
            assert not [n for n in names if n.split(".")[0] == "transformers"], f"{path}:{node.lineno}"


def test_module_basenames_are_unique():
    folders = ("configuration", "modeling", "modeling/kernels", "tokenization")
    names = [p.stem for f in folders for p in (ROOT / f).glob("*.py") if p.name != "__init__.py"]
    assert len(names) == len(set(names)), sorted(n for n in names if names.count(n) > 1)


# ------------------------------------------------------------------------------------------------------------- wheel


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Names in a wheel built from a copy of the files that git knows or would add (the checkout stays clean)."""
    pytest.importorskip("setuptools")
    import shutil

    listing = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listing.returncode:
        pytest.skip("not a git checkout")
    source = tmp_path_factory.mktemp("source")
    for name in listing.stdout.split("\n"):
        if name and (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, source / name)
    out = tmp_path_factory.mktemp("wheel")
    build = "import sys, setuptools.build_meta as b; print(b.build_wheel(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", build, str(out)], cwd=source, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = out.glob("urform-*.whl")
    assert wheel.name.startswith(f"urform-{urform.__version__}-")
    return zipfile.ZipFile(wheel).namelist()


def test_wheel_holds_one_package_and_no_tests_or_data(wheel_names: list[str]):
    tops = {name.split("/")[0] for name in wheel_names}
    assert tops == {"urform", f"urform-{urform.__version__}.dist-info"}
    folders = {name.split("/")[1] for name in wheel_names if name.startswith("urform/") and name.count("/") > 1}
    allowed = {*"configuration modeling tokenization training conversion diagnostics publishing cli".split()}
    assert folders <= allowed, folders - allowed
    suffixes = {Path(name).suffix for name in wheel_names if name.startswith("urform/")}
    assert suffixes <= {".py", ".yaml", ".typed"}, suffixes


def test_wheel_holds_every_module(wheel_names: list[str]):
    assert {"urform/__init__.py", "urform/hub_upload.py", "urform/registration.py", "urform/py.typed"} <= set(
        wheel_names
    )
    packages = ["configuration", "modeling", "modeling/kernels", "tokenization", "training", "training/recipes",
                "diagnostics", "publishing", "cli"]  # fmt: skip
    for folder in packages:
        for path in (ROOT / folder).iterdir():
            if path.suffix in (".py", ".yaml"):
                assert f"urform/{folder}/{path.name}" in wheel_names, path
    assert any(name.endswith("licenses/LICENSE") for name in wheel_names)
