"""The package's own code, laid flat next to a checkpoint, so that `trust_remote_code=True` loads it without Urform.

Transformers copies the file that defines a class and the files that it imports relatively, all into one folder, and
cannot follow an import into another folder. So `flatten_package` writes the modules of `FOLDERS` side by side. Relative
imports are rewritten to `from .module import x` where the syntax tree finds them, and no other character changes. What
the loader of transformers cannot follow is refused with file and line.
"""

from __future__ import annotations

import ast
import os
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from ..configuration.version_urform import NEEDS

FOLDERS = (
    "configuration",
    "modeling",
    "modeling/kernels",
    "modeling/kernels/blockwise",
    "modeling/kernels/triton",
    "modeling/stock_models",
    "tokenization",
)
ENTRIES = ("configuration_urform", "modeling_urform", "tokenization_urform")

_ROOT = Path(__file__).resolve().parent.parent
_PACKAGE = __name__.partition(".")[0]

# What a machine with nothing but transformers and torch can import.
_AVAILABLE = {
    *sys.stdlib_module_names,
    *("torch", "transformers", "numpy", "tokenizers", "safetensors", "huggingface_hub", "packaging", "tqdm"),
}
# The two expressions by which transformers finds relative imports (dynamic_module_utils.get_relative_imports).
_LOADER_SEES = re.compile(r"^\s*import\s+\.(\S+)\s*$|^\s*from\s+\.(\S+)\s+import", re.MULTILINE)
_DOTTED = re.compile(r"from\s+(\.+\s*[\w.]*)\s+import\b")


def write_code(directory: str | os.PathLike[str]) -> None:
    """Write what makes a checkpoint load without Urform, next to it: the flat modules and `requirements.txt`."""
    flatten_package(directory)
    _write(Path(directory) / "requirements.txt", "".join(f"{name}>={least}\n" for name, least in NEEDS.items()))


def code_names() -> set[str]:
    """Return the names of the files that `write_code` writes."""
    return {*(f"{name}.py" for name in _modules(_ROOT)), "requirements.txt"}


def flatten_package(directory: str | os.PathLike[str], root: Path = _ROOT, package: str = _PACKAGE) -> list[Path]:
    """Write the package's modules flat into `directory`; return the paths written.

    Only modules that the entry files reach by relative imports are written: transformers loads no others.

    Args:
        directory: the folder to write to, made if needed. Files are replaced one by one, each atomically.
        root: the folder of the package.
        package: the package's import name, to refuse absolute imports of itself.

    Raises:
        ValueError: naming file and line, when a module cannot be laid flat or loaded from the flat copy.
    """
    modules = _modules(root)
    flat: dict[str, str] = {}
    waiting = [name for name in ENTRIES if name in modules]
    if not waiting:
        raise ValueError(f"{root} has none of the entry modules {', '.join(ENTRIES)}; there is nothing to bundle.")
    while waiting:
        name = waiting.pop()
        if name not in flat:
            flat[name], needed = _flatten_module(modules[name], modules, root, package)
            waiting.extend(needed)
    os.makedirs(directory, exist_ok=True)
    return [_write(Path(directory) / f"{name}.py", source) for name, source in sorted(flat.items())]


def _modules(root: Path) -> dict[str, Path]:
    modules: dict[str, Path] = {}
    for folder in FOLDERS:
        for path in sorted((root / folder).glob("*.py")):
            if path.name == "__init__.py":
                continue
            if path.stem in modules:
                raise ValueError(
                    f"{path}:1: a module named {path.stem!r} exists already: {modules[path.stem]}. "
                    "The bundle lays all modules into one folder; rename one of them."
                )
            modules[path.stem] = path
    return modules


def _flatten_module(path: Path, modules: Mapping[str, Path], root: Path, package: str) -> tuple[str, list[str]]:
    """Return the module's text for the flat folder and the names of the modules that it imports."""
    source = path.read_text(encoding="utf-8")
    relative: list[ast.ImportFrom] = []
    for node, guarded in _imports(ast.parse(source, str(path))):
        if isinstance(node, ast.ImportFrom) and node.level:
            relative.append(node)
        else:
            _check_absolute(node, guarded, path, package)
    lines, needed = source.splitlines(keepends=True), []
    for node in sorted(relative, key=lambda n: n.lineno, reverse=True):
        needed.append(_target(node, path, modules, root))
        lines[node.lineno - 1] = _rewritten(lines[node.lineno - 1], node, needed[-1], path)
    text = "".join(lines)
    _check_loader_agrees(text, {node.lineno for node in relative}, path)
    return text, needed


def _refusal(path: Path, line: int, why: str) -> ValueError:
    return ValueError(f"{path}:{line}: {why}")


def _check_absolute(node: ast.Import | ast.ImportFrom, guarded: bool, path: Path, package: str) -> None:
    """Refuse an absolute import of the package itself, and of what may be missing unless it is `guarded` by `try`."""
    names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
    for top in (name.partition(".")[0] for name in names):
        if top == package:
            raise _refusal(path, node.lineno, f"imports {package!r} by its absolute name; use a relative import.")
        if top not in _AVAILABLE and not guarded:
            raise _refusal(
                path,
                node.lineno,
                f"imports {top!r} outside of try: the bundle must load where it is not installed. "
                f"Write try: import {top} / except ImportError: {top} = None.",
            )


def _rewritten(line: str, node: ast.ImportFrom, module: str, path: Path) -> str:
    """Return the first line of a relative import, which then names `module` in the same folder."""
    start = len(line.encode()[: node.col_offset].decode())  # col_offset counts bytes
    match = _DOTTED.match(line, start)
    if line[:start].strip() or match is None:
        raise _refusal(path, node.lineno, "a relative import must begin its line and have 'from .module import' on it.")
    return line[: match.start(1)] + f".{module}" + line[match.end(1) :]


def _check_loader_agrees(text: str, imports: set[int], path: Path) -> None:
    """Refuse text that transformers' loader takes for a relative import; `imports` are the lines of the real ones."""
    for match in _LOADER_SEES.finditer(text):
        at = match.start() + len(match[0]) - len(match[0].lstrip())
        line = text.count("\n", 0, at) + 1
        if line not in imports:
            raise _refusal(
                path, line, f"{match[0].strip()!r} is no import, but transformers' loader takes it for one; reword it."
            )


def _target(node: ast.ImportFrom, path: Path, modules: Mapping[str, Path], root: Path) -> str:
    """Return the basename of the module that a relative import names."""
    folder = path.parent
    for _ in range(node.level - 1):
        folder = folder.parent
    target = folder.joinpath(*(node.module or "").split(".")) if node.module else folder
    if target.with_suffix(".py") == modules.get(target.name):
        return target.name
    shown = "." * node.level + (node.module or "")
    if node.module is None or target.is_dir():
        raise _refusal(
            path,
            node.lineno,
            f"'from {shown} import …' imports from a package, which a flat folder does not have; name the module: "
            f"from {shown.rstrip('.') + '.' if node.module else shown}module import …",
        )
    raise _refusal(
        path, node.lineno, f"'from {shown} import …' names no module of {', '.join(FOLDERS)}; only these are bundled."
    )


def _imports(node: ast.AST, guarded: bool = False) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    """Yield every import of the tree and whether it stands in a `try` statement."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        yield node, guarded
    for child in ast.iter_child_nodes(node):
        yield from _imports(child, guarded or isinstance(node, ast.Try))


def _write(path: Path, text: str) -> Path:
    """Write atomically: several processes may save into one folder."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8", newline="")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
