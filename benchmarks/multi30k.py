"""Multi30k English to German: train by the recipe, or take a finished run, and keep result and curve.

    python benchmarks/multi30k.py --data-dir /path/to/multi30k [--output-dir outputs/multi30k] [key=value ...]

writes a row to `benchmarks/results/multi30k-en-de.jsonl`: scores, signature, CPU minutes, device, versions, commit and
curve. Without --data-dir, and with no finished run in --output-dir, it says so and does nothing.
"""

import argparse
import json
import os
import platform
import time
from pathlib import Path

import torch
import transformers
import yaml
from harness import RESULTS as FOLDER
from harness import git_state

from urform.diagnostics.reports import table

RESULTS = FOLDER / "multi30k-en-de.jsonl"


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/multi30k"))
    parser.add_argument("--cpu-minutes", type=float, help="of a finished run, as its shell measured them")
    parser.add_argument("--commit", help="of a finished run; default: the one checked out")
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    code = {"commit": options.commit, "dirty": None, "changed": None} if options.commit else git_state()
    minutes = options.cpu_minutes
    if not (options.output_dir / "results.json").exists():
        if options.data_dir is None:
            print("nothing done: give --data-dir, the folder of train.en.gz, train.de.gz, val.*, test_2016_flickr.*")
            return
        from urform.training.run import train

        start = time.process_time()
        train("multi30k-en-de", [f"data_dir={options.data_dir}", *options.overrides], output_dir=options.output_dir)
        minutes = (time.process_time() - start) / 60
    metrics = json.loads((options.output_dir / "results.json").read_text())
    states = sorted(options.output_dir.glob("checkpoint-*/trainer_state.json"), key=os.path.getmtime)
    history = json.loads(states[-1].read_text())["log_history"]
    recipe = yaml.safe_load((options.output_dir / "recipe.yaml").read_text())
    recipe["data"].pop("data_dir", None)
    recipe["training"].pop("output_dir", None)
    row = {
        **{key: metrics["test"][key] for key in ("bleu", "bleu_signature", "bleu_tok_lc", "bleu_tok_lc_tokenizer")},
        "chrf": metrics["test"]["chrf"],
        "parameters": metrics["num_parameters"],
        "updates": history[-1]["step"],
        "cpu_minutes": None if minutes is None else round(minutes, 1),
        "device": f"cuda: {torch.cuda.get_device_name()}" if torch.cuda.is_available() else f"cpu: {cpu_name()}",
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        **code,
        "date": time.strftime("%Y-%m-%d"),
        "recipe": recipe,
        "train_loss": [[entry["step"], entry["loss"]] for entry in history if "loss" in entry],
        "validation_loss": [[entry["step"], entry["eval_loss"]] for entry in history if "eval_loss" in entry],
    }
    with RESULTS.open("a") as file:
        file.write(json.dumps(row) + "\n")
    keys = ("bleu_tok_lc", "bleu", "chrf", "updates", "cpu_minutes", "device")
    print("\n".join(table([(key, str(row[key])) for key in keys])))


if __name__ == "__main__":
    main()
