"""Optional dependencies: one error for every package that is not installed, with the command that installs it."""

from __future__ import annotations

from pathlib import Path

__all__ = ["HOW_TO_INSTALL", "MissingDependencyError", "install_command", "missing_dependency"]

# For readers on other machines (model cards, documentation), who have no checkout yet.
HOW_TO_INSTALL = "`pip install .` in a checkout of urform, or `pip install git+ADDRESS` with its repository's address"

_DISTRIBUTIONS = {"yaml": "pyyaml"}  # where the module and the package that brings it have different names


class MissingDependencyError(ModuleNotFoundError, ValueError):
    """An optional package is not installed; a ValueError too, for the user can mend it."""


def install_command(extra: str) -> str:
    """Return the command that installs an extra of Urform today: from its checkout, for it is on no package index."""
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
