"""Training that stops on SIGINT or SIGTERM after it has saved a checkpoint."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

__all__ = ["InterruptCallback", "TrainingInterruptedError"]


class TrainingInterruptedError(RuntimeError):
    """Training stopped on a signal after saving a checkpoint.

    Attributes:
        signal_number: The signal (2 for Ctrl-C).
        step: The number of optimizer steps done.
        checkpoint: The checkpoint to resume from.
    """

    def __init__(self, signal_number: int, step: int, checkpoint: Path) -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name} at step {step}, saved {checkpoint}")
        self.signal_number = signal_number
        self.step = step
        self.checkpoint = checkpoint


class InterruptCallback(TrainerCallback):
    """Ends training at the next step with a checkpoint when SIGINT or SIGTERM arrives; a second one stops at once."""

    def __init__(self) -> None:
        self.signal_number = 0

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Handle the signals inside the `with` block. Only the main thread may do so."""
        previous = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal_number:
            raise KeyboardInterrupt
        self.signal_number = number

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Ask for a checkpoint and the end of training. All processes agree on the step."""
        if args.world_size > 1:
            flag = torch.tensor(self.signal_number, device=args.device)
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
            self.signal_number = int(flag)
        if self.signal_number:
            control.should_save = True
            control.should_training_stop = True
        return control
