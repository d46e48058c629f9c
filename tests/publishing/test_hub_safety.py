"""Folders that somebody else wrote: links, pickles named by an index, secrets, JSON of the wrong shape."""

import base64
import json
import os
import random
import shutil
import string
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from packaging.version import Version

import urform
from urform import hub_upload
from urform.configuration.checkpoint_files import refuse_links
from urform.conversion.checkpoints import convert_checkpoint
from urform.publishing.checkpoint_checks import check_checkpoint
from urform.publishing.secret_patterns import find_secret
from urform.publishing.training_record import read_record

TINY = {"vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "ck"
    urform.UrformForCausalLM(urform.UrformConfig(architecture="decoder", **TINY)).save_pretrained(folder)
    urform.UrformTokenizer.train(["1 2 3 four five"] * 5, vocab_size=300).save_pretrained(folder)
    return folder


@pytest.fixture
def checkpoint(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "ck"))


# -------------------------------------------------------------------------------------------------------------- links

CANARY = "what nobody may see"


def replace_by_link(path: Path, target: Path | str) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(target)


def outside(folder: Path) -> Path:
    """A file beside the folder that must not be published."""
    file = folder.parent / "private.txt"
    file.write_text(json.dumps({"note": CANARY}))
    return file


def chain(folder: Path) -> None:
    (folder / "one.json").symlink_to("two.json")
    (folder / "two.json").symlink_to(outside(folder))
    replace_by_link(folder / "generation_config.json", "one.json")


def templates_elsewhere(folder: Path) -> None:
    elsewhere = folder.parent / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "a.jinja").write_text(CANARY)
    (folder / "additional_chat_templates").symlink_to(elsewhere, target_is_directory=True)


def link_in_a_linked_folder(folder: Path) -> None:
    (folder / "templates").mkdir()
    (folder / "templates" / "a.jinja").symlink_to(outside(folder))
    (folder / "additional_chat_templates").symlink_to("templates", target_is_directory=True)


def state_of_another_run(folder: Path) -> None:
    (folder / "checkpoint-7").mkdir()
    (folder / "checkpoint-7" / "trainer_state.json").symlink_to(outside(folder))


LINKS: dict[str, Callable[[Path], object]] = {
    **{
        name: (lambda folder, name=name: replace_by_link(folder / name, outside(folder)))
        for name in ("README.md", "chat_template.jinja", "generation_config.json", "config.json", "tokenizer.json",
                     "recipe.yaml", "results.json", "trainer_state.json", "training_args.json", "model.safetensors")
    },
    "relative": lambda folder: replace_by_link(folder / "README.md", f"../{outside(folder).name}"),
    "through the folder's own name": lambda folder: replace_by_link(
        folder / "README.md", f"../{folder.name}/../{outside(folder).name}"),
    "to nothing": lambda folder: replace_by_link(folder / "README.md", "../is not there"),
    "a chain": chain,
    "a folder": templates_elsewhere,
    "the parent": lambda folder: (folder / "additional_chat_templates").symlink_to("..", target_is_directory=True),
    "in a folder": lambda folder: (
        (folder / "additional_chat_templates").mkdir(),
        (folder / "additional_chat_templates" / "a.jinja").symlink_to(outside(folder)),
    ),
    "in a linked folder": link_in_a_linked_folder,
    "in a checkpoint of the run": state_of_another_run,
}  # fmt: skip


@pytest.mark.parametrize("case", LINKS)
def test_links_out_of_the_folder_are_refused(checkpoint: Path, tmp_path: Path, case: str):
    LINKS[case](checkpoint)
    with pytest.raises(ValueError, match="is a link that leads out of the folder") as error:
        hub_upload.write_bundle(checkpoint, tmp_path / "b", "me/it")
    assert CANARY not in str(error.value) and not (tmp_path / "b").exists()


def test_every_reader_refuses_links(checkpoint: Path, tmp_path: Path):
    from urform.publishing.model_card import complete_card, make_card, update_card
    from urform.publishing.training_record import TrainingRecord
    from urform.publishing.verification import verify_bundle

    bundle = hub_upload.write_bundle(checkpoint, tmp_path / "b", "me/it")
    replace_by_link(bundle / "README.md", outside(bundle))
    (bundle / "results.json").symlink_to(outside(bundle))
    readers = {
        "check": lambda: check_checkpoint(bundle),
        "record": lambda: read_record(bundle),
        "card": lambda: make_card(bundle, "me/it", TrainingRecord()),
        "own card": lambda: update_card(bundle, "me/it", TrainingRecord()),
        "push's card": lambda: complete_card(bundle, "me/it"),
        "verification": lambda: verify_bundle(bundle, "me/it"),
        "upload": lambda: hub_upload.upload_bundle(bundle, "me/it"),
        "publish": lambda: hub_upload.publish(bundle, dry_run=True),
    }
    for name, read in readers.items():
        with pytest.raises(ValueError, match="is a link that leads out of the folder"):
            read()
            pytest.fail(name)
    for path in (bundle / "README.md", bundle / "results.json"):
        path.unlink()
    (bundle / "deep" / "er").mkdir(parents=True)
    (bundle / "deep" / "er" / "x").symlink_to(outside(bundle))
    with pytest.raises(ValueError, match=r"deep/er/x is a link"):  # everything in the folder is uploaded
        hub_upload.upload_bundle(bundle, "me/it")


def test_links_inside_and_to_the_folder_are_followed(checkpoint: Path, tmp_path: Path):
    (checkpoint / "mine.md").write_text("# Mine\n")
    (checkpoint / "README.md").symlink_to("mine.md")
    (checkpoint / "templates").mkdir()
    (checkpoint / "templates" / "a.jinja").write_text("{{ messages }}")
    (checkpoint / "additional_chat_templates").symlink_to(checkpoint / "templates", target_is_directory=True)
    (tmp_path / "latest").symlink_to(checkpoint, target_is_directory=True)
    (tmp_path / "newest").symlink_to("latest", target_is_directory=True)
    bundle = hub_upload.write_bundle(tmp_path / "newest", tmp_path / "b", "me/it")
    assert "# Mine" in (bundle / "README.md").read_text()
    assert not any(path.is_symlink() for path in bundle.rglob("*"))
    assert (bundle / "additional_chat_templates" / "a.jinja").read_text() == "{{ messages }}"


def test_a_downloaded_snapshot_is_a_checkpoint(world: SimpleNamespace):
    """huggingface_hub lays a download out as links into `blobs`; by the real client, from the Hub on loopback."""
    world.push("""
from huggingface_hub import snapshot_download
from pathlib import Path
from urform.hub_upload import upload_bundle, write_bundle
make().save_pretrained("ck"); tokenizer().save_pretrained("ck")
Path("ck/chat_template.jinja").write_text("{{ messages }}")
upload_bundle(write_bundle("ck", "first", "me/links"), "me/links")
snapshot = Path(snapshot_download("me/links"))
assert (snapshot / "chat_template.jinja").is_symlink() and (snapshot / "model.safetensors").is_symlink(), "no links"
second = write_bundle(snapshot, "second", "me/links")
assert not any(path.is_symlink() for path in second.iterdir())
for path in Path("first").iterdir():
    assert path.read_bytes() == (second / path.name).read_bytes(), path
secret = Path("secret"); secret.write_text("x")
(snapshot / "added_tokens.json").symlink_to(secret.resolve())
try:
    write_bundle(snapshot, "third", "me/links")
except ValueError as error:
    assert "added_tokens.json is a link" in str(error), error
else:
    raise SystemExit("published")
""").ok()


def test_blobs_that_are_links_themselves_are_refused(checkpoint: Path, tmp_path: Path):
    snapshot = tmp_path / "models--me--it" / "snapshots" / "0123"
    shutil.copytree(checkpoint, snapshot)
    secret = outside(tmp_path / "x")
    (tmp_path / "models--me--it" / "blobs").mkdir()
    (tmp_path / "models--me--it" / "blobs" / "77").symlink_to(secret)
    (snapshot / "README.md").symlink_to("../../blobs/77")
    with pytest.raises(ValueError, match="leads out of the folder"):
        refuse_links(snapshot)
    shutil.rmtree(tmp_path / "models--me--it" / "blobs")
    (tmp_path / "models--me--it" / "blobs").symlink_to(secret.parent, target_is_directory=True)
    replace_by_link(snapshot / "README.md", f"../../blobs/{secret.name}")
    with pytest.raises(ValueError, match="leads out of the folder"):
        refuse_links(snapshot)


def test_conversion_carries_no_linked_file(checkpoint: Path, tmp_path: Path):
    model = urform.UrformForCausalLM(urform.UrformConfig.from_preset("llama-2-7b", **TINY))
    model.save_pretrained(checkpoint)
    convert_checkpoint(checkpoint, tmp_path / "good", "llama")
    (checkpoint / "LICENSE").symlink_to(outside(checkpoint))
    with pytest.raises(ValueError, match="LICENSE is a link that leads out of the folder"):
        convert_checkpoint(checkpoint, tmp_path / "bad", "llama")
    assert not (tmp_path / "bad").exists()


# ------------------------------------------------------------------------------------------------------------ pickles


class Bomb:
    """Leaves a file behind when it is unpickled without `weights_only`."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.mark),)


def index_of_pickles(folder: Path, name: str = "weights.bin", dtype: bool = True) -> None:
    """Turn a checkpoint into one whose safetensors index names a pickle."""
    state = urform.UrformForCausalLM.from_pretrained(folder).state_dict()
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / name)
    index = {"metadata": {}, "weight_map": dict.fromkeys(state, name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = json.loads((folder / "config.json").read_text())
    if not dtype:  # then transformers opens the first file already to look for it
        config.pop("dtype")
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("dtype", [True, False])
def test_an_index_that_names_a_pickle_is_refused(
    checkpoint: Path, tmp_path: Path, dtype: bool, monkeypatch: pytest.MonkeyPatch
):
    index_of_pickles(checkpoint, dtype=dtype)
    readings: list[object] = []
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: readings.append(args))
    loaders: dict[str, Callable[[], object]] = {
        "class": lambda: urform.UrformForCausalLM.from_pretrained(checkpoint),
        "auto": lambda: transformers.AutoModel.from_pretrained(str(checkpoint), dtype="auto"),
        "subfolder": lambda: urform.UrformModel.from_pretrained(checkpoint.parent, subfolder=checkpoint.name),
        "convert": lambda: convert_checkpoint(checkpoint, tmp_path / "c"),
        "from_transformers": lambda: urform.from_transformers(checkpoint),
        "check": lambda: check_checkpoint(checkpoint),
        "bundle": lambda: hub_upload.write_bundle(checkpoint, tmp_path / "b", "me/it"),
    }
    if dtype:
        from urform.training.averaging import average_checkpoints

        loaders["average"] = lambda: average_checkpoints([checkpoint, checkpoint], tmp_path / "a")
    for name, load in loaders.items():
        with pytest.raises(ValueError, match=r"safetensors|holds pickled files"):
            load()
            pytest.fail(name)
    assert not readings


def test_a_variant_whose_index_names_a_pickle_is_refused(checkpoint: Path):
    index_of_pickles(checkpoint)
    (checkpoint / "model.safetensors.index.json").rename(checkpoint / "model.safetensors.index.fp16.json")
    with pytest.raises(ValueError, match=r"index\.fp16\.json names 'weights\.bin'"):
        urform.UrformForCausalLM.from_pretrained(checkpoint, variant="fp16")


def test_a_pickle_that_the_config_names_is_refused(checkpoint: Path):
    """`transformers_weights` in a config.json names the file to load; one pickle's name is let through there."""
    index_of_pickles(checkpoint, "adapter_model.bin")
    (checkpoint / "model.safetensors.index.json").unlink()
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "transformers_weights": "adapter_model.bin"}))
    with pytest.raises(ValueError, match=r"adapter_model\.bin is no safetensors file"):
        urform.UrformForCausalLM.from_pretrained(checkpoint)


def test_a_pickled_adapter_is_refused(checkpoint: Path, tmp_path: Path):
    peft = pytest.importorskip("peft")
    from transformers.integrations.peft import MIN_PEFT_VERSION

    if Version(peft.__version__) < Version(MIN_PEFT_VERSION):
        pytest.skip(f"transformers {transformers.__version__} takes no adapters of peft before {MIN_PEFT_VERSION}")
    model = urform.UrformForCausalLM.from_pretrained(checkpoint)
    model.add_adapter(peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "adapter")
    urform.UrformForCausalLM.from_pretrained(checkpoint).load_adapter(str(tmp_path / "adapter"))
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    torch.save({"x": Bomb(tmp_path / "mark")}, tmp_path / "adapter" / "adapter_model.bin")
    with pytest.raises((ValueError, OSError), match=r"adapter_model\."):
        urform.UrformForCausalLM.from_pretrained(checkpoint).load_adapter(str(tmp_path / "adapter"))
    assert not (tmp_path / "mark").exists()


def test_an_index_on_the_hub_that_names_a_pickle_is_refused(world: SimpleNamespace):
    world.push("""
from pathlib import Path
from huggingface_hub import HfApi
import urform
model = make(); model.save_pretrained("ck"); Path("ck/model.safetensors").unlink()
torch.save(model.state_dict(), "ck/weights.bin")
index = {"metadata": {}, "weight_map": dict.fromkeys(model.state_dict(), "weights.bin")}
Path("ck/model.safetensors.index.json").write_text(json.dumps(index))
HfApi().create_repo("me/pickled"); HfApi().upload_folder(repo_id="me/pickled", folder_path="ck")
for load in (urform.UrformForCausalLM.from_pretrained, transformers.AutoModelForCausalLM.from_pretrained,
             urform.from_transformers):
    try:
        load("me/pickled")
    except ValueError as error:
        assert "names 'weights.bin'" in str(error), error
    else:
        raise SystemExit(f"{load} has loaded it")
""").ok()


# ------------------------------------------------------------------------------------------------------------ secrets


def shaped(prefix: str, length: int, alphabet: str = string.ascii_letters + string.digits) -> str:
    """A random string of an issuer's shape, put together here: no scanner may find one in this file."""
    return prefix + "".join(random.Random(prefix).choices(alphabet, k=length - 1)) + "7"


HEX = "0123456789abcdef"
SECRETS = {
    "Hugging Face": shaped("hf" + "_", 34),
    "Google API": shaped("AI" + "za", 35),
    "Google OAuth client": shaped("GOC" + "SPX-", 28),
    "OpenAI project": shaped("sk-" + "proj-", 120),
    "OpenAI": shaped("sk" + "-", 48),
    "Anthropic": shaped("sk-" + "ant-api03-", 95),
    "OpenRouter": shaped("sk-" + "or-v1-", 64, HEX),
    "GitHub classic": shaped("gh" + "p_", 36),
    "GitHub fine-grained": shaped("github" + "_pat_", 82),
    "GitLab": shaped("gl" + "pat-", 20),
    "Slack bot": shaped("xo" + "xb-123456789012-", 24),
    "AWS": shaped("AK" + "IA", 16, "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567"),
    "AWS secret": "aws_secret_access_key" + " = " + shaped("", 40),
    "Stripe": shaped("sk_" + "live_", 24),
    "Stripe restricted": shaped("rk_" + "test_", 24),
    "package index": shaped("pypi" + "-AgE", 160),
    "npm": shaped("npm" + "_", 36),
    "W&B": '"wandb_api_key": "' + shaped("", 40, HEX) + '"',
    "private key": "-----BEGIN " + "PRIVATE KEY-----",
    "OpenSSH": "-----BEGIN " + "OPENSSH PRIVATE KEY-----",
    "PGP": "-----BEGIN " + "PGP PRIVATE KEY BLOCK-----",
    "address": "postgres://me:hunter2" + "@host/db",
    "JWT": "ey" + "JhbGciOiJIUzI1NiJ9." + "ey" + "JzdWIiOiIxMjM0NTY3ODkwIn0." + shaped("", 43),
}  # fmt: skip


@pytest.mark.parametrize("issuer", SECRETS)
def test_secrets_are_found(issuer: str, saved: Path, tmp_path: Path):
    secret = SECRETS[issuer]
    for text in (secret, f"key={secret}", f'{{"note":"{secret}"}}', f"see https://host/x?key={secret}&y=1"):
        assert find_secret(text), text
    assert find_secret(f"one\ntwo {secret}\n")[1] == 2


def test_a_google_key_in_a_card_is_not_published(checkpoint: Path, tmp_path: Path):
    (checkpoint / "README.md").write_text(f"# Mine\n\nuse {SECRETS['Google API']}\n")
    with pytest.raises(ValueError, match=r"README\.md:3: what looks like a Google key") as error:
        hub_upload.write_bundle(checkpoint, tmp_path / "b", "me/it")
    assert SECRETS["Google API"] not in str(error.value)


def test_hashes_base64_and_vocabularies_are_no_secrets(tmp_path: Path):
    chance = random.Random(0)
    lines = [chance.randbytes(32).hex() for _ in range(2000)]
    lines += ["sha256-" + base64.b64encode(chance.randbytes(48)).decode() for _ in range(2000)]
    lines += [base64.b64encode(chance.randbytes(400_000)).decode()]  # SentencePiece's table in a tokenizer.json
    lines += ["sk-SK", "/sk-co-je-nove-v-tejto-verzii-a-preco-je-to-dobre", "an api_key = os.environ['OPENAI_API_KEY']",
              '"mask_token": "<mask>"', '{"http://":57,"@":58,"a":59}', "AIza", "hf_hub_download", "sk_learn_pipeline",
              "api_key=YOUR_KEY_GOES_IN_HERE_PLEASE", "arn:aws:s3:::bucket", "git@github.com:me/it.git"]  # fmt: skip
    for line in lines:
        assert find_secret(line) is None, line[:100]
    assert find_secret("\n".join(lines)) is None
    texts = [path.read_text() for path in sorted(Path(urform.__file__).parent.glob("*/*.py"))]
    for model in ("bpe", "unigram", "byte-bpe"):
        tokenizer = urform.UrformTokenizer.train(texts[:20], vocab_size=2000, model=model)
        tokenizer.save_pretrained(tmp_path / model)
        assert find_secret((tmp_path / model / "tokenizer.json").read_text()) is None, model


# ----------------------------------------------------------------------------------------------- JSON of another shape

DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize(
    "value", [{"a": 1}, "UrformForCausalLM", 7, [], [7], [["UrformForCausalLM"]], [None], {}, None]
)
def test_architectures_that_are_no_list_of_names(checkpoint: Path, value: object):
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "architectures": value}))
    with pytest.raises(ValueError, match=r"config\.json has architectures=.*must be a list"):
        check_checkpoint(checkpoint)


@pytest.mark.parametrize(
    "name",
    ["config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json", "trainer_state.json",
     "training_args.json", "results.json", "recipe.yaml", "model.safetensors.index.json"],
)  # fmt: skip
@pytest.mark.parametrize("content", [DEEP, '{"a": ' + DEEP + "}", "[1]", "7", "{", '{"weight_map": 7}'])
def test_files_of_another_shape_are_value_errors(checkpoint: Path, tmp_path: Path, name: str, content: str):
    """Or their odd field is one that nothing reads."""
    (checkpoint / name).write_text(content)
    try:
        hub_upload.write_bundle(checkpoint, tmp_path / "b", "me/it", code=False)
    except ValueError as error:
        assert str(checkpoint) in str(error)
    else:
        assert isinstance(json.loads(content), dict)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("generation_config.json", {"eos_token_id": "two"}, r"eos_token_id='two' is no token id"),
        (
            "trainer_state.json",
            {"log_history": 7},
            r"trainer_state\.json: log_history is '7' and should be of type list",
        ),
        ("trainer_state.json", {"log_history": [{"step": "x", "loss": 1.0}]}, "log: step is 'x'"),
        ("training_args.json", {"arguments": ["x"]}, "arguments is"),
        ("results.json", {"test": [1]}, "test is"),
        ("recipe.yaml", {"data": {"source_language": ["en"]}}, r"data\.source_language is"),
        ("recipe.yaml", ["x"], "should be a table of fields"),
    ],
)
def test_fields_of_another_kind_are_named(checkpoint: Path, tmp_path: Path, name: str, content: object, message: str):
    (checkpoint / name).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        hub_upload.write_bundle(checkpoint, tmp_path / "b", "me/it", code=False)
