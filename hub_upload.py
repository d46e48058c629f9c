"""Publish a checkpoint on the Hub so that it loads for everybody, with Urform installed or without.

    python hub_upload.py CHECKPOINT --repo-id NAMESPACE/NAME [--private] [--revision R] [--create-pr]
                         [--bundle-only DIR] [--no-code] [--dry-run] [--card-data FILE]

`urform push` is the same command and `publish` the same thing as a function. Its steps; whatever fails stops it before
the first byte goes out:

1. `check_checkpoint` (publishing/checkpoint_checks.py): complete shards, finite weights, consistent ties, a tokenizer
   that fits the vocabulary, no pickles, no secrets.
2. `write_bundle`: weights, config, tokenizer; the package's code laid flat, `auto_map` with every head that the
   architecture has, `requirements.txt` (publishing/bundle_code.py); the model card (publishing/model_card.py); the
   stamp, with the sha256 of every file (publishing/bundle_stamp.py).
3. `verify_bundle` (publishing/verification.py): clean offline processes load and run it, without Urform and with it;
   outputs must be equal bit by bit, and the snippets of the card must run.
4. `upload_bundle`: one commit onto the state that was looked at, or nothing. Interrupted, it is run again: large files
   that have arrived are not sent twice, and a revision is whole or as it was.

The token is left to huggingface_hub (HF_TOKEN or `hf auth login`); it is never printed or written here.
"""

import argparse
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from urform.configuration.checkpoint_files import read_json, refuse_links
from urform.configuration.heads_urform import auto_map
from urform.configuration.version_urform import CONFIG_KEY, config_stamp, package_version
from urform.publishing.bundle_code import write_code
from urform.publishing.bundle_stamp import STAMP_NAME, bundle_files, read_stamp, write_stamp
from urform.publishing.card_pictures import ALIGNMENT_NAME, CURVE_NAME
from urform.publishing.checkpoint_checks import check_checkpoint, refuse_secrets
from urform.publishing.model_card import is_placeholder, make_card, read_card_data, update_card
from urform.publishing.training_record import read_record
from urform.publishing.verification import verify_bundle

__all__ = ["check_checkpoint", "main", "publish", "upload_bundle", "verify_bundle", "write_bundle"]

Say = Callable[[str], None]
_GENERATED = {"requirements.txt", "config.json", "tokenizer_config.json"}
_WEIGHTS = re.compile(r"model[\w.-]*\.safetensors(\.index[\w.]*\.json)?")


def write_bundle(
    checkpoint: str | os.PathLike[str],
    directory: str | os.PathLike[str],
    repo_id: str = "",
    *,
    code: bool = True,
    card_data: dict[str, Any] | None = None,
) -> Path:
    """Check `checkpoint` and write everything that is published of it into `directory`, which must be empty or new.

    Args:
        checkpoint: the folder that `save_pretrained` or Trainer wrote; what Trainer logged is read from it, too.
        directory: where to write.
        repo_id: the name under which it will be published; the card's snippets load it by that name.
        code: whether to add the code that lets it load without Urform.
        card_data: fields of the model card, see `urform.publishing.model_card.make_card`.

    Raises:
        ValueError: see `check_checkpoint`; or `directory` is not empty; or the package breaks the bundle's rules.
    """
    source, target = Path(checkpoint), Path(directory)
    if target.is_dir() and any(target.iterdir()):
        raise ValueError(f"{target} is not empty; a bundle is written into a new or an empty folder.")
    config = check_checkpoint(source)
    repo_id = repo_id or _local_name(source)
    target.mkdir(parents=True, exist_ok=True)
    for name in bundle_files(source):
        if not name.endswith(".py") and name not in _GENERATED:
            (target / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / name, target / name)
    if code:
        write_code(target)
    config.pop("auto_map", None)
    if code:
        config["auto_map"] = auto_map(config.get("architecture", "encoder-decoder"))
    _write_json(target / "config.json", {**config, CONFIG_KEY: config_stamp(package_version())})
    if (source / "tokenizer_config.json").is_file():
        fields = read_json(source / "tokenizer_config.json")
        if fields.get("tokenizer_class") == "UrformTokenizer":
            fields.pop("auto_map", None)
            if code:
                fields["auto_map"] = {"AutoTokenizer": ["tokenization_urform.UrformTokenizer", None]}
        _write_json(target / "tokenizer_config.json", fields)
    record = read_record(source)
    readme = source / "README.md"
    if readme.is_file() and not is_placeholder(readme):
        shutil.copyfile(readme, target / "README.md")
        card = update_card(target, repo_id, record, card_data)
    else:
        card = make_card(target, repo_id, record, card_data, code=code, verified=True)
    card.save(target / "README.md")
    refuse_secrets(target, ["README.md"])
    write_stamp(target, package_version())
    return target


def upload_bundle(
    directory: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    say: Say = lambda line: None,
) -> str:
    """Upload the bundle as one commit; return the commit's address (of the pull request with `create_pr`).

    Files of an earlier bundle that this one lacks (other shards, modules that are gone) are deleted in the same
    commit. The commit names the state of the repository that was looked at as its parent: if somebody else has pushed
    meanwhile, nothing happens.

    Raises:
        ValueError: no token; a link that leads out of `directory`; the repository is public where `private` is asked;
            somebody else pushed meanwhile.
        OSError, RuntimeError: what huggingface_hub raises when the Hub refuses or cannot be reached.
    """
    from huggingface_hub import HfApi

    refuse_links(directory, everything=True)
    _need_token()
    folder, api = Path(directory), HfApi(library_name="urform", library_version=package_version())
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not create_pr:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    state = api.model_info(repo_id, revision=revision)
    if private and not state.private:
        raise ValueError(f"{repo_id} exists and is public; make it private in its settings, or choose another name.")
    operations = _operations(api, repo_id, state, folder, say)
    try:
        made = _commit(api, operations, folder, _Place(repo_id, state.sha or "", revision, create_pr), say)
    except Exception as error:
        if not _is_of_the_network(error):
            raise
        raise ConnectionError(
            f"the upload to {repo_id} was interrupted ({type(error).__name__}: {error}); the repository is as it was. "
            "Run the same command again: large files that have arrived are not sent twice."
        ) from error
    return str((made.pr_url if create_pr else None) or made.commit_url)


def _need_token() -> None:
    from huggingface_hub import get_token

    if get_token() is None:
        raise ValueError("there is no Hugging Face token: run `hf auth login`, or set HF_TOKEN.")


def _operations(api: Any, repo_id: str, state: Any, folder: Path, say: Say) -> list[Any]:
    """Return what a commit does: add every file of the bundle, delete what belonged only to the bundle before."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    present = {sibling.rfilename for sibling in state.siblings or []}
    stale = sorted(_belonged(api, repo_id, state.sha or "", present) - {*names})
    if stale:
        say(f"deleting what belonged to the bundle before: {', '.join(stale)}")
    added = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=folder / name) for name in names]
    return [*added, *(CommitOperationDelete(path_in_repo=name) for name in stale)]


def _belonged(api: Any, repo_id: str, sha: str, present: set[str]) -> set[str]:
    """Return the files of a repository that an earlier bundle put there."""
    old = {name for name in present if _WEIGHTS.fullmatch(name) or name in (CURVE_NAME, ALIGNMENT_NAME)}
    if STAMP_NAME in present:
        path = api.hf_hub_download(repo_id, STAMP_NAME, revision=sha)
        old |= present & {*(read_stamp(os.path.dirname(path)) or {"files": {}})["files"]}
    return old


class _Place(NamedTuple):
    """Where a commit goes: the repository and its state before, the branch, and whether as a pull request."""

    repo_id: str
    parent: str
    revision: str | None
    create_pr: bool


def _commit(api: Any, operations: list[Any], folder: Path, place: _Place, say: Say, tries: int = 4) -> Any:
    """Commit; try again after errors of the network and the server, but never twice onto the same state."""
    repo_id, parent, revision, create_pr = place
    message, attempt = f"Upload with urform {package_version()}", 0
    while True:
        attempt += 1
        try:
            return api.create_commit(
                repo_id,
                operations,
                commit_message=message,
                revision=revision,
                parent_commit=parent,
                create_pr=create_pr,
            )
        except Exception as error:
            status = getattr(getattr(error, "response", None), "status_code", None)
            if status == 412:
                raise ValueError(
                    f"{repo_id} has been changed by somebody else meanwhile; nothing was published. Publish again."
                ) from error
            passing = status == 429 or (status or 0) >= 500 or _is_of_the_network(error)
            if not passing or create_pr or attempt == tries:  # a pull request might be opened twice
                raise
            now = api.model_info(repo_id, revision=revision).sha
            if now != parent:
                if _is_published(api, repo_id, now, folder):  # only the answer was lost
                    return _Published(f"{api.endpoint}/{repo_id}/commit/{now}")
                raise
            say(f"the Hub did not take the commit ({type(error).__name__}); trying again")
            time.sleep(2**attempt)


class _Published:
    """A commit whose answer was lost."""

    pr_url = None

    def __init__(self, commit_url: str) -> None:
        self.commit_url = commit_url


def _is_of_the_network(error: BaseException | None) -> bool:
    """Whether a connection failed: huggingface_hub lets httpx's errors through (httpx2's, as of version 2.4)."""
    while error is not None:
        if isinstance(error, ConnectionError | TimeoutError):
            return True
        if any(base.__name__ == "TransportError" and base.__module__[:5] == "httpx" for base in type(error).__mro__):
            return True
        error = error.__cause__
    return False


def _is_published(api: Any, repo_id: str, sha: str, folder: Path) -> bool:
    from huggingface_hub.errors import RemoteEntryNotFoundError

    try:
        path = api.hf_hub_download(repo_id, STAMP_NAME, revision=sha)
    except RemoteEntryNotFoundError:
        return False
    return read_stamp(os.path.dirname(path)) == read_stamp(folder)


def publish(  # noqa: PLR0913  # public: every option of `urform push` is named
    checkpoint: str | os.PathLike[str],
    repo_id: str | None = None,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    bundle_only: str | os.PathLike[str] | None = None,
    code: bool = True,
    dry_run: bool = False,
    card_data: str | os.PathLike[str] | dict[str, Any] | None = None,
    say: Say = lambda line: None,
) -> str | None:
    """Check, bundle, verify and upload a checkpoint; return the commit's address.

    Args:
        checkpoint: the folder that `save_pretrained` or Trainer wrote.
        repo_id: NAMESPACE/NAME; only `bundle_only` and `dry_run` go without.
        private: make a new repository private; refuse one that exists and is public.
        revision: the branch, made if needed.
        create_pr: open a pull request instead of committing to the branch.
        bundle_only: write the bundle into this folder, verify it, and upload nothing; None is returned.
        code: whether the repository holds the code that lets it load without Urform.
        dry_run: do everything except the upload; None is returned.
        card_data: fields of the model card, or a YAML file with them.
        say: called with a line for each step.

    Raises:
        ValueError, OSError, RuntimeError: see `write_bundle`, `verify_bundle` and `upload_bundle`.
    """
    uploads = not (bundle_only or dry_run)
    if repo_id is not None or uploads:
        _check_repo_id(repo_id)
    if card_data is not None and not isinstance(card_data, dict):
        card_data = read_card_data(card_data)
    if uploads:
        _need_token()  # before the minutes that the other steps may take
    with tempfile.TemporaryDirectory() as scratch:
        say("[1/3] checking the checkpoint and writing the bundle")
        bundle = write_bundle(
            checkpoint, bundle_only or f"{scratch}/bundle", repo_id or "", code=code, card_data=card_data
        )
        _tell_files(Path(checkpoint), bundle, say)
        say("[2/3] verifying it in clean processes")
        name = repo_id or _local_name(Path(checkpoint))
        verify_bundle(bundle, name, say=lambda line: say(f"      verified: {line}"))
        if not uploads or repo_id is None:
            say("[3/3] nothing is uploaded" + (f": the bundle is in {bundle_only}" if bundle_only else ""))
            return None
        say(f"[3/3] uploading to {repo_id}")
        done = upload_bundle(
            bundle,
            repo_id,
            private=private,
            revision=revision,
            create_pr=create_pr,
            say=lambda line: say(f"      {line}"),
        )
    say(f"      published: {done}")
    return done


def _check_repo_id(repo_id: str | None) -> None:
    from huggingface_hub.utils import validate_repo_id

    if not repo_id or repo_id.count("/") != 1:
        raise ValueError(f"repo_id={repo_id!r} must be NAMESPACE/NAME; the model card names the repository in full.")
    validate_repo_id(repo_id)


def _tell_files(checkpoint: Path, bundle: Path, say: Say) -> None:
    """Say how much is in the bundle, and which files of the checkpoint are not."""
    files = [p for p in bundle.rglob("*") if p.is_file()]
    say(f"      {len(files)} files, {sum(p.stat().st_size for p in files) / 1e6:,.1f} MB")
    if left := _left_out(checkpoint, bundle):
        say(f"      not published: {', '.join(left)}")


def _local_name(checkpoint: Path) -> str:
    return "local/" + (re.sub(r"[^\w.-]+|\.\.+|--+", "-", checkpoint.resolve().name).strip("-.") or "checkpoint")


def _left_out(checkpoint: Path, bundle: Path) -> list[str]:
    return sorted(
        p.name
        for p in checkpoint.iterdir()
        if p.is_file() and not (bundle / p.name).exists() and p.suffix != ".py" and p.name != STAMP_NAME
    )


def _write_json(path: Path, fields: dict[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(prog="hub_upload.py", description="Publish a Urform checkpoint on the Hub.")
    parser.add_argument("checkpoint", help="folder written by save_pretrained or Trainer")
    parser.add_argument("--repo-id", help="NAMESPACE/NAME of the repository")
    parser.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    parser.add_argument("--revision", help="branch to upload to")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request instead of committing")
    parser.add_argument("--bundle-only", metavar="DIR", help="write and verify the bundle in DIR; upload nothing")
    parser.add_argument("--no-code", action="store_true", help="publish without code: it loads with urform installed")
    parser.add_argument("--dry-run", action="store_true", help="do everything except the upload")
    parser.add_argument("--card-data", metavar="FILE", help="YAML with fields of the model card, see docs/hub.md")
    args = parser.parse_args(arguments)
    if not (args.repo_id or args.bundle_only or args.dry_run):
        parser.error("--repo-id is needed to upload (or give --bundle-only DIR or --dry-run)")
    try:
        publish(
            args.checkpoint,
            args.repo_id,
            private=args.private,
            revision=args.revision,
            create_pr=args.create_pr,
            bundle_only=args.bundle_only,
            code=not args.no_code,
            dry_run=args.dry_run,
            card_data=args.card_data,
            say=lambda line: print(line, flush=True),
        )
    except (ValueError, OSError, RuntimeError) as error:  # huggingface_hub's HTTP errors are OSErrors
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
