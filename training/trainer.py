"""`Seq2SeqTrainer` with what training a translator needs and it lacks.

`UrformTrainer` adds, and changes nothing else:

* global batches by a token budget (or by examples), the same on one process and on many: `batching.py`;
* a label-smoothed loss that is a sum over tokens divided by the number of tokens of the whole update, on every process
  and under gradient accumulation: Urform's language models compute it themselves, without logits, others get
  `SmoothedCrossEntropy`;
* checkpoints that are complete or do not count (`checkpointing.py`): a manifest with the sha256 of every file is
  written last, old checkpoints are deleted after that, and a failed save removes what it wrote;
* a resumed run that logs what the uninterrupted one logs, and that does nothing if it had ended;
* a stop where a loss, a gradient or a weight is not finite (`finite.py`);
* `config.use_cache` as the user set it: Trainer turns it off for training and would save that into every checkpoint;
* with every save the training arguments as JSON, which can be read without unpickling anything, and the model card of
  `urform push` where the run is pushed to the Hub.

It works with any model of transformers, not only Urform's.
"""

from __future__ import annotations

import json
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate.utils import DistributedType
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
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
from ..publishing.secret_fields import hide_tokens
from ..publishing.trainer_push import push_checkpoint, push_output
from ..publishing.training_record import record_of, write_arguments
from .batching import GlobalBatchSampler
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
    write_text_atomically,
)
from .finite import NonFiniteError, UpdateWatch, refuse_non_finite_weights

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

LOSS_STATE_NAME = "loss_state.json"


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


class _RestoreLossCallback(TrainerCallback):
    """Restores the sums of losses: Trainer sets them to zero just before this event."""

    def __init__(self, trainer: UrformTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer.restore_loss_state()


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
        self._is_saving = False
        self._save_total_limit: int | None = None
        self._saved_step: int | None = None
        self._resumed_from: str | None = None
        self._loss_is_whole = False
        self._has_shards: bool | None = None
        self._watch = UpdateWatch()
        super().__init__(**kwargs)
        hide_tokens(args)
        self.add_callback(_RestoreLossCallback(self))
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
            mask = real_targets(labels, given=False, all_logits=True) if mask is None else mask
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
        step = self.state.global_step
        folder = Path(self._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        if self._saved_step == step:
            return  # This trainer has saved this very step (an interrupt at a saving step, or the end of an epoch).
        refuse_non_finite_weights(self.model, self.optimizer, step, folder.parent)
        tr_losses = self.accelerator.gather(self._tr_loss.detach().reshape(1)).tolist()
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
                self._save_loss_state(folder, tr_losses)
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

    # --- publishing --------------------------------------------------------------------------------------------
    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self._is_saving:  # once more when the checkpoint is complete
            push_checkpoint(self, Path(checkpoint_folder))

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """As `Trainer.push_to_hub`; of the output folder, what `published_files` lists is uploaded."""
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            private = {"private": kwargs["private"]} if "private" in kwargs else {}  # not before transformers 5.23
            self.init_hf_repo(token=token if token is not None else self.args.hub_token, **private)
        kwargs.pop("private", None)
        self.save_model(_internal_call=True)
        return self.push_saved(commit_message or "End of training", blocking, token, revision, **kwargs)

    def push_saved(
        self,
        commit_message: str,
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        **card: Any,
    ) -> Any:
        """Write the model card (`card`: see `create_model_card`) and push the output folder as it is."""
        if not self.is_world_process_zero():
            return None
        given = card.pop("tags", None) or []
        tags = [given] if isinstance(given, str) else list(given)
        tags += [tag for tag in getattr(self.model, "model_tags", None) or () if tag not in tags]
        name = (
            card.pop("model_name", None) or (self.args.hub_model_id or Path(self.args.output_dir).name).split("/")[-1]
        )
        self.create_model_card(model_name=name, **{**card, **({"tags": tags} if tags else {})})
        self._finish_current_push()
        return push_output(self, commit_message, token, revision, run_as_future=not blocking)

    # --- resuming ----------------------------------------------------------------------------------------------
    def _save_loss_state(self, folder: Path, tr_losses: list[float]) -> None:
        """Keep the loss summed up since the last log, per process, and in all: Trainer would begin at zero again."""
        state = {
            "since_log": tr_losses,
            "total": self._total_loss_scalar,
            "last_logged_step": self._globalstep_last_logged,
        }
        write_text_atomically(folder / LOSS_STATE_NAME, json.dumps(state))

    def restore_loss_state(self) -> None:
        """Go on with the sums of losses of the checkpoint that training resumes from."""
        self._watch = UpdateWatch()  # an attempt that ran out of memory may have left batches
        if self._resumed_from is None:
            self._loss_is_whole = True
            return
        path = Path(self._resumed_from, LOSS_STATE_NAME)
        self._loss_is_whole = path.is_file()
        if not self._loss_is_whole:
            return  # a checkpoint of another Trainer
        state = json.loads(path.read_text(encoding="utf-8"))
        since_log = state["since_log"]
        same_world = len(since_log) == self.args.world_size
        # Another number of processes: the mean over the processes is what gets logged.
        mine = since_log[self.args.process_index] if same_world else sum(since_log) / len(since_log)
        self._tr_loss += mine
        self._total_loss_scalar = state["total"]
        self._globalstep_last_logged = state["last_logged_step"]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As `Trainer.log`; `train_loss` is the mean over all steps of the run, those before a resume included."""
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
        """Return after how many optimizer steps training ends, by `max_steps` or `num_train_epochs`."""
        return int(self.set_initial_training_values(self.args, self.get_train_dataloader())[-1])

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:
            # Trainer would do one more step each time a run that has ended is resumed.
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def train(self, resume_from_checkpoint: str | Path | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.train`, with complete checkpoints only; `config.use_cache` is afterwards what it was before.

        Args:
            resume_from_checkpoint: A checkpoint, or True for the newest complete one in `args.output_dir`.
            *args: As for `Trainer.train`.
            **kwargs: As for `Trainer.train`.

        Raises:
            CheckpointError: If the checkpoint is damaged, or, with True, if there is no complete one; or if one cannot
                be written.
            NonFiniteError: If a loss, a gradient or a weight is NaN or infinite.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise CheckpointError(f"there is no complete checkpoint in {self.args.output_dir} to resume from")
        elif resume_from_checkpoint and Path(resume_from_checkpoint, MANIFEST_NAME).is_file():
            if fault := checkpoint_fault(resume_from_checkpoint):
                raise CheckpointError(f"cannot resume from {resume_from_checkpoint}: {fault}")
        if resume_from_checkpoint and not self.is_deepspeed_enabled:
            if not Path(resume_from_checkpoint, "scheduler.pt").is_file():
                raise CheckpointError(
                    f"cannot resume from {resume_from_checkpoint}: it has no state of the optimizer and the schedule "
                    "(save_only_model). Start a new run from its weights"
                )
        self._resumed_from = str(resume_from_checkpoint) if resume_from_checkpoint else None
        self._saved_step = None
        try:
            output = super().train(self._resumed_from, *args, **kwargs)
            refuse_non_finite_weights(self.model, self.optimizer, self.state.global_step, self.args.output_dir)
            return output
        finally:
            if self._use_cache is not None:
                self.model.config.use_cache = self._use_cache

    # --- numbers that are not finite ---------------------------------------------------------------------------
    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """As `Trainer.training_step`; loss and batch are kept until the update has been checked."""
        loss: Tensor = super().training_step(model, inputs, *args, **kwargs)
        self._watch.add(inputs, loss)
        return loss

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        if not self._clips_plainly(model):
            return super()._clip_grad_norm(model)
        # The two halves of `torch.nn.utils.clip_grad_norm_`; clipping by a norm that is NaN makes every gradient NaN.
        parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
        grad_norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters])
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
        """Whether clipping is torch's: no shards, no loss scaling, no engine of its own."""
        plain = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
        if self.accelerator.distributed_type not in plain or getattr(self.accelerator, "scaler", None) is not None:
            return False
        if self._has_shards is None:
            self._has_shards = any(isinstance(parameter, DTensor) for parameter in model.parameters())
        return not self._has_shards
