"""Publish a checkpoint on the Hub so that it loads for everybody, with Urform installed or without.

    python hub_upload.py CHECKPOINT --repo-id NAMESPACE/NAME [--private] [--revision R] [--bundle-only DIR] [--dry-run]

What it does today, each step a function, and nothing is uploaded unless all the steps before have passed:

1. `check_checkpoint`: the config, all weight shards as safetensors, no pickled weights.
2. `write_bundle`: weights, config, tokenizer, the package's code laid flat, `auto_map` with every head that the
   architecture has, and a small model card where the checkpoint has none.
3. `verify_bundle`: two clean offline processes load the bundle, one without Urform and Triton and with
   `trust_remote_code=True`, one with the installed plugin; their outputs must be equal bit by bit.
4. `upload_bundle`: one commit.

The token is left to huggingface_hub (HF_TOKEN or `hf auth login`); it is never read, printed or written here.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from urform.configuration.bundle_urform import HEADS, auto_map, flatten_package

_PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib"}
# What Trainer leaves beside a model: not part of the model, and pickled for the most part.
_TRAINER_STATE = ("training_args.bin", "optimizer.", "scheduler.pt", "scaler.pt", "rng_state", "trainer_state.json")
_PUBLISHED = {".safetensors", ".json", ".txt", ".model", ".jinja", ".md"}

_LOAD = """
import os, sys, torch
path, auto, installed, out = sys.argv[1:]
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("urform", "triton"):
            raise ModuleNotFoundError("No module named " + repr(name), name=name)
if installed == "yes":
    import urform
else:
    sys.meta_path.insert(0, Absent())
import transformers
model = getattr(transformers, auto).from_pretrained(path, trust_remote_code=installed == "no").eval()
if (type(model).__module__.startswith("urform.")) != (installed == "yes"):
    raise SystemExit(f"{type(model)} was loaded, with urform installed: {installed}")
shape = (1, 2, 6) if "MultipleChoice" in auto else (2, 6)
ids = torch.arange(12).reshape(shape) % model.config.vocab_size
inputs = {"input_ids": ids}
if model.config.is_encoder_decoder and auto != "AutoModelForTextEncoding":
    inputs["decoder_input_ids"] = ids
with torch.no_grad():
    torch.save(model(**inputs)[0], out)
if os.path.exists(path + "/tokenizer_config.json"):
    transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=installed == "no")("1 2 3")
"""

_CARD = """---
library_name: transformers
pipeline_tag: {task}
tags:
- urform
---

# {name}

A {architecture} Transformer made with Urform.

```python
from transformers import {auto}, AutoTokenizer

model = {auto}.from_pretrained("{repo_id}", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("{repo_id}", trust_remote_code=True)
```

With `pip install urform` and `import urform`, `trust_remote_code` is not needed.
"""
_TASKS = {
    "AutoModelForSeq2SeqLM": "text-generation",
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForQuestionAnswering": "question-answering",
    "AutoModelForMultipleChoice": "multiple-choice",
}


def check_checkpoint(checkpoint: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the checkpoint's config as a dict; ValueError when something is missing or must not be published."""
    folder = Path(checkpoint)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json; give the folder that save_pretrained or Trainer wrote.")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config.get("model_type") != "urform":
        raise ValueError(f"{folder}/config.json has model_type={config.get('model_type')!r}; only 'urform' is served.")
    index = folder / "model.safetensors.index.json"
    shards = {"model.safetensors"}
    if index.is_file():
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    missing = sorted(name for name in shards if not (folder / name).is_file())
    if missing:
        raise ValueError(f"{folder} lacks {', '.join(missing)}; save the model again with save_pretrained.")
    pickles = [
        p.name for p in sorted(folder.iterdir()) if p.suffix in _PICKLES and not p.name.startswith(_TRAINER_STATE)
    ]
    if pickles:
        raise ValueError(
            f"{folder} holds pickled files, which may run code when loaded: {', '.join(pickles)}. Remove them."
        )
    return config


def write_bundle(checkpoint: str | os.PathLike[str], directory: str | os.PathLike[str], repo_id: str = "") -> Path:
    """Write everything that is published of `checkpoint` into `directory`, which must be empty or new."""
    config = check_checkpoint(checkpoint)
    target = Path(directory)
    target.mkdir(parents=True, exist_ok=True)
    if any(target.iterdir()):
        raise ValueError(f"{target} is not empty; a bundle is written into a new or an empty folder.")
    for path in sorted(Path(checkpoint).iterdir()):
        if path.is_file() and path.suffix in _PUBLISHED and not path.name.startswith((*_TRAINER_STATE, ".")):
            shutil.copyfile(path, target / path.name)
    flatten_package(target)
    config["auto_map"] = auto_map(config.get("architecture", "encoder-decoder"))
    _write_json(target / "config.json", config)
    tokenizer = target / "tokenizer_config.json"
    if tokenizer.is_file():
        fields = json.loads(tokenizer.read_text(encoding="utf-8"))
        if fields.get("tokenizer_class") == "UrformTokenizer":
            fields["auto_map"] = {"AutoTokenizer": ["tokenization_urform.UrformTokenizer", None]}
            _write_json(tokenizer, fields)
    if not (target / "README.md").exists():
        auto = _auto_class(config)
        name = repo_id or Path(checkpoint).resolve().name
        card = _CARD.format(
            auto=auto, task=_TASKS.get(auto, "feature-extraction"), name=name.rpartition("/")[2], repo_id=name,
            architecture=config.get("architecture", "encoder-decoder"),
        )  # fmt: skip
        (target / "README.md").write_text(card, encoding="utf-8")
    return target


def verify_bundle(directory: str | os.PathLike[str]) -> None:
    """Load the bundle in two clean processes, with and without Urform; ValueError unless the outputs are equal."""
    config = check_checkpoint(directory)
    with tempfile.TemporaryDirectory() as scratch:
        env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": f"{scratch}/modules"}
        outputs = []
        for installed in ("no", "yes"):
            out = f"{scratch}/{installed}.pt"
            command = [sys.executable, "-c", _LOAD, str(Path(directory).resolve()), _auto_class(config), installed, out]
            run = subprocess.run(
                command, cwd=scratch, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True
            )
            if run.returncode:
                raise ValueError(f"The bundle does not load (urform installed: {installed}):\n{run.stderr.strip()}")
            outputs.append(out)
        import torch

        without, with_plugin = (torch.load(out) for out in outputs)
        if not torch.equal(without, with_plugin):
            raise ValueError("The bundle's own code and the installed urform give different outputs for one input.")


def upload_bundle(
    directory: str | os.PathLike[str], repo_id: str, *, private: bool | None = None, revision: str | None = None
) -> str:
    """Upload the bundle as one commit; return its address."""
    from huggingface_hub import HfApi

    api = HfApi()
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    message = "Upload with Urform"
    return str(
        api.upload_folder(repo_id=repo_id, folder_path=Path(directory), revision=revision, commit_message=message)
    )


def _auto_class(config: dict[str, Any]) -> str:
    saved = (config.get("architectures") or ["UrformModel"])[0]
    return next((auto for auto, (name, _) in HEADS.items() if name == saved), "AutoModel")


def _write_json(path: Path, fields: dict[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(prog="hub_upload.py", description="Publish a Urform checkpoint on the Hub.")
    parser.add_argument("checkpoint", help="folder written by save_pretrained or Trainer")
    parser.add_argument("--repo-id", help="NAMESPACE/NAME of the repository")
    parser.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    parser.add_argument("--revision", help="branch to upload to")
    parser.add_argument("--bundle-only", metavar="DIR", help="write and verify the bundle in DIR; upload nothing")
    parser.add_argument("--dry-run", action="store_true", help="do everything except the upload")
    args = parser.parse_args(arguments)
    if not (args.repo_id or args.bundle_only or args.dry_run):
        parser.error("--repo-id is needed to upload (or give --bundle-only DIR or --dry-run)")
    try:
        with tempfile.TemporaryDirectory() as scratch:
            bundle = write_bundle(args.checkpoint, args.bundle_only or f"{scratch}/bundle", args.repo_id or "")
            print(f"bundle: {len(list(bundle.iterdir()))} files")
            verify_bundle(bundle)
            print("verified: loads without urform, outputs equal")
            if args.bundle_only or args.dry_run:
                return 0
            print("uploaded:", upload_bundle(bundle, args.repo_id, private=args.private, revision=args.revision))
    except (ValueError, OSError) as error:  # huggingface_hub's HTTP errors are OSErrors
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
