"""The model card."""

from pathlib import Path


def complete_card(folder: Path, repo_id: str) -> None:
    """Replace the empty card of transformers."""
