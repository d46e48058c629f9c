"""Linear layer and cross-entropy, forward and backward: ours against logits with F.cross_entropy, and torch's chunks.

    python benchmarks/loss.py                          # CPU, a minute or two
    python benchmarks/loss.py --only v10k --threads 1
    python benchmarks/loss.py --device cuda            # sizes of a language model's head, bfloat16

One call is the loss and its gradients by hidden states and weight. "torch" makes all logits (F.linear,
F.cross_entropy); "torch-chunked" is F.linear_cross_entropy with its default LinearCrossEntropyOptions, where this torch
has it, without label smoothing. float32 and bfloat16 autocast are compared each by itself; parameters are float32.
Rates count rows, ignored ones too. Peak memory is what a call adds: logits, gradients, temporaries.

- v10k-*: a translator's batch, 1,700 tokens, models 128 and 512 wide, without and with label smoothing;
- mlm: 15% of 1,024 positions carry a label;
- v128k: 256 rows over a large language model's vocabulary;
- head-*: 8,192 rows, 128,256 classes, 4,096 wide, for --device cuda.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from harness import OURS, Bench, Contender, arguments
from torch import Tensor

from urform.modeling.kernels.loss_linear_cross_entropy import linear_cross_entropy


class Case(NamedTuple):
    rows: int
    vocabulary: int
    hidden: int
    label_smoothing: float = 0.0
    labelled: float = 1.0
    device: str = "cpu"


CASES = {
    "v10k-e128": Case(1700, 10_000, 128),
    "v10k-e128-smoothed": Case(1700, 10_000, 128, label_smoothing=0.1),
    "v10k-e512": Case(1700, 10_000, 512),
    "v10k-e512-smoothed": Case(1700, 10_000, 512, label_smoothing=0.1),
    "mlm": Case(1024, 30_522, 256, labelled=0.15),
    "v128k": Case(256, 128_256, 128),
    "head-v128k": Case(8192, 128_256, 4096, device="cuda"),
    "head-v128k-smoothed": Case(8192, 128_256, 4096, label_smoothing=0.1, device="cuda"),
}
PRECISIONS = {"cpu": ("fp32", "bf16"), "cuda": ("bf16",)}


def plain(hidden: Tensor, weight: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), labels, label_smoothing=label_smoothing)


def chunked(hidden: Tensor, weight: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
    # It knows nothing of autocast: the cast that F.linear would get is made here, in the graph.
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(hidden, weight, labels, label_smoothing=label_smoothing, options=options)


def fused(hidden: Tensor, weight: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
    return linear_cross_entropy(hidden, weight, labels, label_smoothing=label_smoothing)


def contender(
    side: str, loss: Callable[..., Tensor], precision: str, case: Case, tensors: Sequence[Tensor]
) -> Contender:
    hidden, weight, labels = tensors
    device = hidden.device.type

    def run(round_: int) -> None:
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            value = loss(hidden, weight, labels, case.label_smoothing)
        value.backward()
        hidden.grad = weight.grad = None

    return Contender(side, "", run, precision)


def compare(bench: Bench, name: str, case: Case) -> None:
    if bench.options.quick:
        case = case._replace(rows=40, vocabulary=301, hidden=16)
    hidden = torch.randn(case.rows, case.hidden, device=bench.device, requires_grad=True)
    weight = (torch.randn(case.vocabulary, case.hidden, device=bench.device) * case.hidden**-0.5).requires_grad_()
    labels = torch.randint(case.vocabulary, (case.rows,), device=bench.device)
    labels[torch.rand(case.rows, device=bench.device) >= case.labelled] = -100
    sides = {OURS: fused, "torch": plain}
    if hasattr(F, "linear_cross_entropy") and not case.label_smoothing:  # with smoothing it makes all logits
        sides["torch-chunked"] = chunked
    contenders = [
        contender(side, loss, precision, case, (hidden, weight, labels))
        for precision in PRECISIONS[bench.device]
        for side, loss in sides.items()
    ]
    bench.compare(name, case._asdict(), contenders, work=lambda _: case.rows, unit="rows", memory=True)


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    options = arguments(__doc__, repeats=5, sizes=list(CASES)).parse_args(argv)
    bench = Bench("loss", options, argv)
    for name, case in CASES.items():
        if bench.wants(name) and (options.only or case.device == options.device):
            compare(bench, name, case)
    return bench.finish()


if __name__ == "__main__":
    main()
