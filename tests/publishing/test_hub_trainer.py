"""Trainers that push while they train: transformers' own and Urform's, and what is loaded from there without Urform."""

import json
from types import SimpleNamespace

import pytest
import torch
from hub_client import TOKEN, last_line, logits
from numerics import assert_within

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
    precise = last_line(world.bare.run(code.replace(").eval()", ").double().eval()")).ok())[1]
    # In memory the weights are aligned otherwise.
    assert_within(*(torch.tensor(x, dtype=torch.float64) for x in (out, expected, precise)))
    assert config.get("use_cache", True)
    if trainer == "UrformTrainer":
        card = world.hub.read(repo, "README.md").decode()
        assert "floating-point operations" in card and "| loss |" in card and "| learning_rate | `5e-05` |" in card
        assert "last-checkpoint/trainer_state.json" in paths
        inside = load.replace("trust_remote_code=True", "trust_remote_code=True, subfolder='last-checkpoint'")
        assert last_line(world.bare.run(inside).ok())[1] == out


WAYS = """
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments
tok = tokenizer()
rows = [dict(tok("1 2 3")) for _ in range(4)]
def trainer(folder, **given):
    arguments = TrainingArguments(folder, hub_model_id={repo!r}, hub_token={token!r}, max_steps=1, report_to="none",
                                  per_device_train_batch_size=4, use_cpu=True, disable_tqdm=True, save_strategy="no",
                                  push_to_hub=given.pop("push_to_hub", False))
    return Trainer(args=arguments, train_dataset=rows, processing_class=tok,
                   data_collator=DataCollatorForLanguageModeling(tok, mlm=False), **given)
way = {way!r}
if way == "a push at the end alone":
    made = trainer("out", model=make())
    made.train()
    made.push_to_hub()
elif way == "a model that train() makes":
    made = trainer("out", model_init=lambda trial=None: make(), push_to_hub=True)
    made.train()
    made.push_to_hub()
elif way == "an adapter":
    import peft
    made = trainer("out", model=peft.get_peft_model(make(), peft.LoraConfig()), push_to_hub=True)
    made.save_model()
    from pathlib import Path
    assert {token!r}.encode() not in Path("out", "training_args.bin").read_bytes()
else:
    model = make()
    made = trainer("out", model=model)
    made.train()
    assert not model.config.use_cache  # Trainer's own doing
    made.save_model()
    assert sorted(os.listdir("out")) == ["config.json", "generation_config.json", "model.safetensors",
                                         "tokenizer.json", "tokenizer_config.json", "training_args.bin"]
    assert transformers.AutoConfig.from_pretrained("out").use_cache and "_is_published" not in vars(model)
    copy = __import__("copy").deepcopy(model)
    torch.save(copy, "whole.pt")
"""


@pytest.mark.parametrize(
    "way", ["a push at the end alone", "a model that train() makes", "an adapter", "nothing is pushed"]
)
def test_ways_to_meet_a_trainer(world: SimpleNamespace, way: str):
    """Transformers' Trainer as it is: what is pushed has its code, what is not has none, and no token is pickled."""
    if way == "an adapter":
        pytest.importorskip("peft")
    repo = f"me/way-{len(way)}"
    world.push(WAYS.format(repo=repo, token=TOKEN, way=way), token="").ok()
    if way.startswith("a "):
        assert {"modeling_urform.py", "requirements.txt", "urform_bundle.json"} <= world.hub.paths(repo)
        assert json.loads(world.hub.read(repo, "config.json")).get("use_cache", True)
        report = world.plugin.run(f"import urform\nprint(urform.check_bundle({repo!r}).ok)").ok()
        assert report.strip().endswith("True")


RECIPE = """
from pathlib import Path
from urform.training.run import train
Path("corpus").mkdir()
for side in ("src", "tgt"):
    Path("corpus", f"train.{{side}}").write_text("".join(f"one two {{n}}\\n" for n in range(40)))
Path("out").mkdir()
Path("out", "stray.txt").write_text("mine")
Path("out", "notes.safetensors").write_text("mine")
size = "{{hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 16}}"
result = train("translation", [
    "train_source=corpus/train.src", "train_target=corpus/train.tgt", "target_language=en", "max_steps=4",
    "save_steps=1", "save_total_limit=2", "average_last=2", "eval_strategy=no", f"model.config={{size}}",
    "vocab_size=300",
    "tokens_per_batch=400", "use_cpu=true", "disable_tqdm=true", "warmup_steps=0", "bf16=false", "hub_always_push=true",
    "push_to_hub=true", "hub_model_id={repo}", "hub_strategy={strategy}", "hub_token={token}",
], output_dir="out")
report = urform.check_bundle({repo!r})
assert report.ok, report.to_text()
from safetensors.torch import load_file
states = [load_file(f"out/checkpoint-{{n}}/model.safetensors") for n in (3, 4)]
mean = {{name: (states[0][name] + states[1][name]) / 2 for name in states[0]}}
published = urform.UrformForConditionalGeneration.from_pretrained({repo!r}).state_dict()
assert all(torch.equal(published[name], tensor) for name, tensor in mean.items())
assert not list(Path("out").glob(".*"))
"""


@pytest.mark.parametrize("strategy", ["every_save", "checkpoint"])
def test_a_recipe_pushes_its_average_and_nothing_else(world: SimpleNamespace, strategy: str):
    """No token, no staging folder, no stray file, in any commit; at the end the averaged model, with its stamp."""
    repo = f"me/recipe-{strategy.replace('_', '-')}"
    world.push(RECIPE.format(repo=repo, strategy=strategy, token=TOKEN), token="").ok()
    ever = {name for commit in world.hub.repos[repo].commits.values() for name in commit.files} - {".gitattributes"}
    assert ever >= {"model.safetensors", "recipe.yaml", "README.md", "tokenizer.json", "urform_bundle.json"}
    assert not [name for name in ever if name.startswith((".", "stray", "notes", "tokenizer/", "run_record"))]
    assert not [name for name in ever if name.startswith("checkpoint-")]
    assert ("last-checkpoint/checkpoint_manifest.json" in ever) == (strategy == "checkpoint")
    recipe = world.hub.read(repo, "recipe.yaml").decode()
    assert TOKEN not in recipe and recipe.startswith("# left out, as they are secrets: training.hub_token\n")
    assert world.hub.history(repo)[0] == "End of training"
