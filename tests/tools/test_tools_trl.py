"""TRL's trainers on a folder's name: our class is loaded, and the losses are those of the stock class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tool_models import TEXTS, need, save_pair

import urform


def _options(folder: Path) -> dict[str, Any]:
    return {"output_dir": str(folder / "out"), "max_steps": 3, "per_device_train_batch_size": 2, "report_to": [],
            "use_cpu": True, "bf16": False, "save_strategy": "no", "logging_steps": 1, "learning_rate": 1e-3,
            "disable_tqdm": True, "seed": 1}  # fmt: skip


def _losses(trainer: Any) -> list[float]:
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


@pytest.mark.parametrize("packing", [False, True])
def test_supervised_training_from_a_folder(packing: bool, tmp_path: Path):
    need("trl", "datasets")
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    losses = []
    for folder in save_pair("Llama", tmp_path):
        data = Dataset.from_dict({"text": TEXTS * 4})
        options = {"packing": True, "max_length": 16, "packing_strategy": "wrapped"} if packing else {}
        trainer = SFTTrainer(str(folder), args=SFTConfig(**_options(tmp_path), **options), train_dataset=data)
        losses.append(_losses(trainer))
    assert type(trainer.model) is urform.UrformForCausalLM
    assert len(losses[0]) == 3 and losses[1] == pytest.approx(losses[0], rel=2e-4)


def test_preference_training_from_a_folder_and_from_a_model(tmp_path: Path):
    need("trl", "datasets")
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    rows = {"prompt": ["the cat"] * 4, "chosen": [" sat on the mat"] * 4, "rejected": [" ran", " and", " in", " red"]}
    stock, ours = save_pair("Llama", tmp_path)
    losses = []
    for model in (str(stock), str(ours), AutoModelForCausalLM.from_pretrained(ours)):
        trainer = DPOTrainer(
            model,
            args=DPOConfig(**_options(tmp_path)),
            train_dataset=Dataset.from_dict(rows),
            processing_class=AutoTokenizer.from_pretrained(ours),
        )
        losses.append(_losses(trainer))
    assert type(trainer.model) is urform.UrformForCausalLM
    assert len(losses[0]) == 3 and losses[0][2] != losses[0][0]
    for found in losses[1:]:
        assert found == pytest.approx(losses[0], rel=2e-3)
