"""What `test_distributed.py` runs in each of two gloo processes: `distributed_worker.py CASES RESULTS`.

A case trains one step on two processes and on one, in float64, and tells how far losses and gradients are apart,
parameter by parameter. The one process is the model itself, undistributed and under `attn_implementation="eager"`.
"""

import faulthandler
import json
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers.distributed import DistributedConfig
from transformers.utils import logging

import urform

logging.set_verbosity_error()
warnings.simplefilter("ignore")

ROWS, LENGTH = 4, 12
HEADS = {
    "encoder": "UrformForMaskedLM",
    "decoder": "UrformForCausalLM",
    "encoder-decoder": "UrformForConditionalGeneration",
}
BASE: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "hidden_dropout_prob": 0.0,
}


def make_ids(seed: int, vocab: int, layout: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Ids `[ROWS, LENGTH]` and what tells of their padding (ids 0) or packing; every token of the table comes."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, vocab, (ROWS, LENGTH), generator=generator)
    every = torch.arange(3, min(vocab, 3 + ROWS * LENGTH))
    ids.view(-1)[: len(every)] = every[torch.randperm(len(every), generator=generator)]
    if layout == "padded":
        lengths = torch.tensor([LENGTH, 5, 9, 7])
        mask = (torch.arange(LENGTH) < lengths[:, None]).long()
        mask[1] = mask[1].flip(0)
        return ids * mask, {"attention_mask": mask}
    if layout == "packed":
        cuts = (5, 3, 7, 9) if seed % 2 else (4, 6, 8, 2)
        return ids, {
            "position_ids": torch.stack([torch.cat((torch.arange(c), torch.arange(LENGTH - c))) for c in cuts])
        }
    return ids, {}


def make_batch(case: dict[str, Any], config: Any, seed: int) -> dict[str, Any]:
    """A training batch for the case's head."""
    layout = case.get("layout", "padded")
    ids, told = make_ids(2 * seed, config.vocab_size, layout)
    batch: dict[str, Any] = {"input_ids": ids, **told}
    if config.architecture == "encoder-decoder":
        targets, of_targets = make_ids(2 * seed + 1, config.vocab_size, layout)
        batch["labels"] = targets.masked_fill(targets == 0, -100)
        if layout == "packed":
            batch["decoder_position_ids"] = of_targets["position_ids"]
    else:
        batch["labels"] = ids.masked_fill(ids == 0, -100)
    return batch


def half(batch: dict[str, Any], rank: int) -> dict[str, Any]:
    """The rows of one process."""
    rows = slice(rank * ROWS // 2, (rank + 1) * ROWS // 2)
    return {key: value[rows] for key, value in batch.items()}


def step(model: nn.Module, batches: list[dict[str, Any]], options: dict[str, Any]) -> float:
    """Forward and backward over the batches of an update; the sum of their losses."""
    total = 0.0
    for batch in batches:
        loss = model(**batch, **options).loss
        loss.backward()
        total += float(loss.detach())
    return total


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    """Every parameter's gradient, whole."""
    found = {}
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        found[name] = grad.full_tensor() if isinstance(grad, DTensor) else grad
    return found


def reference(case: dict[str, Any], folder: str) -> Any:
    """The model in one process, saved to `folder`."""
    torch.manual_seed(0)
    config = urform.UrformConfig(**{**BASE, **case["config"]})
    model = getattr(urform, case.get("head", HEADS[config.architecture]))(config).double()
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias") or "table" in name:  # as trained: none is 0 or 1
            nn.init.normal_(parameter, 1.0 if "norm.weight" in name else 0.0, 0.3)
    model.save_pretrained(folder)
    model.set_attn_implementation("eager")
    return model


def distribute(case: dict[str, Any], folder: str, cls: type) -> Any:
    """The same model on two processes."""
    options: dict[str, Any] = {"dtype": torch.float64}
    if case.get("attention") is not None:
        options["attn_implementation"] = case["attention"]
    if case["mode"] == "fully_shard":
        model = cls.from_pretrained(folder, **options)
        policy = MixedPrecisionPolicy(getattr(torch, case.get("compute", "float64")), torch.float64)
        for module in list(model.modules()):
            if type(module).__name__ == "UrformLayer":
                fully_shard(module, mp_policy=policy)
        fully_shard(model, mp_policy=policy)
        return model
    sizes = {"fsdp": {"fsdp_size": 2}, "tp": {"tp_size": 2}, "2d": {"fsdp_size": 2, "tp_size": 2}}[case["mode"]]
    return cls.from_pretrained(folder, distributed_config=DistributedConfig(**sizes), **options)


def checkpoint(case: dict[str, Any], model: Any) -> None:
    """Turn gradient checkpointing on."""
    if case.get("checkpointing") is not None:
        model.gradient_checkpointing_enable({"use_reentrant": case["checkpointing"] == "reentrant"})


def far(found: Tensor | None, wanted: Tensor | None) -> float:
    """The relative distance of two gradients; infinite where one is missing."""
    if found is None or wanted is None:
        return 0.0 if found is wanted else float("inf")
    if found.shape != wanted.shape:
        return float("inf")
    scale = float(wanted.norm())
    return float((found - wanted).norm()) / (scale if scale > 1e-12 else 1.0)


def run(case: dict[str, Any], rank: int, folder: str) -> dict[str, Any]:
    """One case: the loss of both, the worst gradients, and how many parameters are sharded."""
    one = reference(case, folder)
    dist.barrier()
    seeds = range(case.get("accumulate", 1))
    batches = [make_batch(case, one.config, seed) for seed in seeds]
    options = case.get("options", {})
    many = distribute(case, folder, type(one))
    one.train(), many.train()
    checkpoint(case, many)
    if "input_ids" in case:
        many(input_ids=torch.tensor(case["input_ids"]))
        raise RuntimeError("input_ids were accepted")
    if case["mode"] == "tp":
        wanted = step(one, batches, options)
        found = step(many, batches, options)
    else:
        wanted = step(one, [half(batch, r) for r in (0, 1) for batch in batches], options) / 2
        for parameter in one.parameters():
            if parameter.grad is not None:
                parameter.grad /= 2
        part = rank // (dist.get_world_size() // 2)  # with "2d", two processes share a part
        mean = torch.tensor(step(many, [half(batch, part) for batch in batches], options), dtype=torch.float64)
        dist.all_reduce(mean)
        found = float(mean) / dist.get_world_size()
    ours, theirs = gradients(many), gradients(one)
    apart = {name: far(ours.get(name), grad) for name, grad in theirs.items()}
    worst = sorted(apart, key=lambda name: -apart[name])[:3]
    result = {
        "loss": found,
        "loss_apart": abs(found - wanted) / abs(wanted),
        "worst": {name: apart[name] for name in worst},
        "sharded": sum(isinstance(p, DTensor) for p in many.parameters()),
        "parameters": sum(1 for _ in many.parameters()),
    }
    if case.get("save"):
        many.save_pretrained(f"{folder}-saved")
        dist.barrier()
        again = type(one).from_pretrained(f"{folder}-saved", dtype=torch.float64).state_dict()
        result["saves"] = all(torch.equal(again[name], value) for name, value in one.state_dict().items())
    if case.get("generate"):
        one.eval(), many.eval()
        for model in (one, many):
            model.config.use_cache = True
        prompt = {key: batches[0][key] for key in ("input_ids", "attention_mask")}
        tokens = [model.generate(**prompt, max_new_tokens=6, do_sample=False) for model in (one, many)]
        result["generates"] = torch.equal(*tokens)
    return result


def main(cases: str, results: str) -> None:
    """Run all cases; process 0 writes what they gave, one JSON object by name."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, found = dist.get_rank(), {}
    for number, case in enumerate(json.loads(Path(cases).read_text(encoding="utf-8"))):
        faulthandler.dump_traceback_later(120, exit=True)  # a rank that waits for ever says where
        try:
            found[case["name"]] = run(case, rank, f"{results}-{number}")
        except Exception as error:
            found[case["name"]] = {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
        dist.barrier()
        if rank == 0:
            Path(results).write_text(json.dumps(found), encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
