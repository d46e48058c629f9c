"""Two processes compute what one computes: FSDP2 and tensor parallelism, losses and gradients of every parameter.

`distributed_worker.py` runs all cases of a group in one pair of gloo processes on the CPU, in float64, and compares
with the same model undistributed under eager attention.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers.distributed import tensor_parallel

import urform
from urform.modeling.layers_urform import UrformLayer
from urform.modeling.stack_urform import UrformPreTrainedModel

WORKER = Path(__file__).parents[1] / "support/distributed_worker.py"
# transformers 5.17 does not:
SPLITS_UNEVENLY = hasattr(tensor_parallel.TensorParallelLayer, "_from_local_last_dim_shard")

ARCHITECTURES = ("encoder", "decoder", "encoder-decoder")
POSITIONS = ("rope", "sinusoidal", "learned", "alibi", "t5", "none")
SMOOTH = {"label_smoothing": 0.1, "z_loss": 1e-3}
GEMMA = {
    "architecture": "decoder",
    "num_key_value_heads": 2,
    "qk_norm": True,
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 4,
    "attn_logit_softcapping": 5.0,
    "final_logit_softcapping": 9.0,
    "gated_mlp": True,
    "norm_position": "sandwich",
    "norm_type": "rmsnorm",
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e5},
    },
}
BERT = {
    "architecture": "encoder",
    "position_encoding": "learned",
    "lm_head_transform": True,
    "lm_head_bias": True,
    "type_vocab_size": 2,
    "embedding_norm": True,
    "norm_position": "post",
}


def case(mode: str, base: dict[str, Any] | str, position: str | None = None, **rest: Any) -> dict[str, Any]:
    """A case for the worker, named after what it holds; `fields` are added to the config."""
    config = {"architecture": base} if isinstance(base, str) else dict(base)
    if position is not None:
        config["position_encoding"] = position
    fields = rest.pop("fields", {})
    said = {k: v for k, v in {**rest, **fields}.items() if k != "options" and v is not None}
    name = "-".join(str(x) for x in (mode, config["architecture"], position, *(f"{k}={v}" for k, v in said.items())))
    return {"name": name, "mode": mode, "config": {**config, **fields}, **rest}


QUICK = [
    case("fully_shard", "encoder", "t5"),
    case("fully_shard", "decoder", "alibi", layout="packed", accumulate=2),
    case("fully_shard", "encoder-decoder", "rope", fields={"qk_norm": True}, options=SMOOTH),
    case("fully_shard", "encoder-decoder", "t5", checkpointing="plain"),
    case("fully_shard", "decoder", "t5", checkpointing="reentrant", attention="urform"),
    case("fully_shard", "encoder-decoder", "t5", compute="bfloat16"),
    case("fsdp", BERT),
    case("fsdp", GEMMA, generate=True),
    case("fsdp", "encoder-decoder", "sinusoidal", layout="packed"),
    case("fsdp", "encoder-decoder", "none", attention="sdpa", save=True),
    case("fsdp", "decoder", "t5", attention="urform", fields={"tie_word_embeddings": False}, options=SMOOTH),
    case("tp", BERT),
    case("tp", GEMMA, generate=True, save=True),
    case("tp", "encoder", "t5", fields={"qk_norm": True}, accumulate=2),
    case("tp", "decoder", "alibi", attention="sdpa"),
    case("tp", "decoder", "learned", fields={"tie_word_embeddings": False, "lm_head_bias": True}, options=SMOOTH),
    case("tp", "encoder-decoder", "t5", fields={"qk_norm": True}, layout="packed"),
    case("tp", "encoder-decoder", "alibi", checkpointing="reentrant", generate=True),
    case("tp", "encoder-decoder", "t5", checkpointing="reentrant", generate=True, save=True),
    case(
        "tp", "encoder-decoder", "rope", attention="urform", options=SMOOTH,
        fields={"decoder_num_attention_heads": 2, "decoder_head_dim": 8, "decoder_intermediate_size": 40},
    ),
]  # fmt: skip
MATRIX = [
    case(mode, architecture, position, attention=attention, layout=layout, fields={"qk_norm": True})
    for mode, architecture, position, attention, layout in itertools.product(
        ("fully_shard", "fsdp", "tp"), ARCHITECTURES, POSITIONS, (None, "urform", "sdpa", "eager"), ("padded", "packed")
    )
] + [
    case(mode, architecture, position, checkpointing=how, layout=layout, fields=fields, options=SMOOTH)
    for mode, architecture, position, (how, layout), fields in itertools.product(
        ("fully_shard", "fsdp", "tp"),
        ARCHITECTURES,
        ("rope", "t5"),
        (("plain", "packed"), ("reentrant", "padded")),
        ({"tie_word_embeddings": False, "share_embeddings": False}, {"qk_norm": True}),
    )
]
UNEVEN = [
    case("tp", "decoder", "none", fields={"vocab_size": 49}),
    case("tp", "decoder", "none", fields={"intermediate_size": 49, "gated_mlp": True}),
]
REFUSED = [
    (case("tp", "decoder", fields={"num_key_value_heads": 1}), "num_key_value_heads=1 cannot"),
    (
        case("tp", "decoder", fields={"num_attention_heads": 3, "hidden_size": 36}),
        "num_attention_heads=3 cannot",
    ),
    (case("tp", "decoder", input_ids=[[3, 48, 4]]), "input_ids holds 48, outside 0..47"),
    (case("tp", "encoder", input_ids=[[3, -1, 4]]), "input_ids holds -1, outside 0..47"),
]


def run(cases: list[dict[str, Any]], folder: Path) -> dict[str, Any]:
    """Run cases in a pair of processes: what process 0 found, by name."""
    names = [each["name"] for each in cases]
    if len(set(names)) < len(names):
        raise ValueError(f"two cases have one name: {sorted(name for name in names if names.count(name) > 1)}")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    (folder / "cases.json").write_text(json.dumps(cases), encoding="utf-8")
    logs = [folder / f"{rank}.log" for rank in "01"]
    processes = []
    for rank, log in enumerate(logs):
        of_rank = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        processes.append(
            subprocess.Popen(
                [sys.executable, WORKER, folder / "cases.json", folder / "results"],
                env={**os.environ, **of_rank, "MASTER_PORT": port, "CUDA_VISIBLE_DEVICES": ""},
                stdout=log.open("w"),
                stderr=subprocess.STDOUT,
            )
        )
    try:
        codes = [process.wait(timeout=60 + 10 * len(cases)) for process in processes]
    finally:
        for process in processes:
            process.kill()
    if codes != [0, 0]:
        pytest.fail(f"the processes ended with {codes}:\n" + "\n".join(log.read_text()[-3000:] for log in logs))
    return json.loads((folder / "results").read_text(encoding="utf-8"))


def check(case: dict[str, Any], found: dict[str, Any]) -> None:
    """Losses and gradients are those of one process."""
    assert "error" not in found, found["trace"]
    sharded = found["parameters"] if case["mode"] != "tp" else 1
    assert found["sharded"] >= sharded
    if "compute" in case:  # bfloat16 has 8 bits
        assert found["loss_apart"] < 2**-8
        return
    # Of logits, the library computes the loss in float32.
    exact = case.get("options") == SMOOTH or (case["mode"] != "tp" and case.get("attention") in (None, "urform"))
    tolerance = 1e-9 if exact and case["config"].get("tie_word_embeddings", True) else 2e-6
    assert found["loss_apart"] < tolerance
    assert max(found["worst"].values()) < tolerance, found["worst"]
    assert found.get("generates", True)
    assert found.get("saves", True)


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All quick cases, in one pair of processes."""
    return run([*QUICK, *UNEVEN, *(each for each, _ in REFUSED)], tmp_path_factory.mktemp("quick"))


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The full matrix, in one pair of processes."""
    return run(MATRIX, tmp_path_factory.mktemp("matrix"))


@pytest.mark.parametrize("one", QUICK, ids=lambda one: one["name"])
def test_two_processes_train_as_one(quick: dict[str, Any], one: dict[str, Any]) -> None:
    check(one, quick[one["name"]])


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("one", MATRIX, ids=lambda one: one["name"])
def test_two_processes_train_as_one_everywhere(matrix: dict[str, Any], one: dict[str, Any]) -> None:
    check(one, matrix[one["name"]])


@pytest.mark.parametrize("one", UNEVEN, ids=lambda one: one["name"])
def test_uneven_widths_are_right_or_refused(quick: dict[str, Any], one: dict[str, Any]) -> None:
    found = quick[one["name"]]
    if SPLITS_UNEVENLY:
        check(one, found)
    else:
        assert "=49 cannot be split evenly over tp_size=2" in found["error"]


@pytest.mark.parametrize(("one", "message"), REFUSED, ids=lambda x: x["name"] if isinstance(x, dict) else "")
def test_what_two_processes_cannot_share_is_refused(quick: dict[str, Any], one: dict[str, Any], message: str) -> None:
    assert quick[one["name"]]["error"].startswith(f"ValueError: {message}")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_heads_that_do_not_divide_are_refused_before_loading(architecture: str) -> None:
    sizes = {"decoder_num_attention_heads": 3, "decoder_num_key_value_heads": 3, "decoder_head_dim": 8}
    extra = sizes if architecture == "encoder-decoder" else {"num_key_value_heads": 1}
    field = "decoder_num_attention_heads=3" if architecture == "encoder-decoder" else "num_key_value_heads=1"
    config = urform.UrformConfig(
        architecture=architecture, vocab_size=48, hidden_size=32, num_attention_heads=4, num_hidden_layers=1,
        intermediate_size=48, **extra,
    )  # fmt: skip
    with torch.device("meta"):
        model = urform.UrformModel(config)
    for plan in (None, "auto"):
        with pytest.raises(ValueError, match=rf"{field} cannot be split evenly over tp_size=2 .* fsdp_size=2"):
            UrformPreTrainedModel.maybe_distribute_model(model, SimpleNamespace(tp_size=2, tp_plan=plan), None)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("position", POSITIONS)
def test_no_dataclass_reaches_a_layer(architecture: str, position: str) -> None:
    """FSDP walks dataclasses among a layer's arguments, and copies them under mixed precision."""
    sizes = {"vocab_size": 48, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1}
    config = urform.UrformConfig(architecture=architecture, position_encoding=position, intermediate_size=48, **sizes)
    model, seen = urform.UrformModel(config), []
    for module in model.modules():
        if isinstance(module, UrformLayer):
            module.register_forward_pre_hook(lambda _, args, kw: seen.extend([*args, *kw.values()]), with_kwargs=True)
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[1, 4:] = 0
    inputs = {"input_ids": torch.randint(3, 48, (2, 6)), "attention_mask": mask}
    if architecture == "encoder-decoder":
        inputs["decoder_input_ids"] = inputs["input_ids"]
    model(**inputs, use_cache=False)
    assert seen
    assert not [x for x in seen if dataclasses.is_dataclass(x)]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_entry_of_the_plan_names_a_module(architecture: str) -> None:
    """And every projection, norm over heads and table has one."""
    config = urform.UrformConfig(
        architecture=architecture, vocab_size=48, hidden_size=32, num_attention_heads=4, num_hidden_layers=1,
        intermediate_size=48, qk_norm=True, gated_mlp=True, position_encoding="t5",
    )  # fmt: skip
    model = urform.UrformModel(config)
    plan = {name.replace("*", "0") for name in model.tp_plan}
    modules = {name for name, _ in model.named_modules()}
    assert plan <= modules
    wanted = ("_proj", "q_norm", "k_norm", "position_bias", "table", "embed_tokens")
    assert {name for name in modules if name.endswith(wanted)} <= plan
