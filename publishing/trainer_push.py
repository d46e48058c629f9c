"""Makes what a Trainer pushes load for everybody: transformers' own Trainer, once urform has been imported.

A Trainer saves the model as it always does and uploads its output folder, so `PublishCallback`, which `import urform`
puts among Trainer's default callbacks, tells model and tokenizer that their saves are published. A push after a
checkpoint copies weights and configs out of the checkpoint's folder, which has the code and the stamp already, but not
these; the callback does. It does nothing where nothing is pushed and with other models.

`UrformTrainer` uploads what `published_files` lists (`push_output`, `push_checkpoint`), not what lies in the folder.

It also keeps `hub_token`, and every other `_token` of TrainingArguments, out of `training_args.bin`, which Trainer
pickles and pushes, and `config.use_cache` as it was: Trainer turns it off, and would save that.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

from transformers.trainer_callback import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.training_args import TrainingArguments
from transformers.utils import PushInProgress, hf_api

from ..configuration.bundle_stamp import STAMP_NAME, read_stamp
from ..configuration.bundle_urform import BundledCodeMixin, publish_with, write_code
from .card_pictures import ALIGNMENT_NAME, CURVE_NAME
from .checkpoint_checks import refuse_secrets
from .secret_fields import hide_tokens

# What belongs to a run, beside the files of its stamp: weights, configs, tokenizers and what Trainer logs.
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
        trainer.push_in_progress = PushInProgress(jobs)
    else:
        running.jobs.extend(jobs)


def _is_ours(model: Any) -> bool:
    return isinstance(model, BundledCodeMixin) and model._is_ours()


class PublishCallback(TrainerCallback):
    """See the module's text."""

    _use_cache: bool | None = None

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Hide the token; have everything saved with its code if it is going to be pushed."""
        if _is_ours(kwargs.get("model")):
            self._use_cache = kwargs["model"].config.use_cache
        hide_tokens(args)
        if args.push_to_hub:
            self._publish(**kwargs)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Give the config back what Trainer has turned off: with labels our models make no cache."""
        if self._use_cache is not None and _is_ours(kwargs.get("model")):
            kwargs["model"].config.use_cache = self._use_cache or args.use_cache

    def on_push_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Put the code beside what is about to be uploaded."""
        self._publish(**kwargs)
        if not state.is_world_process_zero or not _is_ours(kwargs.get("model")):
            return
        write_code(args.output_dir)
        stamp = Path(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}", STAMP_NAME)
        if stamp.is_file():
            shutil.copyfile(stamp, Path(args.output_dir, STAMP_NAME))

    @staticmethod
    def _publish(model: Any = None, processing_class: Any = None, **others: Any) -> None:
        publish_with(model)
        publish_with(processing_class)
