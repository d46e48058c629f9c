"""Makes what a Trainer pushes load for everybody: transformers' own Trainer, where the model is one of ours.

Nothing of transformers is changed for that. A Trainer asks the model that it takes whether it `accepts_loss_kwargs`,
and calls its `save_pretrained`. At both moments `meet_trainer` looks which Trainer is calling, and

- keeps `hub_token`, and every other `_token` of TrainingArguments, out of `training_args.bin`, which Trainer pickles
  and pushes;
- keeps `config.use_cache` as it was: Trainer turns it off, and would save that;
- if the Trainer pushes, has the model and the tokenizer write the bundle with every save, and gives the Trainer
  `PublishCallback`. A push after a checkpoint copies weights and configs out of the checkpoint's folder, which has the
  code and the stamp already, but it does not copy these two; the callback does.

`UrformTrainer` uploads what `published_files` lists (`push_output`, `push_checkpoint`), not what lies in the folder.
"""

from __future__ import annotations

import inspect
import re
import shutil
from pathlib import Path
from typing import Any

from transformers.trainer import Trainer
from transformers.trainer_callback import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.training_args import TrainingArguments
from transformers.utils import PushInProgress, hf_api

from ..configuration.bundle_urform import BundledCodeMixin, publish_with
from .bundle_code import write_code
from .bundle_stamp import STAMP_NAME, read_stamp
from .card_pictures import ALIGNMENT_NAME, CURVE_NAME
from .checkpoint_checks import refuse_secrets
from .secret_fields import hide_tokens

# What belongs to a run, besides the files of its stamp: weights, configs, tokenizers and what Trainer logs.
_PUBLISHED = re.compile(
    r"(?:adapter_)?model[\w.-]*\.safetensors(?:\.index(?:\.\w+)?\.json)?"
    r"|(?:config|generation_config|adapter_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab"
    r"|preprocessor_config|processor_config|training_args|trainer_state|(?:all_|train_|eval_|predict_|test_)?results)\.json"
    r"|(?:configuration|modeling|tokenization|processing)_\w+\.py|(?:merges|vocab|requirements)\.txt|[\w-]+\.(?:model|spm)"
    r"|chat_template\.jinja|additional_chat_templates/[\w-]+\.jinja|runs/[\w./-]*events\.out\.tfevents[\w.-]*"
    r"|README\.md|recipe\.yaml|training_args\.bin"
)


def published_files(folder: str | Path) -> list[str]:
    """Return the names, with forward slashes, of the files that a push of a run's folder uploads."""
    root = Path(folder)
    stamp = read_stamp(root)
    listed = {STAMP_NAME, CURVE_NAME, ALIGNMENT_NAME, *(stamp["files"] if stamp is not None else ())}
    names = [path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file() and not path.is_symlink()]
    return sorted(name for name in names if name in listed or _PUBLISHED.fullmatch(name))


def push_output(
    trainer: Any, message: str, token: str | None = None, revision: str | None = None, **options: Any
) -> Any:
    """Upload what is listed of a Trainer's output folder as it is; return what `upload_folder` returns.

    Raises:
        ValueError: If a text among the files has a token or a password in it.
    """
    folder, args = Path(trainer.args.output_dir), trainer.args
    names = published_files(folder)
    refuse_secrets(folder, [name for name in names if name.endswith((".json", ".yaml", ".md", ".txt", ".bin"))])
    return hf_api().upload_folder(
        repo_id=trainer.hub_model_id,
        folder_path=folder,
        commit_message=message,
        token=token if token is not None else args.hub_token,
        allow_patterns=names,
        revision=revision if revision is not None else args.hub_revision,
        **options,
    )


def push_checkpoint(trainer: Any, checkpoint: Path) -> None:
    """Upload a checkpoint that is complete as the state of the run, and in a folder of its own if the run says so."""
    args = trainer.args
    running = trainer.push_in_progress
    if not trainer.is_world_process_zero() or args.hub_strategy == "end":
        return
    if not args.hub_always_push and running is not None and not running.is_done():
        return
    trainer.callback_handler.on_push_begin(args, trainer.state, trainer.control)
    for name in published_files(checkpoint):  # copied: the checkpoint may be deleted before it has been sent
        if name != "trainer_state.json":
            target = Path(args.output_dir, name)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(checkpoint / name, target)
    by_steps = args.save_strategy == "steps"
    place = f"step {trainer.state.global_step}" if by_steps else f"epoch {int(trainer.state.epoch)}"
    message = f"Training in progress, {place}"
    jobs = [push_output(trainer, message, run_as_future=True)]
    if args.hub_strategy in ("checkpoint", "all_checkpoints"):
        jobs.append(
            hf_api().upload_folder(
                repo_id=trainer.hub_model_id,
                folder_path=checkpoint,
                path_in_repo="last-checkpoint" if args.hub_strategy == "checkpoint" else checkpoint.name,
                commit_message=f"{message}, checkpoint",
                token=args.hub_token,
                run_as_future=True,
                revision=args.hub_revision,
            )
        )
    if running is None or running.is_done():
        trainer.push_in_progress = PushInProgress(jobs)  # type: ignore[arg-type]  # annotated as one future, read as a list
    else:
        running.jobs.extend(jobs)


# ------------------------------------------------------------------------------------ transformers' own Trainer


def meet_trainer(model: Any) -> None:
    """Prepare the Trainer that is using `model` right now, if one does; see the module's text."""
    trainer = _calling_trainer()
    if trainer is None:
        return
    hide_tokens(trainer.args)
    if not hasattr(trainer, "callback_handler"):  # it is being made, and will turn the cache off
        vars(model).setdefault("_use_cache_of_user", model.config.use_cache)
    elif model is trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False):
        if (use_cache := vars(model).pop("_use_cache_of_user", None)) is not None:
            model.config.use_cache = use_cache or trainer.args.use_cache
        if trainer.args.push_to_hub or trainer.hub_model_id is not None:
            _publish_with(trainer, model)


def _calling_trainer() -> Trainer | None:
    """Return the innermost Trainer of which a method is being executed.

    Trainer tells no model by whom it is used, so this is read from the call stack.
    """
    frame = inspect.currentframe()
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, Trainer) and hasattr(owner, "args"):
            return owner
        frame = frame.f_back
    return None


def output_folder(args: TrainingArguments) -> str:
    """Return the folder of a run; raise ValueError if the arguments name none."""
    if args.output_dir is None:
        raise ValueError("output_dir=None; give the training arguments a folder")
    return args.output_dir


def _publish_with(trainer: Trainer, model: Any) -> None:
    """Let every later save of a Trainer's model and tokenizer write the bundle, as if it were being pushed."""
    publish_with(model)
    publish_with(trainer.processing_class)
    if not any(isinstance(callback, PublishCallback) for callback in trainer.callback_handler.callbacks):
        trainer.add_callback(PublishCallback)


class PublishCallback(TrainerCallback):
    """Puts the code next to what a Trainer with one of our models is about to upload."""

    def on_push_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the code into the output folder, and the stamp of the checkpoint that is being copied there."""
        model = kwargs.get("model")
        if not state.is_world_process_zero or not isinstance(model, BundledCodeMixin) or not model._is_ours():
            return
        folder = output_folder(args)
        write_code(folder)
        stamp = Path(folder, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}", STAMP_NAME)
        if stamp.is_file():
            shutil.copyfile(stamp, Path(folder, STAMP_NAME))
