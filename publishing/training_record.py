"""What a training run left on disk about itself, as a model card tells it: read from JSON and YAML, never a pickle.

- `trainer_state.json`, in the folder or in its newest `checkpoint-N`: losses, evaluations, the best one, FLOPs.
- `training_args.json` (`write_arguments`, by UrformTrainer), and `recipe.yaml` and `results.json` of `urform train`.
"""

from __future__ import annotations

import json
import platform
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..configuration.checkpoint_files import read_json, refuse_link

ARGUMENTS_NAME = "training_args.json"
# What a reader needs to repeat a run; the rest of the 120 arguments says where and how often things were written.
TOLD = tuple(
    "num_train_epochs max_steps per_device_train_batch_size gradient_accumulation_steps learning_rate "
    "lr_scheduler_type warmup_steps optim adam_beta1 adam_beta2 adam_epsilon weight_decay max_grad_norm "
    "label_smoothing_factor bf16 fp16 seed data_seed".split()
)

_NUMBER = (int, float)


@dataclass
class TrainingRecord:
    """What is known of a run; whatever is not known is empty.

    Attributes:
        steps: Optimizer steps done.
        epochs: Passes over the data.
        history: Trainer's log, entry by entry.
        results: Metrics of the last evaluation, without the prefix.
        best: (name, value, step) of the best evaluation, where Trainer was told to watch one.
        test: Scores on the test set, as `urform train` writes them, signatures among them.
        flops: Floating-point operations, as Trainer counts them.
        seconds: Duration of the training.
        arguments: Training arguments.
        processes: Number of processes.
        device: Name of the device.
        on_gpu: Whether it is an accelerator.
        recipe: The recipe of `urform train`.
    """

    steps: int | None = None
    epochs: float | None = None
    history: list[dict[str, Any]] = field(default_factory=list)
    results: dict[str, float] = field(default_factory=dict)
    best: tuple[str, float, int | None] | None = None
    test: dict[str, Any] = field(default_factory=dict)
    flops: float | None = None
    seconds: float | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    processes: int = 1
    device: str = ""
    on_gpu: bool = False
    recipe: dict[str, Any] = field(default_factory=dict)

    @property
    def curve(self) -> dict[str, list[tuple[int, float]]]:
        """(step, loss) of training and of evaluation, as far as they were logged."""
        curve: dict[str, list[tuple[int, float]]] = {}
        for entry in self.history:
            for key, name in (("loss", "training"), ("eval_loss", "evaluation")):
                if entry.get(key) is not None and entry.get("step") is not None:
                    curve.setdefault(name, []).append((int(entry["step"]), float(entry[key])))
        return curve


def write_arguments(folder: str | Path, arguments: Any) -> None:
    """Write those of `TrainingArguments` that a card tells as JSON, with the device that they name."""
    text = json.dumps(_told(arguments), indent=1, default=str)
    Path(folder, ARGUMENTS_NAME).write_text(f"{text}\n", encoding="utf-8")


def record_of(state: Any, arguments: Any) -> TrainingRecord:
    """Return the record of a run from its `TrainerState` and `TrainingArguments`."""
    record = TrainingRecord()
    _read_state(record, asdict(state))
    _read_arguments(record, json.loads(json.dumps(_told(arguments), default=str)))
    return record


def _told(arguments: Any) -> dict[str, Any]:
    import torch

    device = _processor()
    if arguments.device.type == "cuda":
        device = torch.cuda.get_device_name(arguments.device)
    elif arguments.device.type != "cpu":
        device = arguments.device.type
    values = {name: value for name, value in arguments.to_dict().items() if name in TOLD}
    on_gpu = arguments.device.type != "cpu"
    return {"arguments": values, "processes": arguments.world_size, "device": device, "on_gpu": on_gpu}


def _processor() -> str:
    """Return the processor's name; where the system does not tell it, its architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(encoding="utf-8", errors="replace") if cpuinfo.is_file() else ""
    name = re.search(r"^model name\s*:\s*(.*\S)", text, re.MULTILINE)
    return name[1] if name else platform.processor() or platform.machine()


def _check(path: Path, fields: Any, kinds: dict[str, Any], section: str = "") -> dict[str, Any]:
    """Return a table of a file; ValueError with file and field where it is none or a field is of another kind."""
    if not isinstance(fields, dict):
        raise ValueError(f"{path}: {section or 'its content'} is {str(fields)[:80]!r} and should be a table of fields.")
    for name, kind in kinds.items():
        if fields.get(name) is not None and not isinstance(fields[name], kind):
            wanted = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
            raise ValueError(f"{path}: {section}{name} is {str(fields[name])[:80]!r} and should be of type {wanted}.")
    return fields


def _read_arguments(record: TrainingRecord, told: dict[str, Any], path: Path = Path(ARGUMENTS_NAME)) -> None:
    _check(path, told, {"arguments": dict, "processes": int, "device": str})
    arguments = told.get("arguments") or {}
    record.arguments = {name: arguments[name] for name in TOLD if name in arguments}
    record.processes, record.device = told.get("processes") or 1, told.get("device") or ""
    record.on_gpu = bool(told.get("on_gpu", False))


def read_record(checkpoint: str | Path) -> TrainingRecord:
    """Read what there is about the run that wrote `checkpoint` (a checkpoint, or the folder of a run).

    Raises:
        ValueError: a file cannot be read, has another form than the one in which it is written, or is a link that leads
            out of the folder.
    """
    folder = Path(checkpoint)
    places = [folder, *_checkpoints(folder)]
    if re.fullmatch(r"checkpoint-\d+", folder.name):
        places.append(folder.parent)
    record = TrainingRecord()
    if (path := _first([folder, *_checkpoints(folder)], "trainer_state.json", folder)) is not None:
        _read_state(record, read_json(path), path)
    if (path := _first(places, ARGUMENTS_NAME, folder)) is not None:
        _read_arguments(record, read_json(path), path)
    if (path := _first(places, "recipe.yaml", folder)) is not None:
        _read_recipe(record, path)
    if (path := _first([folder], "results.json", folder)) is not None:
        results = _check(path, read_json(path), {"test": dict, "train_runtime": _NUMBER, "total_flos": _NUMBER})
        record.test = results.get("test") or {}
        record.seconds = results.get("train_runtime", record.seconds)
        record.flops = results.get("total_flos", record.flops)
    return record


def _read_recipe(record: TrainingRecord, path: Path) -> None:
    import yaml

    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as YAML ({type(error).__name__}: {error})") from error
    recipe = _check(path, {} if recipe is None else recipe, {"data": dict, "model": dict, "training": dict})
    words = ("task", "data_dir", "dataset_name", "source_language", "target_language")
    _check(path, recipe.get("data") or {}, dict.fromkeys(words, str), "data.")
    _check(path, recipe.get("model") or {}, {"from_pretrained": str}, "model.")
    record.recipe = {section: fields for section, fields in recipe.items() if fields is not None}
    stated = record.recipe.get("training", {})
    record.arguments = {**{name: stated[name] for name in TOLD if name in stated}, **record.arguments}


def _read_state(record: TrainingRecord, state: dict[str, Any], path: Path = Path("trainer_state.json")) -> None:
    numbers = dict.fromkeys(("epoch", "total_flos", "best_metric"), _NUMBER)
    _check(path, state, {"log_history": list, "global_step": int, "best_global_step": int, **numbers})
    record.history = [entry for entry in state.get("log_history") or [] if isinstance(entry, dict)]
    record.steps, record.epochs = state.get("global_step"), state.get("epoch")
    record.flops = state.get("total_flos") or None
    for entry in record.history:
        _check(path, entry, {"step": int, **dict.fromkeys(("loss", "eval_loss", "train_runtime"), _NUMBER)}, "log: ")
        record.seconds = entry.get("train_runtime", record.seconds)
        record.results = _evaluation(entry) or record.results
    if state.get("best_metric") is not None:
        value, step = state["best_metric"], state.get("best_global_step")
        names = [k for e in record.history for k, v in e.items() if k.startswith("eval_") and v == value]
        record.best = (names[0].removeprefix("eval_") if names else "best metric", float(value), step)


def _evaluation(entry: dict[str, Any]) -> dict[str, float]:
    """Return the metrics of an entry of Trainer's log, without the prefix; those that are about time are left out."""
    skipped = ("runtime", "per_second", "steps", "epoch", "mem_")
    found = {key.removeprefix("eval_"): value for key, value in entry.items() if key.startswith("eval_")}
    return {
        key: float(value)
        for key, value in found.items()
        if isinstance(value, (int, float)) and not any(part in key for part in skipped)
    }


def _checkpoints(folder: Path) -> list[Path]:
    found = [p for p in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
    return sorted(found, key=lambda p: -int(p.name.partition("-")[2]))


def _first(places: list[Path], name: str, folder: Path) -> Path | None:
    """Return the first of the files of a name; none may be a link out of `folder`, or of the folder of the run."""
    for place in places:
        if (place / name).is_file():
            refuse_link(place if place == folder.parent else folder, place / name)
            return place / name
    return None
