"""The sums of losses that a checkpoint keeps, so that a resumed run logs what the uninterrupted run logs.

Trainer keeps these sums in memory only and starts again at zero when it resumes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .checkpointing import write_text_atomically

__all__ = ["RestoreLossCallback", "restore_loss_sums", "save_loss_sums"]

LOSS_STATE_NAME = "loss_state.json"


def save_loss_sums(trainer: Trainer, checkpoint: Path, since_log: list[float]) -> None:
    """Write the loss since the last log of each process (`since_log`) and the loss of all steps into a checkpoint."""
    state = {
        "since_log": since_log,
        "total": trainer._total_loss_scalar,
        "last_logged_step": trainer._globalstep_last_logged,
    }
    write_text_atomically(checkpoint / LOSS_STATE_NAME, json.dumps(state))


def restore_loss_sums(trainer: Trainer, checkpoint: str | Path) -> bool:
    """Continue with the sums of a checkpoint; return False if another Trainer wrote it, without sums."""
    path = Path(checkpoint, LOSS_STATE_NAME)
    if not path.is_file():
        return False
    state = json.loads(path.read_text(encoding="utf-8"))
    since_log = state["since_log"]
    same_world = len(since_log) == trainer.args.world_size
    # With another number of processes: what gets logged is the mean over the processes.
    mine = since_log[trainer.args.process_index] if same_world else sum(since_log) / len(since_log)
    trainer._tr_loss += mine
    trainer._total_loss_scalar = state["total"]
    trainer._globalstep_last_logged = state["last_logged_step"]
    return True


class RestoreLossCallback(TrainerCallback):
    """Restores the sums of losses by calling `restore`. Trainer sets them to zero just before this event."""

    def __init__(self, restore: Callable[[], None]) -> None:
        self.restore = restore

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.restore()
