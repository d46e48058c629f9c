"""`Seq2SeqTrainer` with the four things that training a translator needs and it lacks.

`UrformTrainer` adds, and changes nothing else:

* global batches by a token budget (or by examples), the same on one process and on many: `batching.py`;
* a label-smoothed loss that is a sum over tokens divided by the number of tokens of the whole update, on every process
  and under gradient accumulation: Urform's language models compute it themselves, without logits, others get
  `SmoothedCrossEntropy`;
* checkpoints that are complete or do not count: a manifest with the size of every file is written last, a failed save
  removes what it wrote and leaves the previous checkpoints alone, and `last_complete_checkpoint` skips torn ones;
* `config.use_cache` as the user set it: Trainer turns it off for training and would save that into every checkpoint;
* with every save the training arguments as JSON, which can be read without unpickling anything, and the model card of
  `urform push` where the run is pushed to the Hub.

It works with any model of transformers, not only Urform's.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..modeling.modeling_urform import UrformLanguageModel, UrformPreTrainedModel, decoder_inputs, real_targets
from ..publishing.model_card import is_placeholder, make_card, update_card
from ..publishing.training_record import record_of, write_arguments
from .batching import GlobalBatchSampler

__all__ = [
    "CheckpointError",
    "InterruptCallback",
    "SmoothedCrossEntropy",
    "TrainingInterruptedError",
    "UrformTrainer",
    "complete_checkpoints",
    "last_complete_checkpoint",
]

logger = logging.getLogger(__name__)

MANIFEST_NAME = "checkpoint_manifest.json"


class CheckpointError(RuntimeError):
    """A checkpoint could not be written; the message names the newest complete one."""


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


class _MeanCrossEntropy(torch.autograd.Function):
    """`cross_entropy(..., reduction="sum", label_smoothing=...) / count` with its gradient in one go, rows in chunks.

    A chunk of logits stays in the cache while its few passes run; the composed operations stream the whole logits
    through memory a dozen times. The gradient is (softmax(x) - (1 - smoothing) onehot(y) - smoothing / V) / count,
    zero where the label is ignored.
    """

    CHUNK_ELEMENTS = 1 << 19

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, labels_N: Tensor, count: Tensor, smoothing: float) -> Tensor:  # type: ignore[override]
        size = logits_NV.shape[-1]
        wants_gradient = ctx.needs_input_grad[0]
        gradient_NV = torch.empty_like(logits_NV) if wants_gradient else None
        total = torch.zeros((), dtype=torch.float64, device=logits_NV.device)
        rows = max(1, _MeanCrossEntropy.CHUNK_ELEMENTS // size)
        for start in range(0, len(labels_N), rows):
            part = slice(start, start + rows)
            x_RV = logits_NV[part].to(torch.promote_types(logits_NV.dtype, torch.float32))
            y_R1 = labels_N[part].unsqueeze(1)
            kept_R1 = y_R1.ne(-100)
            y_R1 = y_R1.where(kept_R1, 0)
            lse_R1 = x_RV.logsumexp(dim=1, keepdim=True)
            loss_R1 = lse_R1 - (1 - smoothing) * x_RV.gather(1, y_R1)
            if smoothing:
                loss_R1 = loss_R1 - smoothing * x_RV.mean(dim=1, keepdim=True)
            total += loss_R1.where(kept_R1, 0).sum(dtype=torch.float64)
            if gradient_NV is not None:
                g_RV = torch.sub(x_RV, lse_R1).exp_()
                if smoothing:
                    g_RV -= smoothing / size
                g_RV.scatter_add_(1, y_R1, torch.full_like(lse_R1, smoothing - 1))
                gradient_NV[part] = g_RV.mul_(kept_R1.to(g_RV.dtype) / count)
        if gradient_NV is not None:
            ctx.save_for_backward(gradient_NV)
        return (total / count).to(torch.promote_types(logits_NV.dtype, torch.float32))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient_NV,) = ctx.saved_tensors
        # One process asks for exactly this gradient; a copy of it would cost as much as the loss.
        if grad_outputs[0].device.type != "cpu" or grad_outputs[0].item() != 1:
            gradient_NV = gradient_NV * grad_outputs[0].to(gradient_NV.dtype)
        return gradient_NV, None, None, None


class SmoothedCrossEntropy:
    """Label-smoothed cross-entropy (Szegedy et al. 2016, arXiv:1512.00567, section 7), a mean over the update's tokens.

    Under `torch.no_grad` (evaluation) it is the plain negative log-likelihood: smoothing regularises training, and a
    validation loss that contains it cannot be compared between runs.

    Args:
        smoothing: Probability mass spread evenly over the whole vocabulary, as `torch.nn.functional.cross_entropy`
            defines it.
        shift: True for a causal model, where position i predicts label i+1.
    """

    def __init__(self, smoothing: float, shift: bool = False) -> None:
        if not 0 <= smoothing < 1:
            raise ValueError(f"label_smoothing_factor must be in [0, 1), got {smoothing}")
        self.smoothing = smoothing
        self.shift = shift

    def __call__(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        logits = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
        if self.shift:
            logits, labels = logits[:, :-1], labels[:, 1:]
        smoothing = self.smoothing if torch.is_grad_enabled() else 0.0
        labels = labels.to(logits.device).flatten()
        count = labels.ne(-100).sum() if num_items_in_batch is None else num_items_in_batch
        count = torch.as_tensor(count, device=logits.device)
        loss: Tensor = _MeanCrossEntropy.apply(logits.flatten(0, -2), labels, count, smoothing)
        return loss


def complete_checkpoints(output_dir: str | Path) -> list[Path]:
    """The checkpoints of a run whose every file is there in full, oldest first; torn ones are reported and skipped."""
    found: dict[int, Path] = {}
    for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        if path.is_dir() and (match := re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name)):
            if (reason := _why_incomplete(path)) is None:
                found[int(match[1])] = path
            else:
                warnings.warn(f"skipping the incomplete checkpoint {path}: {reason}", stacklevel=2)
    return [found[step] for step in sorted(found)]


def last_complete_checkpoint(output_dir: str | Path) -> Path | None:
    """The newest complete checkpoint of a run, or None."""
    return next(reversed(complete_checkpoints(output_dir)), None)


def _why_incomplete(checkpoint: Path) -> str | None:
    try:
        sizes = json.loads((checkpoint / MANIFEST_NAME).read_text(encoding="utf-8"))["files"]
    except FileNotFoundError:
        return f"it has no {MANIFEST_NAME}, so saving it did not finish"
    except (ValueError, KeyError, OSError) as error:
        return f"{MANIFEST_NAME} cannot be read ({error})"
    for name, size in sizes.items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
    return None


def _write_manifest(checkpoint: Path, step: int) -> None:
    files = {str(file.relative_to(checkpoint)): file.stat().st_size for file in checkpoint.rglob("*") if file.is_file()}
    manifest = {"step": step, "files": files}
    (checkpoint / MANIFEST_NAME).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


class InterruptCallback(TrainerCallback):
    """Ends training at the next step with a checkpoint when SIGINT or SIGTERM arrives; a second one stops at once."""

    def __init__(self) -> None:
        self.signal_number = 0

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Handles the signals inside the `with` block (only the main thread may)."""
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
        """Asks for a checkpoint and the end; all processes agree on the step."""
        if args.world_size > 1:
            flag = torch.tensor(self.signal_number, device=args.device)
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
            self.signal_number = int(flag)
        if self.signal_number:
            control.should_save = True
            control.should_training_stop = True
        return control


class _SetEpochCallback(TrainerCallback):
    """Tells the sampler its epoch, also behind the wrappers that accelerate puts around it when resuming."""

    def __init__(self, sampler: GlobalBatchSampler, accumulation: int) -> None:
        self.sampler = sampler
        self.updates_per_epoch = -(-sampler.num_global_batches // accumulation)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.sampler.set_epoch(state.global_step // self.updates_per_epoch)


class UrformTrainer(Seq2SeqTrainer):
    """`Seq2SeqTrainer` with global batches, token-exact label smoothing and checkpoints that survive a full disk.

    Args:
        tokens_per_batch: Budget of a global batch in padded tokens, source plus target; None uses
            `per_device_train_batch_size` examples per process.
        pool_batches: See `GlobalBatchSampler`.
        **kwargs: As for `Seq2SeqTrainer`. With `label_smoothing_factor` Urform's language models smooth their own loss,
            and other models' is `SmoothedCrossEntropy`; evaluation is not smoothed. The training dataset has a
            `lengths` attribute (see `EncodedDataset`), else Trainer's own sampling is used.
    """

    def __init__(self, *, tokens_per_batch: int | None = None, pool_batches: int = 4, **kwargs: Any) -> None:
        model, args = kwargs["model"], kwargs["args"]
        if not isinstance(args, Seq2SeqTrainingArguments):
            raise ValueError(f"args must be Seq2SeqTrainingArguments, got {type(args).__name__}")
        self._use_cache = getattr(model.config, "use_cache", None)
        super().__init__(**kwargs)
        self._model_smooths = False
        if args.label_smoothing_factor and self.compute_loss_func is None:
            self._smooth(model.get_base_model() if hasattr(model, "get_base_model") else model)
        self.tokens_per_batch = tokens_per_batch
        self.pool_batches = pool_batches

    def _smooth(self, model: nn.Module) -> None:
        """Settle who smooths the loss; `model` is bare of adapters' wrappers."""
        self.label_smoother = None
        # What splits or replicates parameters takes `lm_head.weight` away from the model's fused loss.
        whole = self.args.n_gpu <= 1 and not self.is_fsdp_enabled and not self.is_deepspeed_enabled
        self._model_smooths = isinstance(model, UrformLanguageModel) and whole and model.fuses_loss()
        if self._model_smooths:
            return
        name = type(model).__name__
        is_causal = "CausalLM" in name or name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
        is_causal = is_causal and not model.config.is_encoder_decoder
        self.compute_loss_func = SmoothedCrossEntropy(self.args.label_smoothing_factor, shift=is_causal)
        # The labels do not reach the model, so Trainer cannot know from its loss that they are shifted.
        self._loss_shifts_labels = is_causal

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.compute_loss`; a model that smooths its own loss is told to, in training."""
        if self._model_smooths and torch.is_grad_enabled() and "labels" in inputs:
            inputs = {**inputs, "label_smoothing": self.args.label_smoothing_factor}
        if self.label_smoother is not None or self.compute_loss_func is not None:
            inputs = self._with_decoder_inputs(inputs)
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _with_decoder_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Give an encoder-decoder what it makes of its labels, which Trainer takes away before the model sees them."""
        labels = inputs.get("labels")
        given = inputs.get("decoder_input_ids") is not None or inputs.get("decoder_inputs_embeds") is not None
        if labels is None or given or not getattr(self.model.config, "is_encoder_decoder", False):
            return inputs
        model: Any = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        if isinstance(model, UrformLanguageModel):
            mask = inputs.get("decoder_attention_mask")
            mask = real_targets(labels, given=False, seen=True) if mask is None else mask
            made = {"decoder_input_ids": decoder_inputs(model.config, labels, mask), "decoder_attention_mask": mask}
        elif hasattr(model, "prepare_decoder_input_ids_from_labels"):
            made = {"decoder_input_ids": model.prepare_decoder_input_ids_from_labels(labels=labels)}
        else:
            raise ValueError(
                f"{type(model).__name__} cannot make decoder_input_ids of its labels, which the loss of "
                f"label_smoothing_factor={self.args.label_smoothing_factor} or of compute_loss_func needs; let the "
                "data collator give decoder_input_ids"
            )
        return {**inputs, **made}

    def get_train_dataloader(self) -> DataLoader:
        """Global batches dealt to the processes by accelerate."""
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
        self.pop_callback(_SetEpochCallback)
        self.add_callback(_SetEpochCallback(sampler, self.args.gradient_accumulation_steps))
        workers = self.args.dataloader_num_workers
        loader: DataLoader = DataLoader(
            self.train_dataset,
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
        try:
            super()._save(output_dir, state_dict=state_dict)
        finally:
            if training_value is not None:
                config.use_cache = training_value
        if self.args.should_save:
            write_arguments(output_dir or self.args.output_dir, self.args)

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ) -> None:
        """For Urform's models the card of `urform push`, from the state of this run; a card of the user's is kept."""
        if not isinstance(self.model, UrformPreTrainedModel):
            super().create_model_card(
                language, license, tags, model_name, finetuned_from, tasks, dataset_tags, dataset, dataset_args
            )
        elif self.is_world_process_zero():
            given = {
                "language": language,
                "license": license,
                "tags": tags,
                "model_name": model_name,
                "base_model": finetuned_from,
                "pipeline_tag": tasks if isinstance(tasks, str) else None,
                "datasets": dataset_tags or dataset,
            }
            given = {name: value for name, value in given.items() if value is not None}
            folder, record = Path(self.args.output_dir), record_of(self.state, self.args)
            repo_id, card = self.hub_model_id or folder.resolve().name, folder / "README.md"
            make = make_card if not card.is_file() or is_placeholder(card) else update_card
            make(folder, repo_id, record, given).save(card)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if folder.is_dir() and _why_incomplete(folder) is None:
            return  # This very step is saved already (an interrupt at a saving step, or the end of an epoch).
        if self.args.should_save:
            shutil.rmtree(folder, ignore_errors=True)  # what an earlier run may have left torn
        self.accelerator.wait_for_everyone()
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                _write_manifest(folder, self.state.global_step)
        except (OSError, RuntimeError, SafetensorError) as error:
            if self.args.should_save:
                shutil.rmtree(folder, ignore_errors=True)  # gives the space back
            previous = last_complete_checkpoint(folder.parent)
            raise CheckpointError(
                f"could not save {folder}: {error}. "
                + (f"The last complete checkpoint is {previous}" if previous else "There is no complete checkpoint")
            ) from error

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.train`; `config.use_cache` is afterwards what it was before."""
        try:
            return super().train(*args, **kwargs)
        finally:
            if self._use_cache is not None:
                self.model.config.use_cache = self._use_cache
