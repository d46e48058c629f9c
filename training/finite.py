"""A stop where a loss, a gradient or a weight is NaN or infinite: training on would destroy the model without a word.

`UpdateWatch` looks at the losses and the gradient norm of every update before the optimizer uses them, so the weights
and all checkpoints stay what they were. `NonFiniteError` says which step, which parameter groups and which parameters,
and where the batch is. Weights are checked before every checkpoint: an update can overflow with finite gradients.

Under float16 infinite gradients are part of loss scaling, which skips such steps; only losses and weights count there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from .checkpointing import last_complete_checkpoint

__all__ = ["NonFiniteError", "UpdateWatch", "refuse_non_finite_weights"]


class NonFiniteError(RuntimeError):
    """A loss, a gradient or a weight is NaN or infinite; the message says where and which checkpoint is the last good.

    Attributes:
        step: The optimizer step.
        report: The file with all details, in one folder with the batch. None if weights were found when saving.
    """

    def __init__(self, message: str, step: int, report: Path | None = None) -> None:
        super().__init__(message)
        self.step = step
        self.report = report


class UpdateWatch:
    """The batches and losses of one optimizer update, until the update has been checked."""

    def __init__(self) -> None:
        self.batches: list[Mapping[str, Any]] = []
        self.losses: list[Tensor] = []

    def add(self, batch: Mapping[str, Any], loss: Tensor) -> None:
        """Remember a micro-batch and its loss."""
        self.batches.append(batch)
        self.losses.append(loss.detach())

    def check(self, trainer: Any, grad_norm: Any) -> None:
        """Forget the update if it is finite in all processes.

        Raises:
            NonFiniteError: If it is not; batch and report are written to the output directory before.
        """
        if not self.losses:
            return  # checked already
        losses = torch.stack([loss.float().reshape(()) for loss in self.losses])
        is_bad = ~torch.isfinite(losses).all()
        scaled = getattr(trainer.accelerator, "scaler", None) is not None
        if grad_norm is not None and not scaled:
            norm = grad_norm.full_tensor() if hasattr(grad_norm, "full_tensor") else torch.as_tensor(grad_norm)
            is_bad = is_bad | ~torch.isfinite(norm).to(is_bad.device)
        if trainer.args.world_size > 1:
            flag = is_bad.to(torch.int32)
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
            is_bad = flag
        if bool(is_bad):
            self._stop(trainer, losses.tolist(), grad_norm)
        self.batches.clear()
        self.losses.clear()

    def _stop(self, trainer: Any, losses: list[float], grad_norm: Any) -> None:
        args, step = trainer.args, trainer.state.global_step + 1
        gradients = _non_finite(
            (name, parameter.grad) for name, parameter in trainer.model.named_parameters() if parameter.grad is not None
        )
        weights = _non_finite(trainer.model.named_parameters())
        groups = _groups(trainer.model, trainer.optimizer, gradients)
        rank = f"-process-{args.process_index}" if args.world_size > 1 else ""
        report = Path(args.output_dir, f"non-finite-step-{step}{rank}", "report.json")
        batch = report.with_name("batch.safetensors")
        others = _save_batches(self.batches, batch)
        last = last_complete_checkpoint(args.output_dir)
        details = {
            "step": step,
            "epoch": trainer.state.epoch,
            "losses": [repr(loss) for loss in losses],
            "grad_norm": repr(float(grad_norm)) if grad_norm is not None else None,
            "gradients": gradients,
            "weights": weights,
            "parameter_groups": groups,
            "batch": batch.name,
            "other_inputs": others,
            "last_complete_checkpoint": str(last) if last else None,
        }
        report.write_text(json.dumps(details, indent=1), encoding="utf-8")
        sentences = [
            f"training stopped at step {step}, before the update: the loss is {', '.join(f'{x:g}' for x in losses)}",
            f"the gradient norm is {float(grad_norm):g}" if grad_norm is not None else "",
            f"gradients are not finite in {_some(gradients)}" if gradients else "",
            "; ".join(group["told"] for group in groups if group["gradients_not_finite"]),
            f"weights are not finite in {_some(weights)}" if weights else "all weights are finite",
            f"the batch is in {batch}, the report in {report}",
            _advice(last),
        ]
        raise NonFiniteError("; ".join(part for part in sentences if part), step, report)


def refuse_non_finite_weights(model: nn.Module, optimizer: Any, step: int, output_dir: str | Path) -> None:
    """Refuse to save a model that is not finite; `output_dir` has the checkpoints of its run.

    Raises:
        NonFiniteError: If a weight is NaN or infinite.
    """
    if not (weights := _non_finite(model.named_parameters())):
        return
    groups = [group["told"] for group in _groups(model, optimizer, weights) if group["gradients_not_finite"]]
    raise NonFiniteError(
        f"training stopped after step {step}: weights are not finite in {_some(weights)}"
        + (f"; {'; '.join(groups).replace('gradients', 'weights')}" if groups else "")
        + f"; nothing was saved; {_advice(last_complete_checkpoint(output_dir))}",
        step,
    )


def _advice(last: Path | None) -> str:
    kept = f"the last complete checkpoint is {last}" if last else "there is no complete checkpoint"
    return f"{kept}. Lower the learning rate, warm up longer, or look at the batch"


def _non_finite(tensors: Any) -> list[str]:
    names = []
    for name, tensor in tensors:
        local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        if local.is_floating_point() and not bool(torch.isfinite(local.detach()).all()):
            names.append(name)
    return names


def _groups(model: nn.Module, optimizer: Any, names: list[str]) -> list[dict[str, Any]]:
    """Return the optimizer's parameter groups with the number of parameters that `names` counts in each."""
    by_id = {id(parameter): name for name, parameter in model.named_parameters()}
    found = []
    for number, group in enumerate(optimizer.param_groups if optimizer is not None else ()):
        members = [by_id.get(id(parameter)) for parameter in group["params"]]
        count = sum(name in names for name in members)
        settings = ", ".join(f"{key}={group[key]:g}" for key in ("lr", "weight_decay") if key in group)
        told = f"parameter group {number} ({settings}): gradients of {count} of {len(members)} are not finite"
        found.append({"group": number, "gradients_not_finite": count, "parameters": len(members), "told": told})
    return found


def _save_batches(batches: list[Mapping[str, Any]], path: Path) -> dict[str, str]:
    """Write the tensors of the micro-batches; return what else is in them."""
    tensors, others = {}, {}
    for number, batch in enumerate(batches):
        for key, value in batch.items():
            if isinstance(value, Tensor):
                tensors[f"{number}.{key}"] = value.detach().cpu().contiguous().clone()
            else:
                others[f"{number}.{key}"] = repr(value)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)
    return others


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
