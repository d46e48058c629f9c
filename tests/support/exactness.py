"""How exact the conversion is: stock classes with random configs and weights against Urform, both ways.

    python tests/support/exactness.py                       # 10 configs of every class; CPU, about three minutes
    python tests/support/exactness.py --configs 100 --only bert roberta

The configs are those of test_conversion_*.py, with other seeds. Printed is the largest difference of logits (of last
hidden states for backbones) at real tokens, over no, right and left padding, in float32, for each family. Hidden states
of every layer, losses, gradients of the embeddings, generations and both round trips are held to the tests' bounds;
what breaks one is counted, and shown with its seed.
"""

import argparse
import sys
import warnings
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "conversion"))

import test_conversion_decoder as decoders
import test_conversion_encoder as encoders
import test_conversion_encoder_decoder as pairs
import torch
import transformers
from conversion_cases import check_parity, random_stock
from drawn_configs import draw


def measure(name: str, stock: str, seed: int) -> float:
    """The largest difference of logits for one random config of a class."""
    if name in encoders.NAMES:
        return encoders.parity(encoders.build(stock, name, seed))
    if name in decoders.NAMES:
        return check_parity(random_stock(stock, seed, **draw(name, seed)))
    return check_parity(pairs.stock_model(name, stock, seed))


def main() -> int:
    """Print a row for each family; 1 if anything is beyond a bound."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", type=int, default=10, help="random configs of each class (default %(default)s)")
    parser.add_argument("--first-seed", type=int, default=1000)
    parser.add_argument("--only", nargs="+", metavar="FAMILY", help="model types of transformers")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    classes: dict[str, list[str]] = {}
    for name, stock in (*encoders.HEADS, *decoders.HEADS, *pairs.HEADS):
        classes.setdefault(name, []).append(stock)
    print("| family | classes x configs | largest difference of logits | beyond a bound |\n|---|---|---|---|")
    broken = []
    for name in options.only or classes:
        worst, before = 0.0, len(broken)
        for stock in classes[name]:
            for seed in range(options.first_seed, options.first_seed + options.configs):
                try:
                    worst = max(worst, measure(name, stock, seed))
                except AssertionError as error:
                    broken.append(f"{stock}, seed {seed}: {str(error).splitlines()[0]}")
        count = f"{len(classes[name])} x {options.configs}"
        print(f"| {name} | {count} | {worst:.1e} | {len(broken) - before} |", flush=True)
    print(*broken, sep="\n", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
