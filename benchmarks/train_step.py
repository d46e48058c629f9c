"""Whole training steps against transformers' own classes: real tokens per second.

    python benchmarks/train_step.py                                     # CPU, a few minutes
    python benchmarks/train_step.py --only d512 --data shared/data/multi30k --repeats 9
    python benchmarks/train_step.py --device cuda                       # T5-base and BART-base sizes

A step is forward, backward, clipping at norm 1 and fused AdamW, in train mode with dropout 0.1 wherever the peer has a
dropout, on the same batches for all. Tokens are real ones, source and target; padding does not count. Every
implementation runs in float32 and in bfloat16 autocast, peers with "sdpa" and "eager" too: the best counts.

- d128-*, d512-*: `UrformForConditionalGeneration` and `MarianMTModel` (sinusoids, post-norm, tied tables, vocabulary
  10,000), 4+4 layers 128 wide and 6+6 layers 512 wide, batches of 128 Multi30k pairs as DataCollatorForSeq2Seq makes
  them from shuffled data ("default") or from Trainer's group_by_length ("grouped").
- bert-mlm, bert-backbone: `UrformForMaskedLM` and `BertForMaskedLM` with 15% of the positions masked, and the bare
  encoders, 4 layers 512 wide, batches of 32 Wikipedia paragraphs.
- t5-base, bart-base: the stock classes' sizes, batches of 64 arXiv abstracts with their titles, for --device cuda.

d512-grouped and bert-mlm take long: they run when --only names them. Without --data, ids are random and lengths follow
the histograms in workloads.py.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from harness import Bench, Contender, arguments
from torch import Tensor, nn
from workloads import (
    ABSTRACTS,
    BART_BASE,
    BASE,
    BERT_SMALL,
    ENGLISH,
    GERMAN_MORE,
    PAD,
    SMALL,
    T5_BASE,
    TITLES,
    WIKIPEDIA,
    Batch,
    Models,
    Size,
    bart,
    choose,
    encoders,
    multi30k,
    pad,
    places,
    random_ids,
    real_tokens,
    seq2seq_batch,
    t5,
    translators,
)


def own_loss(model: nn.Module, batch: Batch) -> Tensor:
    return model(**batch).loss


def projected_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean of a fixed projection of the hidden states at real tokens: gradients everywhere, at almost no cost."""
    hidden = model(**batch).last_hidden_state
    direction = torch.linspace(-1, 1, hidden.shape[-1], dtype=hidden.dtype, device=hidden.device)
    return ((hidden @ direction) * batch["attention_mask"]).float().mean()


def training(
    model: nn.Module, batches: Sequence[Batch], loss_of: Callable[[nn.Module, Batch], Tensor], bf16: bool
) -> Callable[[int], None]:
    """Give the step on the batch of a round."""
    device = batches[0]["input_ids"].device
    model.train().to(device)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)

    def step(round_: int) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss = loss_of(model, batches[round_ % len(batches)])
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


# ----------------------------------------------------------------------------------------------------------- cases


def compare(
    bench: Bench,
    name: str,
    size: Size,
    models: Models,
    batches: list[Batch],
    loss_of: Callable[[nn.Module, Batch], Tensor] = own_loss,
    **configuration: Any,
) -> None:
    batches = [{key: x.to(bench.device) for key, x in batch.items()} for batch in batches]
    contenders = [
        Contender(side, f"{variant} {precision}".strip(), training(model, batches, loss_of, precision == "bf16"))
        for (side, variant), model in models.items()
        for precision in (("fp32", "bf16") if bench.device == "cpu" else ("bf16",))
    ]
    real = [real_tokens(batch) for batch in batches]
    configuration = {
        "layers": size.layers,
        "hidden": size.hidden,
        "heads": size.heads,
        "vocabulary": size.vocabulary,
        "batch": size.batch,
        "places_per_token": round(sum(map(places, batches)) / sum(real), 3),
        **configuration,
    }
    memory = bench.options.memory or bench.device == "cuda"
    bench.compare(name, configuration, contenders, work=lambda i: real[i], memory=memory)


def translation(bench: Bench, name: str, size: Size, collator: str) -> None:
    """Multi30k pairs, real ones with --data."""
    size = size.quick() if bench.options.quick else size
    folder = bench.options.data
    if folder is not None:
        source, target = multi30k(folder, size.vocabulary)
    else:
        generator = torch.Generator().manual_seed(0)
        lengths = ENGLISH.draw(size.examples, generator)
        source = random_ids(lengths, size.vocabulary, generator)
        lengths = (lengths + GERMAN_MORE.draw(size.examples, generator)).clamp(min=4)
        target = random_ids(lengths, size.vocabulary, generator)
    chosen = choose([len(ids) for ids in source], size.batch, collator == "grouped", bench.rounds)
    batches = [seq2seq_batch([source[i] for i in members], [target[i] for i in members]) for members in chosen]
    data = "generated" if folder is None else folder.name
    compare(bench, name, size, translators(size, ("sdpa", "eager")), batches, collator=collator, data=data)


def passages(bench: Bench, name: str, size: Size, masked_lm: bool) -> None:
    """Wikipedia paragraphs."""
    size = size.quick() if bench.options.quick else size
    generator = torch.Generator().manual_seed(0)
    lengths = WIKIPEDIA.draw(size.batch * bench.rounds, generator).clamp(max=512)
    batches = []
    for texts in zip(*[iter(random_ids(lengths, size.vocabulary, generator))] * size.batch, strict=True):
        mask = pad([torch.ones_like(ids) for ids in texts], 0)
        batch = {"input_ids": pad(texts, PAD), "attention_mask": mask}
        if masked_lm:
            picked = (torch.rand(mask.shape, generator=generator) < 0.15) & mask.bool()
            batch["labels"] = batch["input_ids"].masked_fill(~picked, -100)
        batches.append(batch)
    compare(bench, name, size, encoders(size, masked_lm), batches, own_loss if masked_lm else projected_loss)


def summarization(bench: Bench, name: str, size: Size, make: Callable[[Size], Models]) -> None:
    """Abstracts and titles."""
    size = size.quick() if bench.options.quick else size
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(bench.rounds):
        abstracts = random_ids(ABSTRACTS.draw(size.batch, generator), size.vocabulary, generator)
        batches.append(
            seq2seq_batch(abstracts, random_ids(TITLES.draw(size.batch, generator), size.vocabulary, generator))
        )
    compare(bench, name, size, make(size), batches)


# The device on which a case runs without being named.
CASES: dict[str, tuple[str, Callable[[Bench, str], None]]] = {
    "d128-default": ("cpu", lambda bench, name: translation(bench, name, SMALL, "default")),
    "d128-grouped": ("cpu", lambda bench, name: translation(bench, name, SMALL, "grouped")),
    "d512-default": ("cpu", lambda bench, name: translation(bench, name, BASE, "default")),
    "d512-grouped": ("", lambda bench, name: translation(bench, name, BASE, "grouped")),
    "bert-mlm": ("", lambda bench, name: passages(bench, name, BERT_SMALL, True)),
    "bert-backbone": ("cpu", lambda bench, name: passages(bench, name, BERT_SMALL, False)),
    "t5-base": ("cuda", lambda bench, name: summarization(bench, name, T5_BASE, t5)),
    "bart-base": ("cuda", lambda bench, name: summarization(bench, name, BART_BASE, bart)),
}


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = arguments(__doc__, repeats=9, warmup=1, sizes=list(CASES))
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="of Multi30k: train.en.gz, train.de.gz")
    parser.add_argument("--memory", action="store_true", help="measure peak memory on the CPU too")
    options = parser.parse_args(argv)
    bench = Bench("train_step", options, argv)
    for name, (device, run) in CASES.items():
        if bench.wants(name) and (options.only or device == options.device):
            run(bench, name)
    return bench.finish()


if __name__ == "__main__":
    main()
