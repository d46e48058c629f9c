"""`Seq2SeqTrainer` that pushes what `urform push` would: the model card of Urform, and only the files of the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import Seq2SeqTrainer

from ..modeling.stack_urform import UrformPreTrainedModel
from ..publishing.model_card import is_placeholder, make_card, update_card
from ..publishing.trainer_push import output_folder, push_output
from ..publishing.training_record import record_of

__all__ = ["HubTrainer"]


class HubTrainer(Seq2SeqTrainer):
    """`Seq2SeqTrainer` with Urform's model card and its choice of files when a run is pushed to the Hub."""

    def create_model_card(  # noqa: PLR0913  # transformers' signature
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
        """Write the card of `urform push` for Urform's models, from the state of this run. Keep a card of the user's.

        Other models get the card of transformers. The arguments are those of `Trainer.create_model_card`.
        """
        if not isinstance(self.model, UrformPreTrainedModel):
            super().create_model_card(
                language, license, tags, model_name, finetuned_from, tasks, dataset_tags, dataset, dataset_args
            )
        elif self.is_world_process_zero():
            fields = {
                "language": language,
                "license": license,
                "tags": tags,
                "model_name": model_name,
                "base_model": finetuned_from,
                "pipeline_tag": tasks if isinstance(tasks, str) else None,
                "datasets": dataset_tags or dataset,
            }
            fields = {name: value for name, value in fields.items() if value is not None}
            folder, record = Path(output_folder(self.args)), record_of(self.state, self.args)
            repo_id, card = self.hub_model_id or folder.resolve().name, folder / "README.md"
            make = make_card if not card.is_file() or is_placeholder(card) else update_card
            make(folder, repo_id, record, fields).save(card)

    def push_to_hub(  # type: ignore[override]  # `private` is not in transformers 5.17: it is in `kwargs`
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """Do as `Trainer.push_to_hub` does, but upload only what `published_files` lists of the output folder."""
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
        """Write the model card and push the output folder as it is.

        Args:
            commit_message: Of the commit.
            blocking: Whether to wait until everything is uploaded.
            token: For the Hub; by default that of the training arguments.
            revision: Branch to push to.
            **card: Arguments of `create_model_card`.
        """
        if not self.is_world_process_zero():
            return None
        own_tags = card.pop("tags", None) or []
        tags = [own_tags] if isinstance(own_tags, str) else list(own_tags)
        tags += [tag for tag in getattr(self.model, "model_tags", None) or () if tag not in tags]
        repo_id = self.args.hub_model_id or Path(output_folder(self.args)).name
        name = card.pop("model_name", None) or repo_id.split("/")[-1]
        self.create_model_card(model_name=name, **{**card, **({"tags": tags} if tags else {})})
        self._finish_current_push()
        return push_output(self, commit_message, token, revision, run_as_future=not blocking)
