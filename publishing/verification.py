"""Verification of a bundle before it is published: what others will do with it is done here first, in clean processes.

The bundle is laid out as huggingface_hub's cache would have it after a download, so that the repository's name loads it
offline, and three processes are started that know no token and no setting of the user's Hugging Face environment:

- *bare*: the Python of this process without its site-packages, with torch, transformers and what these two require
  linked into a folder (no Urform, no Triton, nothing else): every Auto class by `trust_remote_code=True`;
- *installed*: this environment, with `import urform`;
- the outputs of both for the same inputs must be equal bit by bit, and generation token by token;
- the snippets of the model card run, word for word, each in the environment that it is for.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path

from ..configuration.checkpoint_files import read_json, refuse_links
from ..configuration.heads_urform import auto_map
from .card_snippets import auto_class
from .card_template import MARK
from .checkpoint_checks import has_tokenizer

_LEFT_OUT = {"urform", "triton"}
_ONE_BY_ONE = 2_000_000_000  # bytes of weights above which the processes do not share the memory
_SETTINGS = re.compile(
    r"^(HF_|HUGGING|PYTHON|TRANSFORMERS_|TRITON_|PYTEST|COV_|VIRTUAL_ENV|.*(TOKEN|SECRET|PASSWORD|KEY))"
)

_LOAD = """
import json, sys
bare, repo_id, auto, heads, out, has_tokenizer, snippets = json.loads(sys.argv[1])
if not bare:
    import urform
import torch, transformers
from safetensors.torch import save_file

options = {"trust_remote_code": True} if bare else {}
model = getattr(transformers, auto).from_pretrained(repo_id, **options).eval()
home = type(model).__module__.partition(".")[0]
if home != ("transformers_modules" if bare else "urform"):
    raise SystemExit(f"{type(model)} was loaded; it should come from the " + ("bundle" if bare else "installed urform"))
for head in heads:
    with torch.device("meta"):
        getattr(transformers, head).from_config(model.config, **options)
ids = torch.arange(12).reshape((1, 2, 6) if "MultipleChoice" in auto else (2, 6)) % model.config.vocab_size
inputs = {"input_ids": ids}
if model.config.is_encoder_decoder and auto in ("AutoModel", "AutoModelForSeq2SeqLM"):
    inputs["decoder_input_ids"] = ids.flip(-1)
with torch.inference_mode():
    results = {"output": model(**inputs)[0].contiguous()}
    if model.can_generate():
        settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False}
        results["generated"] = model.generate(input_ids=ids, **settings).contiguous()
if has_tokenizer:
    tokenizer = transformers.AutoTokenizer.from_pretrained(repo_id, **options)
    results["tokens"] = torch.tensor(tokenizer("1 2 3 Käse 中文")["input_ids"])
save_file(results, out)
for snippet in snippets:
    print("# this snippet of the model card:", snippet, sep="\\n", flush=True)
    exec(compile(snippet, "<snippet>", "exec"), {"__name__": "__main__"})
"""


def verify_bundle(
    directory: str | os.PathLike[str],
    repo_id: str | None = None,
    scratch: str | os.PathLike[str] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """Load and run a bundle in clean processes, without and with Urform.

    Args:
        directory: the bundle, or a checkpoint without code (then only the installed Urform is tried).
        repo_id: the name under which it will be published; None takes the one that the card's snippets load.
        scratch: an empty folder for the processes; None makes one and removes it.
        say: called with a line for each thing that was found right.

    Raises:
        ValueError: with the process's error, when something does not load, does not run, or differs.
    """
    with contextlib.ExitStack() as stack:
        home = Path(scratch if scratch is not None else stack.enter_context(tempfile.TemporaryDirectory()))
        bundle = Path(directory).resolve()
        refuse_links(bundle, everything=True)
        codes = list(card_snippets(bundle))
        outputs = _run_bundle(bundle, repo_id or _name_in(codes), home, codes)
        _compare(outputs)
    if len(outputs) > 1:
        say("loads and runs without urform, by trust_remote_code=True")
    say("loads and runs with the installed urform" + (", with the same outputs to the bit" if len(outputs) > 1 else ""))
    if codes:
        say(f"{len(codes)} snippets of the card ran")


def _name_in(codes: list[str]) -> str:
    """Return the repository that the snippets of a card load."""
    named = re.search(r'from_pretrained\("([^"]+)"', "".join(codes))
    return named[1] if named else "local/bundle"


def _run_bundle(bundle: Path, repo_id: str, home: Path, codes: list[str]) -> list[Path]:
    """Load and run a bundle in clean processes, side by side unless it is large; return the files of their outputs.

    Raises:
        ValueError: a process failed; with what it wrote.
    """
    config = read_json(bundle / "config.json")
    cache_as_downloaded(bundle, repo_id, home / "hub")
    packages = link_packages(home / "packages")
    auto, has_code = auto_class(config), (bundle / "modeling_urform.py").is_file()
    served = auto_map(config.get("architecture", "encoder-decoder"))
    heads = [name for name in served if name not in (auto, "AutoConfig")]
    large = sum(path.stat().st_size for path in bundle.glob("*.safetensors")) > _ONE_BY_ONE
    runs: dict[str, tuple[Path, subprocess.Popen[str]]] = {}
    ended: dict[str, tuple[str, int]] = {}
    for kind in ("bare", "installed") if has_code else ("installed",):
        bare, out = kind == "bare", home / f"{kind}.safetensors"
        own = [code for code in codes if ("import urform\n" in code) != bare]
        asked = json.dumps([bare, repo_id, auto, heads, str(out), has_tokenizer(bundle), own])
        runs[kind] = out, _start(_LOAD, packages if bare else None, home, asked)
        if large:
            ended[kind] = _end(runs[kind][1])
    ended |= {kind: _end(process) for kind, (_, process) in runs.items() if kind not in ended}
    _check_ended(ended)
    return [out for out, _ in runs.values()]


def _check_ended(ended: dict[str, tuple[str, int]]) -> None:
    for kind, (output, status) in ended.items():
        if status:
            where = "without urform" if kind == "bare" else "with the installed urform"
            raise ValueError(f"The bundle does not load and run {where}:\n{output.strip()}")


def card_snippets(bundle: Path) -> Iterator[str]:
    """Yield the code of a card that Urform wrote; a person's card is not run."""
    card = bundle / "README.md"
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    if MARK in text:
        yield from re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def cache_as_downloaded(bundle: Path, repo_id: str, cache: Path) -> None:
    """Lay a bundle out as `snapshot_download` leaves the repository `repo_id` in its cache."""
    commit = "0" * 40
    repository = cache / f"models--{repo_id.replace('/', '--')}"
    shutil.copytree(bundle, repository / "snapshots" / commit, copy_function=_link)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)


def _link(source: str, target: str) -> None:
    source = os.path.realpath(source)
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copyfile(source, target)


def link_packages(folder: Path) -> Path:
    """Make a folder with torch, transformers and what they require, as links; return it."""
    folder.mkdir(parents=True)
    waiting, seen = ["torch", "transformers"], set(_LEFT_OUT)
    while waiting:
        name = waiting.pop()
        if (key := re.sub(r"[-_.]+", "-", name).lower()) in seen:
            continue
        seen.add(key)
        try:
            found = distribution(name)
        except PackageNotFoundError:
            continue  # an optional package of a package, or one that another provides
        waiting += _requirements(found)
        for top in _tops(found):
            target = folder / top.name
            if not target.exists() and top.exists():
                os.symlink(top, target, target_is_directory=top.is_dir())
    for name in ("torch", "transformers"):
        if not (folder / name).exists():  # an editable installation: its files lie elsewhere
            spec = find_spec(name)
            if spec is None or not spec.submodule_search_locations:
                raise ValueError(f"{name} is not installed as a package; verification cannot make a clean copy of it.")
            os.symlink(spec.submodule_search_locations[0], folder / name, target_is_directory=True)
    return folder


def _requirements(found: Distribution) -> Iterator[str]:
    from packaging.requirements import Requirement

    for line in found.requires or []:
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield requirement.name


def _tops(found: Distribution) -> Iterator[Path]:
    """Yield the top-level files and folders of a distribution that lie in its site-packages."""
    names = {file.parts[0] for file in found.files or [] if file.parts[0] not in ("..", "__pycache__", "bin")}
    for name in sorted(names):
        if not name.endswith(".pth"):
            yield Path(str(found.locate_file(name)))


def _start(code: str, packages: Path | None, home: Path, argument: str) -> subprocess.Popen[str]:
    """Start Python: bare with `packages` only, or this environment; offline, with the cache in `home`."""
    modules = home / ("modules" if packages is None else "modules_bare")
    env = {name: value for name, value in os.environ.items() if not _SETTINGS.match(name)}
    env |= {"HF_HOME": str(home), "HF_HUB_CACHE": str(home / "hub"), "HF_MODULES_CACHE": str(modules)}
    env |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", code, argument]
    if packages is not None:
        start = f"import sys; sys.path.append({str(packages)!r})\n"
        command = [sys.executable, "-I", "-S", "-X", "utf8", "-c", start + code, argument]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, cwd=home, env=env, text=True, encoding="utf-8", errors="replace", **pipes)  # type: ignore[call-overload]


def _end(process: subprocess.Popen[str]) -> tuple[str, int]:
    """Wait for a process; return what it wrote and its exit code."""
    return process.communicate()[0], process.returncode


def _compare(results: list[Path]) -> None:
    import torch
    from safetensors.torch import load_file

    first, *rest = [load_file(path) for path in results]
    for other in rest:
        for name, tensor in first.items():
            if name not in other or not torch.equal(tensor, other[name]):
                raise ValueError(f"The bundle's own code and the installed urform differ in {name!r} for one input.")
