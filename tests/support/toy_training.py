"""A toy language and a recipe that trains on it in a second."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import yaml

WORDS = "the a red green blue dog cat house runs sees eats big small tree bird old new under over with".split()


def make_corpus(folder: Path, train_lines: int = 200, seed: int = 0) -> Path:
    """A toy language: every word spelt backwards; lengths are uneven."""
    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", train_lines), ("val", 20), ("test", 20)):
        lines = [[rng.choice(WORDS) for _ in range(rng.randint(1, 14))] for _ in range(count)]
        (folder / f"{split}.src").write_text("".join(" ".join(line) + "\n" for line in lines), encoding="utf-8")
        backwards = ("".join(" ".join(word[::-1] for word in line) + "\n") for line in lines)
        (folder / f"{split}.tgt").write_text("".join(backwards), encoding="utf-8")
    return folder


def toy_recipe(folder: Path, **training: Any) -> Path:
    """A recipe for the toy corpus that takes a second to run."""
    make_corpus(folder)
    recipe = {
        "data": {
            "data_dir": str(folder),
            "train_source": "train.src",
            "train_target": "train.tgt",
            "validation_source": "val.src",
            "validation_target": "val.tgt",
            "tokens_per_batch": 600,
        },
        "tokenizer": {"vocab_size": 420},
        "model": {
            "config": {
                "hidden_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "intermediate_size": 64,
                "hidden_dropout_prob": 0.1,
                "max_position_embeddings": 128,
            }
        },
        "training": {
            "max_steps": 12,
            "learning_rate": 3e-3,
            "lr_scheduler_type": "inverse_sqrt",
            "warmup_steps": 4,
            "logging_steps": 1,
            "save_strategy": "steps",
            "save_steps": 4,
            "eval_strategy": "no",
            "label_smoothing_factor": 0.1,
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            **training,
        },
        "run": {"num_beams": 2},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


def losses(history: list[dict[str, float]]) -> dict[int, float]:
    return {int(entry["step"]): entry["loss"] for entry in history if "loss" in entry}
