"""Every block of code in the documentation is run as it stands, with small data under the names that it uses.

Python blocks run in order, one namespace for each document (README's as scripts in processes of their own). In shell
blocks every line is a command: `urform` and the benchmarks run with the arguments of `SMALLER` added, targets of make
are resolved by `make -n`, pip's requirements are looked up. A block whose lines begin with `--` lists options of the
command in its heading. Drawings are blocks in `text`. What is not run stands in `NOT_RUN`, with the reason; what takes
long is in `SLOW`.
"""

import gzip
import importlib.metadata
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
import yaml
from packaging.requirements import Requirement
from torch import nn
from toy_training import toy_recipe
from transformers import Qwen3Config, Qwen3ForCausalLM
from typer.testing import CliRunner

import urform
from urform.cli.main import app
from urform.hub_upload import write_bundle
from urform.publishing.model_card import read_card_data

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = ["README.md", "CONTRIBUTING.md", "benchmarks/results/README.md"]
DOCUMENTS += sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md"))

# Commands that no test runs, each with its reason.
NOT_RUN = {
    "pre-commit install": "writes a hook into the checkout's .git; `make lint` runs the same linters",
    'python -c "import urform; from transformers.cli.transformers import app; app()" serve out --port 8000': (
        "a server, which does not end; tests/tools/test_tools_serve.py runs it"
    ),
    'python -c "import urform; from trl.cli import main; main()" sft --model_name_or_path out --dataset_name my_data': (
        "needs TRL; tests/tools/test_tools_trl.py runs it"
    ),
    "urform evaluate out --lm-eval hellaswag": (
        "needs lm-eval and the real Hub; tests/tools/test_tools_lm_eval.py runs it"
    ),
    "urform evaluate out --lm-eval hellaswag --lm-eval arc_easy": "the same",
    "urform evaluate out --lm-eval my_task --include-path my_tasks --num-fewshot 2 --limit 100": "the same",
}
# Commands, by their beginning, that only the slow test runs, in processes of their own.
SLOW = {
    "torchrun": "two processes that import everything",
    "accelerate launch": "two processes that import everything",
    "urform doctor kernels --device cpu": "the whole table, whose rows are compared",
}
# Added to commands, by their beginning: in the quick test, in the slow one.
TINY_MODEL = "model.config.hidden_size=16 model.config.num_hidden_layers=1 model.config.num_attention_heads=2"
TINY_MODEL += " model.config.intermediate_size=32 tokenizer.vocab_size=320"
TINY_RUN = "max_steps=10 warmup_steps=2 save_steps=1 logging_steps=5 tokens_per_batch=300 use_cpu=true bf16=false"
TINY_DEMO = " ".join(f"--set {change}" for change in f"{TINY_MODEL} {TINY_RUN}".split())
SMALLER = {
    "urform train --list": ("", ""),
    "urform train": (f"{TINY_RUN} {TINY_MODEL}",) * 2,
    "urform demo": (f"--train-phrases 60 --test-phrases 4 {TINY_DEMO}",) * 2,
    "urform push outputs/demo/model": ("--no-code", ""),  # the rest of the command says where the bundle goes
    "urform push": ("--dry-run --no-code", "--dry-run"),
    "urform doctor kernels --device cpu": ("", ""),
    "urform doctor kernels": ("--backend linear_cross_entropy",) * 2,
    "accelerate launch": ("", "--output-dir outputs/launched"),  # the line above it has filled the default folder
    "python benchmarks/": ("--quick --threads 1 --repeats 2 --warmup 1 --no-record",) * 2,
}
# Python blocks, by a word in them, that two processes run, in the slow test.
TWO_PROCESSES = {"DistributedConfig"}
# Words of commands that stand for something else than the file or folder of that name in the working folder.
WORDS = {
    "urform convert SRC DST [--to FAMILY]": {"SRC": "DST", "DST": "BACK"},  # back what the line above it has made
    "urform train multi30k-en-de data_dir=/data/multi30k": {"data_dir=/data/multi30k": "data_dir=data/multi30k"},
}
EXIT_CODES = {"urform doctor isolation llama-tiny": 1}  # it leaks, as the document shows


# ----------------------------------------------------------------------------------------------- what the documents say


@dataclass(frozen=True)
class Block:
    """A fenced block: its place, language, last heading and lines."""

    document: str
    line: int
    language: str
    heading: str
    lines: tuple[str, ...]

    @property
    def place(self) -> str:
        return f"{self.document}:{self.line}"

    @property
    def kind(self) -> str:
        """The language, with "sh" for none, or "options"."""
        if self.language in ("", "sh"):
            return "options" if all(line.startswith("--") for line in self.lines) else "sh"
        return self.language


def blocks(document: str) -> list[Block]:
    """Return the fenced blocks of a document; a block that is only indented is an error."""
    found: list[Block] = []
    heading, inside, start, content, before = "", None, 0, list[str](), ""
    for number, line in enumerate((ROOT / document).read_text(encoding="utf-8").splitlines(), 1):
        fence = re.match(r"```(\w*)\s*$", line)
        if inside is None and fence:
            inside, start, content = fence[1], number, []
        elif inside is not None and line.startswith("```"):
            found.append(Block(document, start, inside, heading, tuple(content)))
            inside = None
        elif inside is not None:
            content.append(line)
        elif line.startswith("#"):
            heading = line.strip("# `")
        elif before == "" and line.startswith("    "):
            pytest.fail(f"{document}:{number}: write blocks of code between fences")
        before = line
    assert inside is None, f"{document}:{start}: the block does not end"
    return found


def commands(block: Block) -> list[tuple[str, list[str]]]:
    """Return the commands of a shell block, each with the output shown below it (blocks with `$ ` show output)."""
    lines = "\n".join(block.lines).replace("\\\n", " ").split("\n")
    if not any(line.startswith("$ ") for line in lines):
        return [(part.strip(), []) for line in lines for part in line.split("&&") if shlex.split(part, comments=True)]
    found: list[tuple[str, list[str]]] = []
    for line in lines:
        if line.startswith("$ "):
            found.append((line[2:], []))
        else:
            found[-1][1].append(line)
    return found


def normal(command: str) -> str:
    """Return a command without its comment and with single spaces."""
    return " ".join(re.sub(r"(^|\s)#.*", "", command).split())


def options_of(path: list[str]) -> set[str]:
    """Return the options of a `urform` command, named by its verbs."""
    command: Any = typer.main.get_command(app)
    for verb in path:
        assert verb in getattr(command, "commands", {}), f"urform {' '.join(path)}: no such command"
        command = command.commands[verb]
    return {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)} | {"--help"}


def check_options(place: str, command: str) -> None:
    """Hold a command of `urform` that is not run to the verbs and options that there are."""
    words = command.split()
    path = words[1:3] if words[1] == "doctor" and len(words) > 2 else words[1:2]
    unknown = {word.partition("=")[0] for word in words if word.startswith("--")} - options_of(path)
    assert not unknown, f"{place}: `{command}`: no option {sorted(unknown)}"


# ------------------------------------------------------------------------------------------- what stands ready for them


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files and models that the documents name, small."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("stand-ins")
    toy_recipe(folder / "toy", save_steps=12).rename(folder / "my.yaml")
    for split, names in {"train": ["train"], "val": ["dev", "val"], "test": ["test", "test_2016_flickr"]}.items():
        for side, languages in {"src": ["en"], "tgt": ["xx", "de"]}.items():
            text = (folder / f"toy/{split}.{side}").read_bytes()
            for name in (f"{name}.{language}" for name in names for language in languages):
                (folder / name).write_bytes(text)
                (folder / "data/multi30k").mkdir(parents=True, exist_ok=True)
                (folder / f"data/multi30k/{name}.gz").write_bytes(gzip.compress(text))
    tokenizer = urform.UrformTokenizer.train(["one two three", "eins zwei drei"] * 9, vocab_size=300)
    config = urform.UrformConfig.from_preset("tiny-encoder-decoder", vocab_size=len(tokenizer))
    model = urform.UrformForConditionalGeneration(config)
    for name in ("CHECKPOINT", "MODEL"):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    config = urform.UrformConfig.from_preset("tiny-decoder", vocab_size=len(tokenizer))
    urform.UrformForCausalLM(config).save_pretrained(folder / "DECODER")
    write_bundle(folder / "CHECKPOINT", folder / "PATH_OR_ID")
    sizes = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
             "intermediate_size": 48, "max_position_embeddings": 64}  # fmt: skip
    qwen = Qwen3ForCausalLM(Qwen3Config(**sizes, num_key_value_heads=2, head_dim=8))
    for name in ("SRC", "Qwen/Qwen3-0.6B"):
        qwen.save_pretrained(folder / name)
    return folder


@pytest.fixture
def workspace(stand_ins: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Be in a copy of the stand-ins, with benchmarks that can import each other."""
    shutil.copytree(stand_ins, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return tmp_path


class MyTranslator(nn.Module):
    """What docs/families.md calls so."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.positions = nn.Embedding(20, 16, padding_idx=0), nn.Parameter(torch.randn(12, 16))
        self.transformer = nn.Transformer(16, 2, 1, 1, 32)
        self.fc_out = nn.Linear(16, 20)


def names(document: str) -> dict[str, Any]:
    """What a document's Python blocks take for granted."""
    if document == "docs/training.md":
        return {"folder": "DECODER"}
    if document == "docs/attention.md":
        return dict(zip("qkv", torch.randn(3, 2, 5, 4, 8).unbind(), strict=True))
    return {"MyTranslator": MyTranslator} if document == "docs/families.md" else {}


# ------------------------------------------------------------------------------------------------------------- running


def by_beginning(table: dict[str, Any], command: str) -> Any:
    return next((value for beginning, value in table.items() if command.startswith(beginning)), None)


def run_shell(block: Block, thorough: bool) -> None:
    for line, output in commands(block):
        command = normal(line)
        bare = re.sub(r"^(\w+=\S* )+", "", command)
        if bare in NOT_RUN or (not thorough and by_beginning(SLOW, bare)):
            if bare.startswith("urform "):
                check_options(block.place, bare)
            continue
        words = shlex.split(re.sub(r"\[.*?\]", "", re.sub(r"^(\w+=\S* )+", "", line)), comments=True)
        words = [WORDS.get(bare, {}).get(word, word) for word in words]
        more = by_beginning(SMALLER, bare)
        assert words[0] in {*RUNNERS, *LAUNCHERS}, (
            f"{block.place}: {command}: tests/test_docs.py does not know how to run it"
        )
        stdin = None
        if "<" in words:
            stdin = Path(words[words.index("<") + 1]).read_text(encoding="utf-8")
        to = words[words.index(">") + 1] if ">" in words else None
        plain = words[: min(words.index(sign) if sign in words else len(words) for sign in "<>")]
        run = run_processes if by_beginning(SLOW, bare) else RUNNERS[words[0]]
        code, text = run([*plain, *shlex.split(more[thorough] if more else "")], stdin)
        assert code == EXIT_CODES.get(bare, 0), f"{block.place}: {command}: exit code {code}\n{text}"
        if to is not None:
            Path(to).write_text(text, encoding="utf-8")
        for row in map(table_row, output):
            assert row is None or row in map(table_row, text.splitlines()), f"{block.place}: {row} is not in\n{text}"


def table_row(line: str) -> str | None:
    """A row of a table without its numbers; None for other lines."""
    cells = [cell for cell in re.split(r"\s{2,}|(?<=[\d-]) +(?=[\d-])", line.strip()) if cell]
    numbers = [cell for cell in cells if re.fullmatch(r"[\d.]+(e[+-]\d+)?|-", cell)]
    return " | ".join(cell for cell in cells if cell not in numbers) if len(numbers) > 1 else None


def run_urform(words: list[str], stdin: str | None) -> tuple[int, str]:
    done = CliRunner().invoke(app, words[1:], input=stdin)
    return done.exit_code, done.stdout if not done.exit_code else done.output


def run_make(words: list[str], stdin: str | None) -> tuple[int, str]:
    """Resolve the target only: this test is itself part of `make test`."""
    done = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.returncode, done.stderr


def run_pip(words: list[str], stdin: str | None) -> tuple[int, str]:
    """Look the requirements up: extras of ours and names that our metadata or the constraints have."""
    ours = importlib.metadata.metadata("urform")
    known = {Requirement(line).name for line in ours.get_all("Requires-Dist") or []} | {"pre-commit"}
    known |= {line.partition("==")[0] for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()}
    for word in words[2:]:
        if word.startswith("-"):
            continue
        requirement = Requirement(re.sub(r"^\.(?=\[|$)", "urform", word))
        if requirement.name == "urform":
            assert requirement.extras <= set(ours.get_all("Provides-Extra") or []), word
        else:
            assert requirement.name in known, f"{word}: not a requirement of urform's"
    return 0, ""


def run_script(words: list[str], stdin: str | None) -> tuple[int, str]:
    """Run a script of the checkout in this process."""
    before, sys.argv = sys.argv, [str(ROOT / words[1]), *words[2:]]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as error:
        return int(error.code or 0), ""
    finally:
        sys.argv = before
    return 0, ""


LAUNCHERS = {
    "torchrun": "torch.distributed.run",
    "accelerate": "accelerate.commands.accelerate_cli",
    "urform": "urform.cli.main",
}


def run_processes(words: list[str], stdin: str | None) -> tuple[int, str]:
    """Run a command in processes of its own, without Triton's interpreter (it takes many minutes)."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", LAUNCHERS[words[0]], *words[1:]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, env=environment)
    return done.returncode, done.stdout if not done.returncode else done.stdout + done.stderr


RUNNERS: dict[str, Callable[[list[str], str | None], tuple[int, str]]] = {
    "urform": run_urform,
    "make": run_make,
    "pip": run_pip,
    "python": run_script,
}


def run_python(block: Block, namespace: dict[str, Any], thorough: bool) -> None:
    """Run a block of README in a new process, any other here; `print(…)  # text` is held to its text."""
    code = "\n".join(block.lines)
    if any(word in code for word in TWO_PROCESSES):
        compile(code, block.place, "exec")
        if thorough:
            given = "".join(f"{name} = {value!r}\n" for name, value in namespace.items() if isinstance(value, str))
            Path("script.py").write_text(given + code, encoding="utf-8")
            status, text = run_processes(["torchrun", "--nproc-per-node", "2", "script.py"], None)
            assert status == 0, f"{block.place}\n{text}"
        return
    if block.document != "README.md":
        exec(compile("\n" * block.line + code, block.place, "exec"), namespace)
        return
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, f"{block.place}\n{done.stderr}"
    expected = [match[1] for line in block.lines if (match := re.match(r"print\(.*\)\s*# (.*)", line))]
    assert not expected or done.stdout.splitlines()[-len(expected) :] == expected, f"{block.place}\n{done.stdout}"


def run_options(block: Block) -> None:
    """Hold a list of options to what the command of the heading has."""
    groups: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    paths = {verb: [verb] for verb in groups}
    paths |= {verb: [group, verb] for group, command in groups.items() for verb in getattr(command, "commands", {})}
    assert block.heading in paths, f"{block.place}: options below {block.heading!r}, which is no command of urform"
    known = options_of(paths[block.heading])
    unknown = {line.split()[0] for line in block.lines} - known
    assert not unknown, f"{block.place}: `urform {' '.join(paths[block.heading])}` has no {sorted(unknown)}"


def run_block(block: Block, namespace: dict[str, Any], thorough: bool) -> None:
    if block.kind == "python":
        run_python(block, namespace, thorough)
    elif block.kind == "yaml":
        Path("card.yaml").write_text("\n".join(block.lines), encoding="utf-8")
        assert read_card_data("card.yaml") == yaml.safe_load("\n".join(block.lines))
    elif block.kind == "options":
        run_options(block)
    elif block.kind == "sh":
        run_shell(block, thorough)
    elif block.kind != "text":
        pytest.fail(f"{block.place}: blocks in {block.language!r} are not tested; teach tests/test_docs.py to run them")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("document", DOCUMENTS)
def test_blocks_run(document: str, workspace: Path) -> None:
    """All blocks of a document, in order, in one folder."""
    namespace = names(document)
    for block in blocks(document):
        run_block(block, namespace, thorough=False)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("document", DOCUMENTS)
def test_blocks_run_in_full(document: str, workspace: Path) -> None:
    """The same with the commands of `SLOW`."""
    namespace = names(document)
    for block in blocks(document):
        run_block(block, namespace, thorough=True)


# ------------------------------------------------------------------------------------------------------- the rest of it


@pytest.mark.parametrize("place, example", [(0, "train"), (1, "load"), (2, "push")])
def test_the_ten_lines_are_the_examples(place: int, example: str) -> None:
    """README's Python blocks are the examples, word for word, and have at most ten lines below their imports."""
    block = [block for block in blocks("README.md") if block.language == "python"][place]
    text = (ROOT / f"examples/{example}_ten_lines.py").read_text(encoding="utf-8")
    assert text.partition('"""\n\n')[2] == "\n".join(block.lines) + "\n"
    assert len([line for line in block.lines if line and not line.startswith(("from", "import"))]) <= 10


def test_readme_fits_on_a_page() -> None:
    """A reader who has never seen the project reads all of it."""
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 100


# Rows of README's table of isolation, and the checks of `urform doctor isolation` that they stand for.
ISOLATION_ROWS = {
    "padding on either side, later tokens": ("padding-left", "padding-right", "causality"),
    "packed, `use_cache=False`": ("packing-position-ids", "packing-cu-seqlens"),
    "packed, plain call (it fills a cache)": ("packing-cache",),
    "packed, with a `DynamicCache`": ("packing-given-cache",),
    "packed, with an `attention_mask` of ones": ("packing-ones-mask",),
}


def test_readme_shows_what_isolation_measures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Status, and the movement of what leaks to 2%."""
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(ROOT / "examples/tiny_llama.py"))
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if re.match(r"\| pad|\| pack", line)]
    shown = {row[0]: row[1:] for row in rows if row[0] in ISOLATION_ROWS}
    assert shown.keys() == ISOLATION_ROWS.keys()
    for column, attention in enumerate((None, "urform")):
        checks = {
            check.name: check for check in urform.check_isolation("llama-tiny", attn_implementation=attention).checks
        }
        for row, names in ISOLATION_ROWS.items():
            status, _, movement = shown[row][column].partition(", ")
            for check in (checks[name] for name in names):
                assert check.status.lower() == status.strip("*").lower(), (row, attention, check)
                assert check.movement == pytest.approx(float(movement or 0), rel=0.02), (row, attention, check)


def test_links_and_pictures_lead_to_files() -> None:
    """Relative links and pictures; a link's heading is one of the page's."""
    for document in DOCUMENTS:
        text = (ROOT / document).read_text(encoding="utf-8")
        text = re.sub(r"```.*?```|`[^`]*`", "", text, flags=re.DOTALL)
        for target in re.findall(r"\]\((?![a-z]+:)([^)\s]+)\)|src=\"([^\"]+)\"", text):
            path, _, heading = "".join(target).partition("#")
            page = (ROOT / document).parent / path if path else ROOT / document
            assert page.exists(), f"{document}: {path}"
            if heading:
                lines = page.read_text(encoding="utf-8").splitlines()
                found = [line.strip("# `").lower().replace(" ", "-") for line in lines if line.startswith("#")]
                assert heading in found, f"{document}: {path}#{heading}"


def test_exceptions_are_all_in_use() -> None:
    """What is listed above as not run, slow, smaller or renamed stands in a document."""
    shells = [block for document in DOCUMENTS for block in blocks(document) if block.kind == "sh"]
    plain = [re.sub(r"^(\w+=\S* )+", "", normal(line)) for block in shells for line, _ in commands(block)]
    for exact in (NOT_RUN, WORDS, EXIT_CODES):
        assert set(exact) <= set(plain)
    code = [line for document in DOCUMENTS for block in blocks(document) for line in block.lines]
    assert all(any(word in line for line in code) for word in TWO_PROCESSES)
    for beginning in (*SLOW, *SMALLER):
        assert any(command.startswith(beginning) for command in plain), beginning


def spans() -> Iterator[tuple[str, str]]:
    """Every `span of code` outside the blocks, with its place."""
    for document in DOCUMENTS:
        text = (ROOT / document).read_text(encoding="utf-8")
        text = re.sub(r"```.*?```", lambda block: "\n" * block[0].count("\n"), text, flags=re.DOTALL)
        for match in re.finditer(r"`([^`]+)`", text):
            yield f"{document}:{text.count(chr(10), 0, match.start()) + 1}", " ".join(match[1].split())


def test_commands_and_files_in_the_text_exist() -> None:
    """Verbs and options of `urform …`, targets of `make …`, paths of files."""
    folders = {path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")}
    for place, span in spans():
        words = span.split()
        if words[0] == "urform" and len(words) > 1 and re.fullmatch(r"[a-z]+", words[1]):
            check_options(place, span)
        elif words[0] == "make" and len(words) > 1:
            code, text = run_make(shlex.split(span), None)
            assert code == 0, f"{place}: `{span}`: {text}"
        elif re.fullmatch(r"[\w.*-]+(/[\w.*-]+)+\.(py|md|yaml|jsonl|txt)", span) and span.split("/")[0] in folders:
            assert list(ROOT.glob(span)), f"{place}: `{span}`: no such file"
