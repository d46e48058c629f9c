"""Checkpoints converted from disk and from a Hub: files, names, memory, tokenizers, what is refused."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from conversion_cases import random_stock, same_state
from drawn_configs import draw
from hub_client import Client
from hub_server import Hub
from numerics import assert_within, twice
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers.initialization import no_init_weights

import urform
from urform.conversion.checkpoints import convert_checkpoint
from urform.conversion.families import FAMILIES

_PAIR = {
    "vocab_size": 37,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 20,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
_OTHERS: dict[str, dict[str, Any]] = {
    "BartForConditionalGeneration": _PAIR,
    "MarianMTModel": _PAIR,
    "T5ForConditionalGeneration": {
        "vocab_size": 37,
        "d_model": 16,
        "d_kv": 4,
        "d_ff": 24,
        "num_heads": 4,
        "decoder_start_token_id": 0,
        "num_layers": 2,
    },
    "BertForMaskedLM": {
        "vocab_size": 37,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": 20,
    },
}
CLASSES = [
    "GPTNeoXForCausalLM",
    "GPT2LMHeadModel",
    "Gemma2ForCausalLM",
    "LlamaForSequenceClassification",
    "Qwen3Model",
    *_OTHERS,
]
TEXT = ["The cat sat on the mat.", "A dog, 12 cats and 7 mice; naïve façade!", "for x in range(10): print(x)"] * 20
LLAMA = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
}


def model_of(name: str, seed: int = 3) -> Any:
    if name in _OTHERS:
        return random_stock(name, seed, **_OTHERS[name])
    family = next(f.model_type for f in FAMILIES.values() if any(h.stock == name for h in f.heads))
    return random_stock(name, seed, **draw(family, seed))


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("size", ["6KB", "5GB"])
def test_a_folder_there_and_back(name: str, size: str, tmp_path: Path) -> None:
    """In one file or many, the same as in memory; what comes back is the stock class's own checkpoint."""
    stock = model_of(name).to(torch.bfloat16)
    stock.save_pretrained(tmp_path / "stock", max_shard_size=size)
    made = convert_checkpoint(tmp_path / "stock", tmp_path / "deep" / "ours")
    want = urform.from_transformers(stock)
    ours = type(want).from_pretrained(made)
    same_state(ours, want)
    same_state(urform.from_transformers(tmp_path / "stock"), want)
    assert (len(list(made.glob("*.safetensors"))) > 1) == (size == "6KB")
    convert_checkpoint(made, tmp_path / "back")
    back, first = stored(tmp_path / "back"), stored(tmp_path / "stock")
    assert back.keys() == first.keys()
    assert all(torch.equal(back[key], first[key]) and back[key].dtype == first[key].dtype for key in first)
    configs = [json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("stock", "back")]
    assert configs[0] == configs[1]
    same_state(type(stock).from_pretrained(tmp_path / "back"), stock)


def test_files_are_safetensors_to_the_byte(tmp_path: Path) -> None:
    """What is written can be read by the library: aligned, nothing after the last tensor, readable for others."""
    stock = model_of("LlamaForCausalLM")
    stock.save_pretrained(tmp_path / "stock")
    made = convert_checkpoint(tmp_path / "stock", tmp_path / "ours") / "model.safetensors"
    size = int.from_bytes(made.read_bytes()[:8], "little")
    header = json.loads(made.read_bytes()[8 : 8 + size])
    assert size % 8 == 0 and header.pop("__metadata__") == {"format": "pt"}
    assert made.stat().st_mode == made.with_name("config.json").stat().st_mode
    assert made.stat().st_size == 8 + size + max(entry["data_offsets"][1] for entry in header.values())
    with safe_open(made, "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_index_and_sizes_of_the_parts(tmp_path: Path) -> None:
    model_of("GPT2LMHeadModel").save_pretrained(tmp_path / "stock", max_shard_size="20KB")
    made = convert_checkpoint(tmp_path / "stock", tmp_path / "ours")
    index = json.loads((made / "model.safetensors.index.json").read_text())
    largest = max(path.stat().st_size for path in (tmp_path / "stock").glob("*.safetensors"))
    tensors = stored(made)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    assert index["weight_map"].keys() == tensors.keys()
    for path in made.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            assert all(index["weight_map"][key] == path.name for key in file.keys())
        assert path.stat().st_size <= largest + 4096 or len(load_file(path)) == 1


def test_memory_stays_below_two_shards(tmp_path: Path) -> None:
    """The peak of a fresh process above what it has after importing, both ways.

    GPT-NeoX has fused tensors, which are dealt out. GPT-2's matrices are transposed, so that each one is copied.
    """
    sizes = {"hidden_size": 768, "num_hidden_layers": 6, "num_attention_heads": 12, "vocab_size": 12000}
    configs = {"0": hf.GPTNeoXConfig(**sizes, intermediate_size=3072), "3": hf.GPT2Config(**sizes)}
    for folder, config in configs.items():
        config.update({"dtype": "bfloat16", "bos_token_id": 0, "eos_token_id": 0})
        with no_init_weights():
            model = hf.AutoModelForCausalLM.from_config(config)
        model.to(torch.bfloat16).save_pretrained(tmp_path / folder, max_shard_size="45MB")
    code = """
import sys, torch, urform, transformers
from pathlib import Path
from urform.conversion.checkpoints import convert_checkpoint
from transformers import GPT2LMHeadModel, GPTNeoXForCausalLM
urform.UrformForCausalLM
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024
for source, target in (("0", "1"), ("1", "2"), ("3", "4"), ("4", "5")):
    open("/proc/self/clear_refs", "w").write("5")
    before = peak()
    convert_checkpoint(source, target)
    shards = [path.stat().st_size for path in Path(source).glob("*.safetensors")]
    print("took", peak() - before, max(shards), len(shards))
"""
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=120)
    lines = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("took")]
    assert len(lines) == 4
    for took, largest, count in lines:
        assert int(count) > 2 and int(took) < 2 * int(largest), lines


# ---------------------------------------------------------------------------------------------- what goes with weights


def byte_level() -> tuple[dict[str, int], list[Any]]:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    state = json.loads(tokenizer.to_str())["model"]
    return state["vocab"], [tuple(pair) for pair in state["merges"]]


def tokenizer_of(kind: str, folder: Path) -> None:
    """Real tokenizer files of a family, trained here."""
    if kind in ("gpt2", "gpt2 without a config"):
        vocab, merges = byte_level()
        hf.GPT2Tokenizer(vocab=vocab, merges=merges).save_pretrained(folder)
        if kind == "gpt2 without a config":  # as on the Hub: only config.json's model_type says which it is
            (folder / "tokenizer_config.json").unlink()
    elif kind == "llama":
        tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
        trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
        tokenizer.train_from_iterator(TEXT, trainer)
        state = json.loads(tokenizer.to_str())["model"]
        merges = [tuple(pair) for pair in state["merges"]]
        hf.LlamaTokenizer(vocab=state["vocab"], merges=merges).save_pretrained(folder)
    else:
        hf.PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(models.WordLevel({"<unk>": 0, "The": 1, "cat": 2}, unk_token="<unk>")),
            unk_token="<unk>",
            chat_template="{% for m in messages %}{{ m.content }}{% endfor %}",
        ).save_pretrained(folder)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("GPT2LMHeadModel", "gpt2"),
        ("GPT2LMHeadModel", "gpt2 without a config"),
        ("LlamaForCausalLM", "llama"),
        ("LlamaForCausalLM", "gpt2"),
        ("Qwen2ForCausalLM", "generic"),
    ],
)
def test_the_tokenizer_comes_along(name: str, kind: str, tmp_path: Path) -> None:
    model_of(name).save_pretrained(tmp_path / "stock")
    tokenizer_of(kind, tmp_path / "stock")
    (tmp_path / "stock" / "LICENSE").write_text("free")
    (tmp_path / "stock" / "modeling_other.py").write_text("raise SystemExit")
    first = hf.AutoTokenizer.from_pretrained(tmp_path / "stock")
    made = convert_checkpoint(tmp_path / "stock", tmp_path / "ours")
    back = convert_checkpoint(made, tmp_path / "back")
    for folder in (made, back):
        again = hf.AutoTokenizer.from_pretrained(folder)
        assert type(again) is type(first)
        for text in TEXT[:3]:
            assert again(text).input_ids == first(text).input_ids
            assert again.decode(again(text).input_ids) == first.decode(first(text).input_ids)
        assert again.special_tokens_map == first.special_tokens_map and again.chat_template == first.chat_template
        assert (folder / "LICENSE").read_text() == "free" and not list(folder.glob("*.py"))


def test_urforms_tokenizer_needs_no_urform_in_a_stock_checkpoint(tmp_path: Path) -> None:
    config = urform.UrformConfig(**{**model_config(), "source_family": "llama"})
    urform.UrformForCausalLM(config).save_pretrained(tmp_path / "ours")
    tokenizer = urform.UrformTokenizer.train(TEXT, vocab_size=300)
    tokenizer.save_pretrained(tmp_path / "ours")
    back = convert_checkpoint(tmp_path / "ours", tmp_path / "back")
    again = hf.AutoTokenizer.from_pretrained(back)
    assert type(again).__module__.startswith("transformers.")
    assert all(again(text).input_ids == tokenizer(text).input_ids for text in TEXT[:3])


def model_config() -> dict[str, Any]:
    return urform.from_transformers(random_stock("LlamaForCausalLM", 0, **LLAMA)).config.to_dict()


def test_the_generation_config_comes_along(tmp_path: Path) -> None:
    """From its file, or from the model's config where old checkpoints have it."""
    stock = model_of("GPT2LMHeadModel")
    stock.generation_config.max_new_tokens = 7
    stock.save_pretrained(tmp_path / "stock")
    made = convert_checkpoint(tmp_path / "stock", tmp_path / "ours")
    assert urform.UrformForCausalLM.from_pretrained(made).generation_config.max_new_tokens == 7
    assert urform.from_transformers(tmp_path / "stock").generation_config.max_new_tokens == 7
    (tmp_path / "stock" / "generation_config.json").unlink()
    config = json.loads((tmp_path / "stock" / "config.json").read_text())
    (tmp_path / "stock" / "config.json").write_text(json.dumps({**config, "num_beams": 3}))
    assert hf.GPT2LMHeadModel.from_pretrained(tmp_path / "stock").generation_config.num_beams == 3
    made = convert_checkpoint(tmp_path / "stock", tmp_path / "again")
    assert urform.UrformForCausalLM.from_pretrained(made).generation_config.num_beams == 3
    assert urform.from_transformers(tmp_path / "stock").generation_config.num_beams == 3


def test_dtype_of_a_model_from_a_folder(tmp_path: Path) -> None:
    model_of("LlamaForCausalLM").to(torch.bfloat16).save_pretrained(tmp_path)
    assert urform.from_transformers(tmp_path).dtype == torch.bfloat16
    wide = urform.from_transformers(str(tmp_path), dtype="float32")
    assert wide.dtype == torch.float32 and not wide.training
    assert {parameter.dtype for parameter in wide.parameters()} == {torch.float32}


# ------------------------------------------------------------------------------------------------ old names, left-overs


def rewrite(folder: Path, change: Any) -> None:
    state = load_file(folder / "model.safetensors")
    save_file(change(state), folder / "model.safetensors", metadata={"format": "pt"})


def test_a_backbones_names_serve_a_class_with_a_head(tmp_path: Path) -> None:
    """GPT-2's own checkpoint has no prefix, and buffers that nothing reads any more."""
    stock = random_stock("GPT2LMHeadModel", 0, n_embd=16, n_layer=2, n_head=2, vocab_size=37)
    stock.save_pretrained(tmp_path)

    def old(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        state = {name.removeprefix("transformer."): tensor for name, tensor in state.items()}
        return {**state, "h.0.attn.bias": torch.ones(1, 1, 4, 4)}

    rewrite(tmp_path, old)
    same_state(urform.from_transformers(tmp_path), urform.from_transformers(stock))


def test_berts_old_names(tmp_path: Path) -> None:
    stock = model_of("BertForMaskedLM")
    stock.save_pretrained(tmp_path)
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}

    def rename(name: str) -> str:
        for now, then in old.items():
            name = name.replace(now, then)
        return name

    rewrite(tmp_path, lambda state: {rename(name): tensor for name, tensor in state.items()})
    same_state(urform.from_transformers(tmp_path), urform.from_transformers(stock))


def test_a_tensor_without_a_place_is_kept_and_named(tmp_path: Path) -> None:
    model_of("LlamaForCausalLM").save_pretrained(tmp_path)
    rewrite(tmp_path, lambda state: {**state, "model.extra.weight": torch.ones(2)})
    ours = urform.from_transformers(tmp_path)
    assert ours.config.source_weights == {"model.extra.weight": ["float32", [2]]}
    with pytest.warns(UserWarning, match=r"model\.extra\.weight came along, but LlamaForCausalLM has no place"):
        urform.to_transformers(ours)


def test_a_tied_tensor_under_either_name(tmp_path: Path) -> None:
    stock = random_stock("LlamaForCausalLM", 0, **LLAMA, tie_word_embeddings=True)
    stock.save_pretrained(tmp_path)
    want = urform.from_transformers(stock)
    names = {"model.embed_tokens.weight": "lm_head.weight"}
    rewrite(tmp_path, lambda state: {names.get(name, name): tensor for name, tensor in state.items()})
    same_state(urform.from_transformers(tmp_path), want)
    assert urform.from_transformers(tmp_path).config.tie_word_embeddings


def test_an_output_layer_of_its_own_beside_a_config_that_ties(tmp_path: Path) -> None:
    """The stock class then unties, and so do we."""
    stock = random_stock("LlamaForCausalLM", 0, **LLAMA, tie_word_embeddings=True)
    stock.save_pretrained(tmp_path)
    rewrite(tmp_path, lambda state: {**state, "lm_head.weight": torch.randn(300, 32)})
    ours, there = urform.from_transformers(tmp_path), hf.LlamaForCausalLM.from_pretrained(tmp_path)
    ids = torch.arange(3, 12)[None]
    assert not ours.config.tie_word_embeddings
    assert_within(ours(ids).logits, *twice(there, lambda m: m(ids).logits))


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A checkpoint to spoil; afterwards nothing is left at the target or beside it."""
    random_stock("LlamaForCausalLM", 0, **LLAMA).save_pretrained(tmp_path / "stock", max_shard_size="40KB")
    yield tmp_path / "stock"
    assert [path.name for path in tmp_path.iterdir()] == ["stock"]


def edit(folder: Path, **changes: Any) -> None:
    config = {**json.loads((folder / "config.json").read_text()), **changes}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def refuse(folder: Path, match: str, *args: Any) -> None:
    with pytest.raises(ValueError, match=match):
        convert_checkpoint(folder, folder.parent / "target", *args)


def test_configs_that_stand_in_the_way(folder: Path) -> None:
    edit(folder, quantization_config={"quant_method": "awq"})
    refuse(folder, r"in the way stand: quantization_config=.*awq")
    edit(folder, quantization_config=None, auto_map={"AutoModelForCausalLM": "modeling_x.X"})
    refuse(folder, r"in the way stand: auto_map=.*modeling_x")
    edit(folder, auto_map=None, model_type="mixtral")
    refuse(folder, r"model_type='mixtral', no family.*there are: .*llama")
    edit(folder, model_type="llama", architectures=["LlamaForX"])
    refuse(folder, "LlamaForX has no counterpart in the family 'llama'")
    edit(folder, architectures=None)
    refuse(folder, "names no architectures; add the class")


def test_weights_that_are_not_there(folder: Path) -> None:
    shard = sorted(folder.glob("*.safetensors"))[1]
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    with pytest.raises(Exception, match=r"(?i)incomplete|header|metadata|invalid"):
        convert_checkpoint(folder, folder.parent / "target")
    shard.unlink()
    refuse(folder, f"has no {shard.name}")
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    refuse(folder, "has no model.safetensors; pytorch_model.bin would be unpickled: save them as safetensors")


def test_tensors_that_do_not_fit(folder: Path) -> None:
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    stock = random_stock("LlamaForCausalLM", 0, **LLAMA)
    stock.save_pretrained(folder)
    rewrite(folder, lambda state: {k: v for k, v in state.items() if "layers.1.mlp" not in k})
    refuse(folder, r"lacks model\.layers\.1\.mlp.*incomplete")
    stock.save_pretrained(folder)
    rewrite(folder, lambda s: {k: v[:-1].clone() if k == "model.norm.weight" else v for k, v in s.items()})
    refuse(folder, r"norm\.weight comes out as \[31\], the config says \[32\]")
    stock.save_pretrained(folder)
    rewrite(folder, lambda s: {k: v.to(torch.float8_e4m3fn) if "mlp" in k else v for k, v in s.items()})
    refuse(folder, "are stored as F8_E4M3; cast them")


def test_targets_and_sources(folder: Path) -> None:
    refuse(folder, "family='llama' is for a checkpoint of Urform", "llama")
    full = folder / "full"
    full.mkdir()
    (full / "file").touch()
    with pytest.raises(ValueError, match="exists and is not empty"):
        convert_checkpoint(folder, full)
    shutil.rmtree(full)
    with pytest.raises(ValueError, match="neither a folder nor an id on the Hub"):
        convert_checkpoint("no/such/folder", folder.parent / "target")
    (folder / "config.json").rename(folder / "adapter_config.json")
    refuse(folder, "has no config.json but an adapter: merge it")


def test_an_index_that_points_elsewhere(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    table = json.loads(index.read_text())
    table["weight_map"]["lm_head.weight"] = "../../secret.safetensors"
    index.write_text(json.dumps(table))
    refuse(folder, "a shard is a .safetensors file beside the index")


# ------------------------------------------------------------------------------------------------- Hub and command line


def test_from_the_hub_and_by_the_command(tmp_path: Path) -> None:
    """Files that are not needed (other formats, code) are not fetched; `--to` goes back."""
    with Hub() as hub:
        hub.tokens["hf_test"] = ("me", "write")
        client = Client(hub.endpoint, tmp_path / "home")
        script = f"""
import sys, torch, urform, transformers as hf
from pathlib import Path
from huggingface_hub import HfApi
from urform.cli.main import app
torch.manual_seed(0)
stock = hf.LlamaForCausalLM(hf.LlamaConfig(**{LLAMA!r}, intermediate_size=40)).eval()
stock.save_pretrained("stock", max_shard_size="40KB")
Path("stock/pytorch_model.bin").write_bytes(b"pickle")
Path("stock/tf_model.h5").write_bytes(b"other")
Path("stock/modeling_x.py").write_text("raise SystemExit")
HfApi().create_repo("me/stock")
HfApi().upload_folder(repo_id="me/stock", folder_path="stock")
def convert(*arguments):
    try:
        app(["convert", *arguments])
    except SystemExit as error:
        return error.code
assert not convert("me/stock", "ours") and not convert("ours", "back", "--to", "mistral")
assert convert("me/stock", "ours") == 2 and convert("ours", "again", "--to", "gpt2") == 2
back, ours = hf.MistralForCausalLM.from_pretrained("back"), urform.from_transformers("me/stock")
ids = torch.arange(3, 12)[None]
sys.path.append({str(Path(__file__).parents[1] / "support")!r})
from numerics import assert_within, twice
want = twice(stock, lambda m: m(ids).logits)
assert_within(back(ids).logits, *want)
assert_within(ours(ids).logits, *want)
"""
        output = client.run(script, HF_TOKEN="hf_test").ok()
        assert "urform: ours exists and is not empty" in output
        assert "cannot be expressed in gpt2; in the way stand: " in output
        fetched = [str(request) for request in hub.requests if "resolve" in str(request)]
        assert any("model-00001-of" in request for request in fetched)
        assert not any(name in str(fetched) for name in ("pytorch_model.bin", "tf_model.h5", "modeling_x.py"))
        client.close()


@pytest.mark.parametrize("architectures", [3, "LlamaForCausalLM", {"a": 1}, [1], True])
def test_architectures_that_are_no_list_of_names(architectures: Any, tmp_path: Path) -> None:
    model_of("LlamaForCausalLM").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": architectures}))
    with pytest.raises(ValueError, match=r"architectures=.* must be a list of names"):
        urform.from_transformers(tmp_path)


@pytest.mark.parametrize(
    ("family", "layers"),
    [("llama", "num_hidden_layers"), ("qwen2", "num_hidden_layers"), ("bart", "decoder_layers"), ("gpt2", "n_layer")],
)
def test_ten_million_layers_are_refused_at_once(family: str, layers: str, tmp_path: Path) -> None:
    """Before the library makes lists of that length."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family, "architectures": ["X"], layers: 10**7}))
    begin = time.process_time()
    with pytest.raises(ValueError, match=f"{layers}=10000000"):
        urform.from_transformers(tmp_path)
    assert time.process_time() - begin < 1.0


@pytest.mark.parametrize("index", ["[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "{", "[" * 10**5])
def test_an_index_that_is_none(index: str, tmp_path: Path) -> None:
    model_of("LlamaForCausalLM").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match=r"index\.json"):
        urform.from_transformers(tmp_path)


def test_ids_outside_the_vocabulary_are_none_here_and_come_back() -> None:
    """Tiny checkpoints have the ids of large ones, old Llamas a pad token of -1."""
    fields = {**LLAMA, "pad_token_id": -1, "bos_token_id": 5000, "eos_token_id": [2, 5000]}
    stock = random_stock("LlamaForCausalLM", 0, **fields)
    ours = urform.from_transformers(stock)
    assert (ours.config.pad_token_id, ours.config.bos_token_id, ours.config.eos_token_id) == (None, None, None)
    back = urform.to_transformers(ours).config
    assert (back.pad_token_id, back.bos_token_id, back.eos_token_id) == (-1, 5000, [2, 5000])
