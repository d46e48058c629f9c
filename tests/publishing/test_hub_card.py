"""Model cards: what they say is what the run left behind; the Hub takes their metadata; their snippets run."""

import json
import platform
import re
import shutil
import urllib.request
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import Hub
from huggingface_hub import ModelCard
from numerics import assert_within, exact
from transformers import TrainerState, TrainingArguments

import urform
from urform import hub_upload
from urform.configuration.heads_urform import HEADS
from urform.dependencies import HOW_TO_INSTALL
from urform.publishing import card_pictures, model_card, training_record
from urform.publishing.card_snippets import snippets
from urform.publishing.verification import card_snippets, verify_bundle

TINY = {"vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
STATE = {
    "global_step": 400, "epoch": 2.5, "total_flos": 3.21e12, "best_metric": 1.25, "best_global_step": 300,
    "log_history": [
        {"step": 100, "loss": 3.0, "learning_rate": 1e-3}, {"step": 100, "eval_loss": 2.5, "eval_runtime": 1.0},
        {"step": 200, "loss": 2.0}, {"step": 300, "loss": 1.5, "eval_samples_per_second": 4.0},
        {"step": 300, "eval_loss": 1.25, "eval_bleu": 31.5, "eval_runtime": 2.0, "epoch": 2.0},
        {"step": 400, "train_runtime": 7200.0, "total_flos": 3.21e12, "train_loss": 2.0},
    ],
}  # fmt: skip
ARGUMENTS = {
    "arguments": {"learning_rate": 1e-3, "warmup_steps": 7, "hub_token": "x"},
    "processes": 2,
    "device": "a CPU",
}
SIGNATURE = "nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:2.6.0"
RESULTS = {"test": {"bleu": 39.12, "bleu_signature": SIGNATURE, "examples": 1000}, "train_runtime": 7200.0}
RECIPE = """
data: {task: seq2seq, data_dir: /home/me/corpora/multi30k, source_language: en, target_language: de}
model: {from_pretrained: /home/me/secret/place}
training: {learning_rate: 0.5, label_smoothing_factor: 0.1}
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of `urform train`, with a tiny model."""
    folder = tmp_path_factory.mktemp("run") / "run"
    torch.manual_seed(0)
    model = urform.UrformForConditionalGeneration(urform.UrformConfig(architecture="encoder-decoder", **TINY))
    model.save_pretrained(folder)
    tokenizer = urform.UrformTokenizer.train(["1 2 3 four five"] * 5, vocab_size=300, languages=["de", "fi", "zh-Hant"])
    tokenizer.save_pretrained(folder)
    (folder / "checkpoint-400").mkdir()
    (folder / "checkpoint-400" / "trainer_state.json").write_text(json.dumps(STATE))
    (folder / "training_args.json").write_text(json.dumps(ARGUMENTS))
    (folder / "results.json").write_text(json.dumps(RESULTS))
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder


def card_of(folder: Path, target: Path, **options: object) -> ModelCard:
    return ModelCard.load(hub_upload.write_bundle(folder, target, "me/it", **options) / "README.md")


def validated(card: ModelCard) -> ModelCard:
    """What `ModelCard.validate` asks the Hub, asked of the one on loopback."""
    with Hub() as hub:
        body = json.dumps({"content": str(card), "repoType": "model"}).encode()
        with urllib.request.urlopen(f"{hub.endpoint}/api/validate-yaml", data=body) as answer:
            assert json.load(answer) == {"errors": [], "warnings": []}
    return card


def test_card_tells_what_the_run_left(trained: Path, tmp_path: Path):
    card = validated(card_of(trained, tmp_path / "b"))
    data = card.data
    assert data.pipeline_tag == "translation" and data.library_name == "transformers"
    assert data.language == ["de", "en", "fi", "zh"] and {"urform", "encoder-decoder"} <= set(data.tags)
    assert data.base_model is None  # a folder of the author's is nothing to others
    results = {(r.metric_type, r.dataset_split): r for r in data.eval_results}
    assert {key: r.metric_value for key, r in results.items()} == {
        ("loss", "validation"): 1.25, ("bleu", "validation"): 31.5, ("bleu", "test"): 39.12
    }  # fmt: skip
    assert results["bleu", "test"].metric_args == {"signature": SIGNATURE}
    assert all(r.dataset_name == "multi30k" for r in data.eval_results)
    text = card.text
    assert "400 updates, 2.5 epochs" in text and "Best loss: 1.25, at step 300." in text
    assert "| learning_rate | `0.001` |" in text and "| label_smoothing_factor | `0.1` |" in text
    assert SIGNATURE.replace("|", "\\|") in text and "3.21e+12 floating-point operations" in text
    assert "7,200 x 100 x 2 / 3,600,000 = 0.4 kWh" in text and "an assumption" in text  # 2 h x 0.1 kW x 2
    assert "/home/me" not in str(card) and "hub_token" not in str(card)


def test_author_overrides(trained: Path, tmp_path: Path):
    file = tmp_path / "card.yaml"
    file.write_text(
        "license: apache-2.0\nlanguage: [en, fr]\npipeline_tag: translation\nbase_model: me/base\ndatasets: [wmt14]\n"
        "description: My words.\nlimitations: Mine, too.\npower_watts: 50\ntags: [mine]\nexample: four five\n"
        "metadata: {thumbnail: x.png}\n"
    )
    card = validated(card_of(trained, tmp_path / "b", card_data=model_card.read_card_data(file)))
    data = card.data.to_dict()
    assert data["license"] == "apache-2.0" and data["language"] == ["en", "fr"] and data["thumbnail"] == "x.png"
    assert data["pipeline_tag"] == "translation" and data["base_model"] == "me/base" and "mine" in data["tags"]
    assert "My words." in card.text and "Mine, too." in card.text and '"four five"' in card.text
    for known in ("An encoder-decoder Transformer (UrformForConditionalGeneration)", "1 + 1 layers", "16 wide"):
        assert known in card.text  # words are added to what is known
    assert "0.2 kWh" in card.text and "stated by the author" in card.text
    assert all(r.dataset_name == "wmt14" for r in card.data.eval_results)
    for text, message in (
        ("licence: mit", "licence unknown"),
        ("- a", "must be a mapping"),
        ("a: [", "cannot be read"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            model_card.read_card_data(file)


def test_what_is_not_known_is_not_said(trained: Path, tmp_path: Path):
    plain = tmp_path / "plain"
    plain.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(trained / name, plain / name)
    card = validated(card_of(plain, tmp_path / "b"))
    for word in ("kWh", "floating-point", "png", "## Results", "## Training", "tokenizer", "license:"):
        assert word not in str(card), word
    assert "No results are recorded" in card.text and "torch.tensor([[5, 6, 7]])" in card.text


def test_a_persons_card_is_kept(trained: Path, tmp_path: Path):
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    (run / "README.md").write_text("---\nlicense: mit\ntags:\n- poem\n---\n\n# My own words\n")
    card = validated(card_of(run, tmp_path / "b", card_data={"language": "fr"}))
    assert card.text.strip() == "# My own words"
    data = card.data.to_dict()
    assert data["license"] == "mit" and data["tags"] == ["poem"]
    assert data["language"] == "fr" and data["library_name"] == "transformers" and "model-index" in data
    for made in ("[More Information Needed]", model_card.MARK):
        (run / "README.md").write_text(f"# Made by a program\n{made}\n")
        shutil.rmtree(tmp_path / "b")
        assert "Made by a program" not in card_of(run, tmp_path / "b").text


def test_without_matplotlib_there_are_no_pictures(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for module in (card_pictures, model_card):
        monkeypatch.setattr(module, "can_draw", lambda: False)
    with pytest.warns(
        UserWarning, match=r"without the learning curve and the attention alignment.*pip install"
    ) as said:
        card = card_of(trained, tmp_path / "b", card_data={"example": "1 2"})
    assert len(said) == 1
    assert "png" not in str(card) and not list((tmp_path / "b").glob("*.png"))
    with warnings.catch_warnings():  # no picture could be drawn of it
        warnings.simplefilter("error")
        plain = tmp_path / "plain"
        plain.mkdir()
        for name in ("config.json", "model.safetensors"):
            shutil.copyfile(trained / name, plain / name)
        card_of(plain, tmp_path / "c")


@pytest.mark.parametrize("field", ["description", "training_data", "limitations"])
def test_texts_are_added_to_what_is_known(trained: Path, tmp_path: Path, field: str):
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    model = urform.UrformForConditionalGeneration(
        urform.UrformConfig(architecture="encoder-decoder", position_encoding="learned", **TINY)
    )
    model.save_pretrained(run)
    text = card_of(run, tmp_path / "b", card_data={field: "My own words."}).text
    assert text.count("My own words.") == 1
    count = sum(p.numel() for p in model.parameters())
    for known in (
        f"{count:,} parameters",
        "positions: learned",
        "Data: multi30k",
        f"Inputs are limited to {model.config.max_position_embeddings} tokens",
    ):
        assert known in text, known


def test_installation_is_told_as_it_is_today(trained: Path, tmp_path: Path):
    """No package index has urform: nothing may tell anybody to install it from there."""
    for code in (True, False):
        card = card_of(trained, tmp_path / f"{code}", code=code).text
        assert HOW_TO_INSTALL in card and not re.search(r"pip install (-U )?'?urform", card)
    root = Path(urform.__file__).parent
    texts = [*root.glob("*.py"), *root.glob("*.md"), *(p for f in ("docs", "examples", "benchmarks", "configuration",
             "conversion", "diagnostics", "modeling", "publishing", "tokenization")
             for p in (root / f).rglob("*") if p.suffix in (".py", ".md", ".yaml"))]  # fmt: skip
    wrong = [path for path in texts if re.search(r"pip install (-U )?['\"]?urform\b", path.read_text(encoding="utf-8"))]
    assert not wrong


def test_pictures(trained: Path, tmp_path: Path):
    pytest.importorskip("matplotlib", reason="the pictures of model cards need matplotlib")
    card = card_of(trained, tmp_path / "b", card_data={"example": "1 2"})
    for name in (card_pictures.CURVE_NAME, card_pictures.ALIGNMENT_NAME):
        assert (tmp_path / "b" / name).read_bytes().startswith(b"\x89PNG") and f"({name})" in card.text


def test_alignment_is_what_the_model_attends_to(trained: Path):
    """The picture's rows against the library's own eager attention, step by step of greedy decoding."""
    weights_TS, written, source = card_pictures.alignment(trained, "1 2 3")
    assert weights_TS.shape == (len(written), len(source))
    torch.testing.assert_close(weights_TS.sum(-1), torch.ones(len(written)))
    model = urform.UrformForConditionalGeneration.from_pretrained(trained, attn_implementation="eager").eval()
    tokenizer = urform.UrformTokenizer.from_pretrained(trained)
    inputs = tokenizer("1 2 3", return_tensors="pt")
    options = {"max_new_tokens": 5, "do_sample": False, "output_attentions": True, "return_dict_in_generate": True}
    results = [m.generate(**inputs, **options) for m in (model, exact(model))]
    looked = [[x[-1][0, :, -1].mean(0) for x in out.cross_attentions[: len(written)]] for out in results]
    assert_within(list(weights_TS), *looked)
    generated = results[0]
    assert tokenizer.convert_ids_to_tokens(generated.sequences[0, 1:].tolist()) == written[:5]


def test_labels_of_the_alignment_can_be_seen(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A token that is a space has a label."""
    matplotlib = pytest.importorskip("matplotlib.figure", reason="the pictures of model cards need matplotlib")
    figures: list[Any] = []
    drawn = (torch.ones(2, 2), ["▁", "▁da"], [" ", "a"])
    monkeypatch.setattr(card_pictures, "alignment", lambda *arguments: drawn)
    monkeypatch.setattr(
        card_pictures, "_figure", lambda w, h: figures.append(matplotlib.Figure(figsize=(w, h))) or figures[0]
    )
    assert card_pictures.draw_alignment(trained, "a", tmp_path / "a.png")
    (axes,) = figures[0].axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["␣", "a"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["␣", "␣da"]


@pytest.mark.parametrize("max_steps, tokens", [(-1, None), (400, None), (400, 8192)])
def test_card_lists_the_arguments_in_force(trained: Path, tmp_path: Path, max_steps: int, tokens: int | None):
    """max_steps overrides epochs, a budget of tokens the batch size."""
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    arguments = {"max_steps": max_steps, "num_train_epochs": 3, "per_device_train_batch_size": 8}
    (run / "training_args.json").write_text(json.dumps({"arguments": arguments}))
    (run / "recipe.yaml").write_text(json.dumps({"data": {"tokens_per_batch": tokens}}))
    text = card_of(run, tmp_path / "b").text
    assert ("| num_train_epochs | `3` |" in text) == (max_steps < 0) == ("| max_steps" not in text)
    assert ("| per_device_train_batch_size | `8` |" in text) == (tokens is None) == ("tokens_per_batch" not in text)


@pytest.mark.parametrize(("languages", "task"), [(["de", "en"], "translation"), ("de", "text-generation")])
def test_a_model_of_several_languages_translates(trained: Path, tmp_path: Path, languages: Any, task: str):
    card = card_of(trained, tmp_path / "b", card_data={"language": languages})
    assert card.data.pipeline_tag == task


@pytest.mark.skipif(not Path("/proc/cpuinfo").is_file(), reason="only Linux tells the name of its processor")
def test_the_device_is_the_processors_name(monkeypatch: pytest.MonkeyPatch):
    told = "processor\t: 0\nmodel name\t: A Processor @ 2 GHz \n"
    monkeypatch.setattr(Path, "read_text", lambda *arguments, **options: told)
    arguments = TrainingArguments("x", use_cpu=True)
    assert training_record.record_of(TrainerState(), arguments).device == "A Processor @ 2 GHz"
    monkeypatch.setattr(Path, "read_text", lambda *arguments, **options: "processor\t: 0\n")  # ARM
    assert training_record.record_of(TrainerState(), arguments).device in (platform.processor(), platform.machine())


def test_curve_is_what_was_logged():
    record = training_record.TrainingRecord(history=STATE["log_history"])
    assert record.curve == {
        "training": [(100, 3.0), (200, 2.0), (300, 1.5)], "evaluation": [(100, 2.5), (300, 1.25)]
    }  # fmt: skip


SERVED = [(auto, name, a) for auto, (name, served) in HEADS.items() for a in served]


@pytest.mark.parametrize(("auto", "name", "architecture"), SERVED)
def test_snippets_of_every_head_run(auto: str, name: str, architecture: str, tmp_path: Path, capsys, monkeypatch):
    """With the plugin, from a folder; `verify_bundle` runs them by name and without it."""
    monkeypatch.chdir(tmp_path)
    model = getattr(urform, name)(urform.UrformConfig(architecture=architecture, **TINY))
    model.save_pretrained("me/it")
    tokenizer = urform.UrformTokenizer.train(["1 2 3 four five"] * 5, vocab_size=300)
    tokenizer.save_pretrained("me/it")
    config = json.loads(Path("me/it/config.json").read_text())
    for given in (tokenizer, None):
        shown = snippets(config, "me/it", given, 'a "quoted" {text}\n')
        assert [s.needs_urform for s in shown] == [False, True, False]
        for snippet in shown:
            assert ("import urform\n" in snippet.code) == snippet.needs_urform
            exec(compile(snippet.code, snippet.title, "exec"), {})
            assert capsys.readouterr().out  # untrained, it may be an empty line


@pytest.mark.slow
def test_verification_runs_the_snippets_of_the_card(trained: Path, tmp_path: Path):
    """A snippet that fails where Urform is not stops publication; a person's card is not run."""
    bundle = hub_upload.write_bundle(trained, tmp_path / "b", "me/it")
    codes = list(card_snippets(bundle))
    assert len(codes) == 3 and sum("import urform" in code for code in codes) == 1
    card = bundle / "README.md"
    broken = card.read_text().replace(
        "from transformers import AutoModelForText", "import surely_missing\nfrom transformers import AutoModelForText"
    )
    card.write_text(broken)
    with pytest.raises(ValueError, match=r"without urform:(.|\n)*this snippet of the model card(.|\n)*surely_missing"):
        verify_bundle(bundle, "me/it")
    card.write_text(broken.replace(model_card.MARK, ""))
    assert list(card_snippets(bundle)) == []
