"""Trainers that push while they train: transformers' own and Urform's, and what is loaded from there without Urform."""

import json
from types import SimpleNamespace

import pytest
from hub_client import TOKEN, last_line, logits

TRAIN = """
from transformers import DataCollatorForSeq2Seq, Seq2SeqTrainer, Seq2SeqTrainingArguments
from urform.training.trainer import UrformTrainer
model = make("UrformForConditionalGeneration", "encoder-decoder")
model.generation_config.num_beams = 3
tok = tokenizer()
rows = [dict(tok("1 2 3", text_target="four")) for _ in range(8)]
arguments = Seq2SeqTrainingArguments(
    "out", push_to_hub=True, hub_model_id={repo!r}, hub_strategy={strategy!r}, hub_token={token!r}, save_steps=1,
    max_steps=2, per_device_train_batch_size=4, report_to="none", use_cpu=True, logging_steps=1, disable_tqdm=True,
    eval_strategy="steps", eval_steps=1,
)
trainer = {trainer}(model=model, args=arguments, train_dataset=rows, eval_dataset=rows[:2], processing_class=tok,
                    data_collator=DataCollatorForSeq2Seq(tok, model))
trainer.train()
trainer._finish_current_push()
for job in trainer.push_in_progress.jobs:
    job.result()
report = urform.check_bundle({repo!r})
assert report.ok, report.to_text()
trainer.push_to_hub()
report = urform.check_bundle({repo!r})
assert report.ok and not report.notes, report.to_text()
model.eval()
ids = torch.arange(12).reshape(2, 6) + 3
with torch.no_grad():
    out = model(input_ids=ids, decoder_input_ids=ids)[0]
print(json.dumps(out.double().flatten().tolist()))
"""


@pytest.mark.parametrize(("trainer", "strategy"), [("Seq2SeqTrainer", "every_save"), ("UrformTrainer", "checkpoint")])
def test_trainer_pushes_what_loads_without_urform(world: SimpleNamespace, trainer: str, strategy: str):
    repo = f"me/{trainer}"
    # The token comes by the arguments alone, which Trainer pickles and uploads.
    code = TRAIN.format(repo=repo, strategy=strategy, token=TOKEN, trainer=trainer)
    expected = last_line(world.push(code, token="").ok())
    paths = world.hub.paths(repo)
    assert {"modeling_urform.py", "requirements.txt", "urform_bundle.json", "README.md", "tokenizer.json"} <= paths
    assert not [p for p in paths if p.endswith((".bin", ".pt")) and p != "training_args.bin" and "/" not in p]
    titles = world.hub.history(repo)
    assert titles[0] == "End of training" and "Training in progress, step 1" in titles
    assert TOKEN.encode() not in world.hub.read(repo, "training_args.bin")  # (all files: see open_world)
    config = json.loads(world.hub.read(repo, "config.json"))
    assert config["auto_map"]["AutoModelForSeq2SeqLM"] == "modeling_urform.UrformForConditionalGeneration"
    assert json.loads(world.hub.read(repo, "generation_config.json"))["num_beams"] == 3

    load = logits("AutoModelForSeq2SeqLM", repo, ", trust_remote_code=True").replace(
        "model(input_ids=ids)", "model(input_ids=ids, decoder_input_ids=ids)"
    )
    code = f"import transformers\ntransformers.AutoTokenizer.from_pretrained({repo!r}, trust_remote_code=True)\n" + load
    home, out = last_line(world.bare.run(code).ok())
    assert home == "transformers_modules"
    assert out == pytest.approx(expected, abs=1e-6)  # in memory the weights are aligned otherwise
    assert config.get("use_cache", True)
    if trainer == "UrformTrainer":
        card = world.hub.read(repo, "README.md").decode()
        assert "floating-point operations" in card and "| loss |" in card and "| learning_rate | `5e-05` |" in card
        assert "last-checkpoint/trainer_state.json" in paths
        inside = load.replace("trust_remote_code=True", "trust_remote_code=True, subfolder='last-checkpoint'")
        assert last_line(world.bare.run(inside).ok())[1] == out
