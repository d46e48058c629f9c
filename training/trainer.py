"""`UrformTrainer`: `Seq2SeqTrainer` with what training a translator needs and transformers lacks.

It adds the following, and changes nothing else:

* Global batches by a token budget, or by a number of examples. They are the same on one process and on many:
  `batching.py`.
* A label-smoothed loss that is a sum over tokens divided by the number of tokens of the whole update, over all
  processes and under gradient accumulation. Urform's language models compute it themselves, without logits; others get
  `SmoothedCrossEntropy`: `losses.py`.
* Checkpoints that are complete or do not count: `checkpointing.py`. A manifest with the sha256 of every file is
  written last, old checkpoints are deleted after that, and a failed save removes what it wrote.
* A resumed run that logs what the uninterrupted one logs, and that does nothing if it had ended: `loss_sums.py`.
* A stop where a loss, a gradient or a weight is not finite: `finite.py`.
* `config.use_cache` as the user set it: Trainer turns it off for training and would save that into every checkpoint.
* With every save, the training arguments as JSON, which can be read without unpickling anything.
* The model card of `urform push` where the run is pushed to the Hub: `hub_trainer.py`.

It works with any model of transformers, not only Urform's.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import DistributedType
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel, Seq2SeqTrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..modeling.modeling_urform import UrformLanguageModel
from ..publishing.secret_fields import hide_tokens
from ..publishing.trainer_push import output_folder, push_checkpoint
from ..publishing.training_record import write_arguments
from .batching import GlobalBatchSampler, SetEpochCallback
from .checkpointing import (
    MANIFEST_NAME,
    CheckpointError,
    begin_manifest,
    checkpoint_fault,
    complete_checkpoints,
    finish_manifest,
    last_complete_checkpoint,
    remove_checkpoint,
    rotate_complete,
)
from .finite import NonFiniteError, UpdateWatch, refuse_non_finite_weights
from .hub_trainer import HubTrainer
from .interruption import InterruptCallback, TrainingInterruptedError
from .loss_sums import RestoreLossCallback, restore_loss_sums, save_loss_sums
from .losses import SmoothedCrossEntropy, predicts_next_token, with_decoder_inputs, without_adapters

__all__ = [
    "CheckpointError",
    "InterruptCallback",
    "NonFiniteError",
    "SmoothedCrossEntropy",
    "TrainingInterruptedError",
    "UrformTrainer",
    "complete_checkpoints",
    "last_complete_checkpoint",
]


class UrformTrainer(HubTrainer):
    """`Seq2SeqTrainer` with global batches, token-exact label smoothing and checkpoints that survive a full disk.

    Args:
        tokens_per_batch: Budget of a global batch in padded tokens, source plus target; None uses
            `per_device_train_batch_size` examples per process.
        pool_batches: See `GlobalBatchSampler`.
        **kwargs: As for `Seq2SeqTrainer`. With `label_smoothing_factor` Urform's language models smooth their own loss,
            and other models' is `SmoothedCrossEntropy`; evaluation is not smoothed. The training dataset has a
            `lengths` attribute (see `EncodedDataset`), else Trainer's own sampling is used.
    """

    model: PreTrainedModel

    def __init__(self, *, tokens_per_batch: int | None = None, pool_batches: int = 4, **kwargs: Any) -> None:
        model, args = kwargs["model"], kwargs["args"]
        if not isinstance(args, Seq2SeqTrainingArguments):
            raise ValueError(f"args must be Seq2SeqTrainingArguments, got {type(args).__name__}")
        self._use_cache = getattr(model.config, "use_cache", None)
        self._is_saving = False
        self._save_total_limit: int | None = None
        self._saved_step: int | None = None
        self._resumed_from: str | None = None
        self._loss_is_whole = False
        self._has_shards: bool | None = None
        self._watch = UpdateWatch()
        super().__init__(**kwargs)
        hide_tokens(args)
        self.add_callback(RestoreLossCallback(self.restore_loss_state))
        self._model_smooths = False
        if args.label_smoothing_factor and self.compute_loss_func is None:
            self._choose_smoothed_loss(without_adapters(model))
        self.tokens_per_batch = tokens_per_batch
        self.pool_batches = pool_batches

    def _choose_smoothed_loss(self, model: nn.Module) -> None:
        """Let the model smooth its loss if it can, and `SmoothedCrossEntropy` otherwise; `model` has no wrapper."""
        self.label_smoother = None
        # What splits or replicates parameters takes `lm_head.weight` away from the model's fused loss.
        whole = self.args.n_gpu <= 1 and not self.is_fsdp_enabled and not self.is_deepspeed_enabled
        self._model_smooths = isinstance(model, UrformLanguageModel) and whole and model.fuses_loss()
        if self._model_smooths:
            return
        is_causal = predicts_next_token(model)
        self.compute_loss_func = SmoothedCrossEntropy(self.args.label_smoothing_factor, shift=is_causal)
        # The labels do not reach the model, so Trainer cannot know from its loss that they are shifted.
        self._loss_shifts_labels = is_causal

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Do as `Trainer.compute_loss` does, and pass the smoothing to a model that smooths its own loss in training.

        Raises:
            ValueError: If the loss is computed outside of an encoder-decoder that cannot make its decoder's inputs.
        """
        if self._model_smooths and torch.is_grad_enabled() and "labels" in inputs:
            inputs = {**inputs, "label_smoothing": self.args.label_smoothing_factor}
        if self.label_smoother is not None or self.compute_loss_func is not None:
            inputs = with_decoder_inputs(self.model, inputs)
        return super().compute_loss(model, inputs, *args, **kwargs)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return a loader of global batches, which accelerate deals to the processes.

        Raises:
            ValueError: If there is a token budget and the dataset has no `lengths`, or for torch.nn.DataParallel.
        """
        lengths = getattr(self.train_dataset, "lengths", None)
        if lengths is None or self.args.n_gpu > 1:
            if self.tokens_per_batch is not None:
                raise ValueError(
                    "a token budget needs a training dataset with `lengths` (EncodedDataset) and one device per "
                    "process: launch with `accelerate launch` rather than torch.nn.DataParallel"
                )
            return super().get_train_dataloader()
        by_tokens = self.tokens_per_batch is not None
        sampler = GlobalBatchSampler(
            lengths,
            tokens=self.tokens_per_batch,
            examples=None if by_tokens else self.args.per_device_train_batch_size * self.args.world_size,
            num_splits=self.args.world_size,
            seed=self.args.data_seed if self.args.data_seed is not None else self.args.seed,
            pool_batches=self.pool_batches,
            shuffle=self.args.train_sampling_strategy != "sequential",
        )
        self.pop_callback(SetEpochCallback)
        self.add_callback(SetEpochCallback(sampler, self.args.gradient_accumulation_steps))
        workers = self.args.dataloader_num_workers
        loader: DataLoader[Any] = DataLoader(
            cast("Dataset[Any]", self.train_dataset),
            batch_sampler=sampler,
            collate_fn=self.data_collator,
            num_workers=workers,
            pin_memory=self.args.dataloader_pin_memory and self.args.device.type != "cpu",
            persistent_workers=workers > 0 and self.args.dataloader_persistent_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor if workers > 0 else None,
        )
        # Sub-batches differ in size and come in whole rounds of ranks already: accelerate must not even them out.
        # (Only here; evaluation relies on even batches.)
        even_batches, self.accelerator.even_batches = self.accelerator.even_batches, False
        try:
            return self.accelerator.prepare(loader)
        finally:
            self.accelerator.even_batches = even_batches

    # --- saving ------------------------------------------------------------------------------------------------
    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        config = self.model.config
        training_value = getattr(config, "use_cache", None)
        if self._use_cache is not None:
            config.use_cache = self._use_cache
        limit = self.args.save_total_limit
        if self._is_saving:
            self.args.save_total_limit = self._save_total_limit  # for training_args.bin
        try:
            super()._save(output_dir, state_dict=state_dict)
        finally:
            self.args.save_total_limit = limit
            if training_value is not None:
                config.use_cache = training_value
        if self.args.should_save:
            write_arguments(output_dir or output_folder(self.args), self.args)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        step = self.state.global_step
        folder = Path(self._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        if self._saved_step == step:
            return  # This trainer has saved this very step (an interrupt at a saving step, or the end of an epoch).
        refuse_non_finite_weights(self.model, self.optimizer, step, folder.parent)
        since_log = self.accelerator.gather(self._tr_loss.detach().reshape(1)).tolist()
        if self.args.should_save:
            remove_checkpoint(folder)  # what an earlier run may have left
            begin_manifest(folder, step)
        self.accelerator.wait_for_everyone()
        # Trainer would delete old checkpoints, and push the new one, before it is complete.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        self._is_saving, self._save_total_limit = True, limit
        try:
            super()._save_checkpoint(model, trial)
            if self.args.should_save:
                save_loss_sums(self, folder, since_log)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                finish_manifest(folder, step)
        except (OSError, RuntimeError, SafetensorError) as error:
            if self.args.should_save:
                remove_checkpoint(folder)  # gives the space back
            previous = last_complete_checkpoint(folder.parent)
            raise CheckpointError(
                f"could not save {folder}: {error}. "
                + (f"The last complete checkpoint is {previous}" if previous else "There is no complete checkpoint")
            ) from error
        finally:
            self._is_saving = False
            self.args.save_total_limit = limit
        self._saved_step = step
        if self.args.should_save:
            rotate_complete(folder.parent, step, limit, self.state.best_model_checkpoint)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self._is_saving:  # once more when the checkpoint is complete
            push_checkpoint(self, Path(checkpoint_folder))

    # --- resuming ----------------------------------------------------------------------------------------------
    def restore_loss_state(self) -> None:
        """Continue with the sums of losses of the checkpoint that training resumes from."""
        self._watch = UpdateWatch()  # an attempt that ran out of memory may have left batches
        self._loss_is_whole = self._resumed_from is None or restore_loss_sums(self, self._resumed_from)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Do as `Trainer.log` does; `train_loss` is the mean over all steps of the run, also those before a resume."""
        if "train_loss" in logs and self._loss_is_whole:
            logs["train_loss"] = self._total_loss_scalar / max(1, self.state.global_step)
        super().log(logs, *args, **kwargs)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            world = self.args.world_size
            name = f"rng_state_{self.args.process_index}.pth" if world > 1 else "rng_state.pth"
            if not Path(checkpoint, name).is_file():
                warnings.warn(
                    f"{checkpoint} has no {name}: it was saved by another number of processes than {world}, so dropout "
                    "draws other random numbers than in an uninterrupted run",
                    stacklevel=2,
                )
        super()._load_rng_state(checkpoint)

    def planned_steps(self) -> int:
        """Return the number of optimizer steps of the whole run, by `max_steps` or `num_train_epochs`."""
        return int(self.set_initial_training_values(self.args, self.get_train_dataloader())[-1])

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:
            # Trainer would do one more step each time a run that has ended is resumed.
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def train(self, resume_from_checkpoint: str | Path | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Do as `Trainer.train` does, with complete checkpoints only. `config.use_cache` keeps its value.

        Args:
            resume_from_checkpoint: A checkpoint, or True for the newest complete one in `args.output_dir`.
            *args: As for `Trainer.train`.
            **kwargs: As for `Trainer.train`.

        Raises:
            CheckpointError: If the checkpoint is damaged, or, with True, if there is no complete one; or if one cannot
                be written.
            NonFiniteError: If a loss, a gradient or a weight is NaN or infinite.
        """
        checkpoint = self._usable_checkpoint(resume_from_checkpoint)
        self._resumed_from = str(checkpoint) if checkpoint else None
        self._saved_step = None
        try:
            output = super().train(self._resumed_from, *args, **kwargs)
            refuse_non_finite_weights(self.model, self.optimizer, self.state.global_step, output_folder(self.args))
            return output
        finally:
            if self._use_cache is not None:
                self.model.config.use_cache = self._use_cache

    def _usable_checkpoint(self, requested: str | Path | bool | None) -> str | Path | None:
        """Return the checkpoint to resume from, None to begin; see `train`."""
        if not requested:
            return None
        checkpoint = last_complete_checkpoint(output_folder(self.args)) if requested is True else requested
        if checkpoint is None:
            raise CheckpointError(f"there is no complete checkpoint in {self.args.output_dir} to resume from")
        if requested is not True and Path(checkpoint, MANIFEST_NAME).is_file():
            if fault := checkpoint_fault(checkpoint):
                raise CheckpointError(f"cannot resume from {checkpoint}: {fault}")
        if not self.is_deepspeed_enabled and not Path(checkpoint, "scheduler.pt").is_file():
            raise CheckpointError(
                f"cannot resume from {checkpoint}: it has no state of the optimizer and the schedule "
                "(save_only_model). Start a new run from its weights"
            )
        return checkpoint

    # --- numbers that are not finite ---------------------------------------------------------------------------
    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Do as `Trainer.training_step` does, and keep loss and batch until the update has been checked."""
        loss: Tensor = super().training_step(model, inputs, *args, **kwargs)
        self._watch.add(inputs, loss)
        return loss

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        if not self._clips_plainly(model):
            return super()._clip_grad_norm(model)
        # The two halves of `torch.nn.utils.clip_grad_norm_`; clipping by a norm that is NaN makes every gradient NaN.
        parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
        grad_norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        self._watch.check(self, grad_norm)
        torch.nn.utils.clip_grads_with_norm_(parameters, self.args.max_grad_norm, grad_norm)
        return grad_norm

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        if grad_norm is None and self._clips_plainly(model):
            grad_norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        else:
            grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self._watch.check(self, grad_norm)
        return grad_norm

    def _clips_plainly(self, model: nn.Module) -> bool:
        """Return whether torch clips the gradients: no shards, no loss scaling, no engine with its own clipping."""
        plain = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
        if self.accelerator.distributed_type not in plain or getattr(self.accelerator, "scaler", None) is not None:
            return False
        if self._has_shards is None:
            self._has_shards = any(isinstance(parameter, DTensor) for parameter in model.parameters())
        return not self._has_shards
