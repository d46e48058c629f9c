"""Dependencies: the tested releases, and one error for every optional package that is not installed."""

from __future__ import annotations

import re
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

__all__ = [
    "HOW_TO_INSTALL",
    "TESTED",
    "MissingDependencyError",
    "install_command",
    "missing_dependency",
    "warn_untested",
]

# The oldest and the newest release that the tests have run on: `make test-oldest`, `make test-newest`. The extra
# `tested` in pyproject.toml says the same.
TESTED = {"torch": ("2.11", "2.14"), "transformers": ("5.17", "5.24")}

# For readers on other machines (model cards, documentation), who have no checkout yet.
HOW_TO_INSTALL = "`pip install .` in a checkout of urform, or `pip install git+ADDRESS` with its repository's address"

_DISTRIBUTIONS = {"yaml": "pyyaml"}  # where the module and the package that brings it have different names


def _release(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text)[:2])


def warn_untested() -> None:
    """Warn, in one warning, of releases outside `TESTED`. The metadata is read; nothing is imported."""
    outside = []
    for name, (oldest, newest) in TESTED.items():
        try:
            found = version(name)
        except PackageNotFoundError:
            continue  # its import will say so
        if not _release(oldest) <= _release(found) <= _release(newest):
            outside.append(f"{name} {found}")
    if outside:
        ranges = " and ".join(f"{name} {oldest} to {newest}" for name, (oldest, newest) in TESTED.items())
        warnings.warn(
            f"urform is tested with {ranges}; installed here: {', '.join(outside)}. It works on, but results may be "
            "wrong: run its tests (`make test-newest`), or install a tested release",
            stacklevel=3,
        )


class MissingDependencyError(ModuleNotFoundError, ValueError):
    """An optional package is not installed; a ValueError too, for the user can mend it."""


def install_command(extra: str) -> str:
    """Return the command that installs an extra of Urform: from its checkout, as it is not on a package index yet."""
    root = Path(__file__).resolve().parent
    checkout = str(root) if (root / "pyproject.toml").is_file() else "<checkout of urform>"
    return f"pip install -e '{checkout}[{extra}]'"


def missing_dependency(module: str, what: str, extra: str | None = "train") -> MissingDependencyError:
    """Return the error to raise where a module is not installed.

    Args:
        module: Name of the module, as an ImportError has it.
        what: What needs it, as the subject of the sentence: "BLEU".
        extra: The extra of Urform that lists it, if one does.
    """
    top = module.partition(".")[0]
    name = _DISTRIBUTIONS.get(top, top)
    rest = f" (or everything of that kind: {install_command(extra)})" if extra else ""
    return MissingDependencyError(f"{what} needs {name}, which is not installed: pip install {name}{rest}", name=top)
