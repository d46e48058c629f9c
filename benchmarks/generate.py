"""`generate` against MarianMTModel of the same size: new tokens per second.

    python benchmarks/generate.py                                       # CPU, a few minutes
    python benchmarks/generate.py --only d512 --new-tokens 64

Greedy search and beam search with 4 beams for 32 sources of Multi30k's lengths, padded; the weights are random. The end
token is barred until the last step (min_new_tokens = max_new_tokens), so all do the same number of steps; the encoder's
pass is in the time. Weights are float32 or bfloat16, Marian's attention "sdpa" or "eager": each side's best counts.
Tokens are those that are returned, one sequence per source.
"""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from harness import Bench, Contender, arguments
from torch import Tensor, nn
from workloads import BASE, ENGLISH, PAD, SMALL, Models, Size, pad, random_ids, translators


def generation(
    model: nn.Module, inputs: dict[str, Tensor], new_tokens: int, beams: int, prompt_length: int = 1
) -> Callable[[int], None]:
    """Give a call that generates for all sources and checks how many tokens came back, after those of the prompt."""

    def call(round_: int) -> None:
        ids = model.generate(
            **inputs, do_sample=False, num_beams=beams, min_new_tokens=new_tokens, max_new_tokens=new_tokens
        )
        if ids.shape[1] != new_tokens + prompt_length:
            raise RuntimeError(
                f"{type(model).__name__} gave {ids.shape[1] - prompt_length} tokens instead of {new_tokens}"
            )

    return call


def contenders(
    bench: Bench, models: Models, inputs: dict[str, Tensor], new_tokens: int, beams: int, prompt_length: int = 1
) -> list[Contender]:
    """Give each model in float32 and in bfloat16, as copies."""
    return [
        Contender(side, f"{variant} {precision}".strip(), generation(ready, inputs, new_tokens, beams, prompt_length))
        for (side, variant), model in models.items()
        for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
        for ready in [copy.deepcopy(model).eval().to(bench.device, dtype)]
    ]


def compare(bench: Bench, name: str, size: Size, beams: int) -> None:
    quick = bench.options.quick
    size, sources, new_tokens = (size.quick(), 3, 4) if quick else (size, 32, bench.options.new_tokens)
    generator = torch.Generator().manual_seed(0)
    source = random_ids(ENGLISH.draw(sources, generator), size.vocabulary, generator)
    input_ids = pad(source, PAD).to(bench.device)
    inputs = {"input_ids": input_ids, "attention_mask": (input_ids != PAD).long()}
    ready = contenders(bench, translators(size, ("sdpa", "eager")), inputs, new_tokens, beams)
    configuration = {
        "layers": size.layers,
        "hidden": size.hidden,
        "heads": size.heads,
        "vocabulary": size.vocabulary,
        "sources": sources,
        "longest": input_ids.shape[1],
        "beams": beams,
        "new_tokens": new_tokens,
    }
    bench.compare(name, configuration, ready, work=lambda i: sources * new_tokens)


CASES: dict[str, Callable[[Bench, str], None]] = {
    "d128-greedy": partial(compare, size=SMALL, beams=1),
    "d128-beam4": partial(compare, size=SMALL, beams=4),
    "d512-greedy": partial(compare, size=BASE, beams=1),
    "d512-beam4": partial(compare, size=BASE, beams=4),
}


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = arguments(__doc__, repeats=7, warmup=1, sizes=list(CASES))
    parser.add_argument("--new-tokens", type=int, default=32, help="per source (default %(default)s)")
    options = parser.parse_args(argv)
    bench = Bench("generate", options, argv)
    for name, run in CASES.items():
        if bench.wants(name):
            run(bench, name)
    return bench.finish()


if __name__ == "__main__":
    main()
