"""Makes what a Trainer pushes load for everybody: transformers' own Trainer, once urform has been imported.

A Trainer saves the model as it always does and uploads its output folder, so `PublishCallback`, which `import urform`
puts among Trainer's default callbacks, tells model and tokenizer that their saves are published. A push after a
checkpoint copies weights and configs out of the checkpoint's folder, which has the code and the stamp already, but not
these; the callback does. It does nothing where nothing is pushed and with other models.

It also keeps `hub_token`, and every other `_token` of TrainingArguments, out of `training_args.bin`, which Trainer
pickles and pushes, and `config.use_cache` as it was: Trainer turns it off, and would save that.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from transformers.trainer_callback import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.training_args import TrainingArguments

from ..configuration.bundle_stamp import STAMP_NAME
from ..configuration.bundle_urform import BundledCodeMixin, publish_with, write_code
from .secret_fields import token_fields


class SecretToken(str):
    """A token that is None where it is pickled and hidden where it is shown by `repr`."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        return type(None), ()

    def __repr__(self) -> str:
        return "<token>"

    def __copy__(self) -> SecretToken:
        return self

    def __deepcopy__(self, memo: Any) -> SecretToken:
        return self


def _is_ours(model: Any) -> bool:
    return isinstance(model, BundledCodeMixin) and model._is_ours()


class PublishCallback(TrainerCallback):
    """See the module's text."""

    _use_cache: bool | None = None

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Hide the token; have everything saved with its code if it is going to be pushed."""
        if _is_ours(kwargs.get("model")):
            self._use_cache = kwargs["model"].config.use_cache
        for name in token_fields(args):
            setattr(args, name, SecretToken(getattr(args, name)))
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
