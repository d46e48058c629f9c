"""What the benchmark scripts share: contenders timed in turn, statistics, peak memory, a table, a row with the machine.

A script describes each of its cases by a configuration (a dict), by contenders (ours and the named peers, each with its
variants) and by the work that one call does; `Bench.compare` does the rest:

- all contenders run in one process, one call each per round, and the order is rotated from round to round, so that
  what slows the machine down for a while slows them all;
- warm-up calls come first; a call shorter than 20 ms is repeated inside its sample until the sample is that long;
- a sample is a duration; reported are median, p10 and p90 of the samples, and of the ratios inside each round;
- a side's best variant (the lowest median) stands for the side, as ours in its best precision against theirs; where
  that is not wanted, groups (as one for each dtype) are compared each by itself;
- a peer that fails is reported with its error; ours that fails ends the script.

Run by itself this file does nothing.
"""

import argparse
import importlib.util
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # read when torch is imported: the profiler's chatter
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from urform.dependencies import install_command
from urform.diagnostics.reports import table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
OURS = "urform"
SHORTEST_SAMPLE = 0.02  # seconds
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "sve", "bf16")
PACKAGES = ("torch", "transformers", "triton", "urform")


@dataclass(frozen=True)
class Contender:
    """One way to do the work.

    Attributes:
        side: "urform", or the peer's name.
        variant: what tells the side's ways apart, as "eager bf16"; may be empty.
        run: called with the number of the round, so that every contender takes the same batch in it: 0 to repeats - 1
            are timed, the warm-up rounds follow them (a batch seen for the first time stays new until it is timed).
        group: compared only with contenders of the same group.
        held: bytes that it needs during a call and that are there before it (a mask): they count as memory.
    """

    side: str
    variant: str
    run: Callable[[int], object]
    group: str = ""
    held: int = 0

    @property
    def name(self) -> str:
        return " ".join(filter(None, (self.side, self.variant, self.group)))


def arguments(doc: str | None, *, repeats: int, warmup: int = 2, sizes: Sequence[str] = ()) -> argparse.ArgumentParser:
    """Make a parser with the options that all scripts have; `sizes` are the configurations' names."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, help="of torch; default 2 on the CPU, torch's own with --device cuda")
    parser.add_argument("--repeats", type=int, default=repeats, help="rounds that are timed (default %(default)s)")
    parser.add_argument("--warmup", type=int, default=warmup, help="rounds before them (default %(default)s)")
    parser.add_argument(
        "--seconds",
        type=float,
        default=60,
        help="stop a configuration after so long, but not before 3 rounds (%(default)s)",
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help=f"configurations: {', '.join(sizes)}; or a part")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, for tests: the numbers mean nothing")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw the ratios (needs matplotlib)")
    parser.add_argument("--no-record", action="store_true", help="do not append rows to benchmarks/results/")
    parser.add_argument("--dirty", action="store_true", help="record rows of code that is not committed; they say so")
    return parser


def percentile(samples: Sequence[float], share: float) -> float:
    return torch.tensor(list(samples), dtype=torch.float64).quantile(share).item()


def summary(samples: Sequence[float]) -> dict[str, float]:
    """Give median, p10, p90 and number of the samples."""
    shares = {"median": 0.5, "p10": 0.1, "p90": 0.9}
    return {**{name: percentile(samples, share) for name, share in shares.items()}, "n": len(samples)}


def time_call(function: Callable[[int], object], round_: int, calls: int, device: str) -> float:
    """Give the seconds of one call, averaged over `calls`; on CUDA from idle to idle."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        function(round_)
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / calls


def peak_bytes(function: Callable[[int], object], device: str) -> int:
    """Give the most bytes that tensors hold at once during `function(0)`, beyond those held before it.

    CUDA: the caching allocator's `max_memory_allocated`. CPU: the running sum of the profiler's memory events, that is
    of every allocation and release by PyTorch's CPU allocator, temporaries inside kernels included; memory that oneDNN
    and MKL take for themselves is not in it.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function(0)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function(0)
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def cpu_info() -> dict[str, Any]:
    """Give the CPU's model, its number of cores and those of its features that matter here."""
    path = Path("/proc/cpuinfo")
    fields = [line.partition(":")[::2] for line in path.read_text().splitlines()] if path.exists() else []
    known = {name.strip(): value.strip() for name, value in reversed(fields)}  # of the first core
    flags = known.get("flags", known.get("Features", "")).split()
    return {
        "cpu": known.get("model name", platform.processor() or platform.machine()),
        "cores": os.cpu_count(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "flags": [flag for flag in CPU_FLAGS if flag in flags],
    }


def machine(device: str) -> dict[str, Any]:
    """Say on what and with what a row was measured."""
    gpu = {}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        gpu = {
            "gpu": properties.name,
            "gpu_capability": f"{properties.major}.{properties.minor}",
            "gpu_gib": round(properties.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        versions[package] = metadata.version(package) if importlib.util.find_spec(package) else None
    versions["torch"] = torch.__version__  # with the build's suffix
    return {"device": {"kind": device, **cpu_info(), **gpu}, "threads": torch.get_num_threads(), "versions": versions}


# What cannot change a number that is measured, and what a run writes itself.
NOT_MEASURED = (":!benchmarks/results", ":!docs", ":!tests", ":!*.md", ":!outputs")


def git_state() -> dict[str, Any]:
    """Give the commit, whether the code that is measured differs from it, and in which files; None without git.

    Files that git does not know count too, for they may be imported.
    """

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
        except FileNotFoundError:
            return None
        return done.stdout.rstrip() if done.returncode == 0 else None

    lines = git("status", "--porcelain", "--", ".", *NOT_MEASURED)
    changed = None if lines is None else sorted(line[3:] for line in lines.splitlines())
    commit = git("rev-parse", "--short", "HEAD")
    return {"commit": commit, "dirty": None if changed is None else bool(changed), "changed": changed}


class Bench:
    """A run of one script: sets the machine up, compares contenders, shows and records.

    Args:
        script: the script's name; rows go to `benchmarks/results/<script>.jsonl`.
        options: from a parser made by `arguments`.
        argv: the command line, for the rows.
    """

    def __init__(self, script: str, options: argparse.Namespace, argv: Sequence[str] | None = None):
        if options.device == "cuda" and not torch.cuda.is_available():
            raise SystemExit("--device cuda: torch finds no CUDA device here; use --device cpu")
        if options.plot and importlib.util.find_spec("matplotlib") is None:
            raise SystemExit(f"--plot needs matplotlib, which is not installed; {install_command('bench')}")
        if options.repeats < 1 or options.warmup < 1:
            raise SystemExit(f"--repeats {options.repeats} --warmup {options.warmup}: both must be at least 1")
        self.code = git_state()  # when the code is loaded: what is edited during the run is not what is measured
        if self.code["dirty"] and not (options.no_record or options.dirty or options.quick):
            raise SystemExit(
                f"results are recorded from a clean tree, and {', '.join(self.code['changed'])} differ from "
                f"{self.code['commit']}: commit them, or give --no-record (or --dirty, which names them in the rows)"
            )
        if options.threads or options.device == "cpu":
            torch.set_num_threads(options.threads or 2)
        torch.manual_seed(0)
        self.script, self.options, self.device = script, options, options.device
        self.command = shlex.join(["python", f"benchmarks/{script}.py", *(sys.argv[1:] if argv is None else argv)])
        self.rows: list[dict[str, Any]] = []
        self.results = RESULTS / f"{script}.jsonl"
        self.machine = machine(self.device)
        about = self.machine["device"]
        flags = " ".join(about["flags"])
        print(f"{self.script}: {about.get('gpu', about['cpu'])} ({flags}), {self.machine['threads']} threads")

    @property
    def rounds(self) -> int:
        """Timed rounds and warm-up rounds."""
        return self.options.repeats + self.options.warmup

    def wants(self, name: str) -> bool:
        """Say whether `--only` keeps the configuration of that name."""
        return not self.options.only or any(part in name for part in self.options.only)

    def compare(
        self,
        name: str,
        configuration: Mapping[str, Any],
        contenders: Sequence[Contender],
        *,
        work: Callable[[int], float] | None = None,
        unit: str = "tokens",
        memory: bool = False,
    ) -> dict[str, Any]:
        """Time the contenders in turn; print a table; append a row.

        Args:
            name: of the configuration, as `--only` takes it.
            configuration: what was run, for the row.
            contenders: ours (side "urform") and the peers.
            work: how much work (in `unit`) the given round's call does; gives rates.
            unit: of the work.
            memory: whether to measure each contender's peak memory too (one more call, untimed).

        Returns:
            The row, as it is recorded.
        """
        calls, errors = self._warm_up(contenders)
        alive = [contender for contender in contenders if contender.name in calls]
        samples = self._time_in_turn(alive, calls)
        rounds = max(map(len, samples.values()), default=0)
        amounts = [work(i) for i in range(rounds)] if work else None
        measured = {}
        for contender in alive:
            entry = measurement(contender, calls[contender.name], samples[contender.name], amounts)
            if memory:
                entry["peak_bytes"] = contender.held + peak_bytes(contender.run, self.device)
            measured[contender.name] = entry
        row = {
            "name": name,
            "configuration": dict(configuration),
            "unit": unit if work else None,
            "measured": measured,
            "errors": errors,
            "ratios": ratios(measured, samples),
            "quick": self.options.quick,
            **self.machine,
            **self.code,
            "date": time.strftime("%Y-%m-%dT%H:%M:%S"),
            "command": self.command,
        }
        print_table(row)
        self.rows.append(row)
        if not self.options.no_record:
            self.results.parent.mkdir(parents=True, exist_ok=True)
            with self.results.open("a") as file:
                file.write(json.dumps(row) + "\n")
        return row

    def _warm_up(self, contenders: Sequence[Contender]) -> tuple[dict[str, int], dict[str, str]]:
        """Run the warm-up rounds; give the calls of a sample by contender, and the errors of those that failed."""
        calls: dict[str, int] = {}
        errors: dict[str, str] = {}
        for contender in contenders:
            try:
                rounds = range(self.options.repeats, self.rounds)
                seconds = [time_call(contender.run, i, 1, self.device) for i in rounds]
            except (RuntimeError, ValueError, NotImplementedError, ImportError) as error:  # OutOfMemoryError is Runtime
                if contender.side == OURS:
                    raise
                errors[contender.name] = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"
                continue
            calls[contender.name] = min(max(1, round(SHORTEST_SAMPLE / max(seconds[-1], 1e-6))), 1000)
        return calls, errors

    def _time_in_turn(self, contenders: Sequence[Contender], calls: Mapping[str, int]) -> dict[str, list[float]]:
        """Time one sample of each contender per round, in an order that rotates; give the samples by contender."""
        samples: dict[str, list[float]] = {contender.name: [] for contender in contenders}
        start = time.perf_counter()
        for round_ in range(self.options.repeats):
            if round_ >= 3 and time.perf_counter() - start > self.options.seconds:
                break
            turn = round_ % max(len(contenders), 1)
            for contender in (*contenders[turn:], *contenders[:turn]):
                samples[contender.name].append(time_call(contender.run, round_, calls[contender.name], self.device))
        return samples

    def finish(self) -> list[dict[str, Any]]:
        """Draw what `--plot` asks for; complain when `--only` kept nothing."""
        if not self.rows:
            raise SystemExit(
                f"--only {' '.join(self.options.only or ())}: no configuration of this device has that name"
            )
        if self.options.plot:
            plot(self.rows, self.options.plot)
            print(f"drawn: {self.options.plot}")
        return self.rows


def measurement(
    contender: Contender, calls: int, seconds: Sequence[float], amounts: Sequence[float] | None
) -> dict[str, Any]:
    """Sum a contender's samples up; `amounts` is the work of each round, for rates."""
    entry: dict[str, Any] = {"side": contender.side, "group": contender.group}
    entry.update(calls=calls, seconds=summary(seconds))
    if amounts:
        rates = [amount / second for amount, second in zip(amounts, seconds, strict=True)]
        entry["rate"] = {**summary(rates), "overall": sum(amounts) / sum(seconds)}
    return entry


def ratios(measured: Mapping[str, Any], samples: Mapping[str, Sequence[float]]) -> list[dict[str, Any]]:
    """Compare our best variant with each peer's best, by group: speedup (above 1: ours is faster), share of memory."""
    best: dict[tuple[str, str], str] = {}
    for name, entry in measured.items():
        key = (entry["group"], entry["side"])
        if key not in best or entry["seconds"]["median"] < measured[best[key]]["seconds"]["median"]:
            best[key] = name
    found = []
    for (group, side), peer in best.items():
        ours = best.get((group, OURS))
        if side == OURS or ours is None:
            continue
        mine, theirs = samples[ours], samples[peer]
        speedup = summary([b / a for a, b in zip(mine, theirs, strict=True)])
        ratio = {"ours": ours, "peer": peer, "speedup": {**speedup, "overall": sum(theirs) / sum(mine)}}
        if "peak_bytes" in measured[ours]:
            ratio["memory"] = measured[ours]["peak_bytes"] / max(measured[peer]["peak_bytes"], 1)
        found.append(ratio)
    return found


def print_table(row: Mapping[str, Any]) -> None:
    """Show a row of results on the screen."""
    settings = ", ".join(f"{key} {value}" for key, value in row["configuration"].items())
    print(f"\n{row['name']}  ({settings})")
    rated = row["unit"] is not None
    with_memory = any("peak_bytes" in entry for entry in row["measured"].values())
    rows = [["", "ms", "p10", "p90", *([f"{row['unit']}/s"] if rated else []), *(["peak MiB"] if with_memory else [])]]
    for name, entry in row["measured"].items():
        cells = [name, *(f"{1000 * entry['seconds'][key]:.2f}" for key in ("median", "p10", "p90"))]
        cells += [f"{entry['rate']['overall']:,.0f}"] if rated else []
        rows.append([*cells, *([f"{entry['peak_bytes'] / 2**20:.1f}"] if with_memory else [])])
    for line in table(rows, right=range(1, len(rows[0]))):
        print(f"  {line}")
    for name, error in row["errors"].items():
        print(f"  {name}  failed: {error}")
    for ratio in row["ratios"]:
        speed = "{median:.2f}x as fast [{p10:.2f}, {p90:.2f}]".format(**ratio["speedup"])
        line = f"  {ratio['ours']} / {ratio['peer']}: {speed}"
        print(line + (f", {ratio['memory']:.3f} of its memory" if "memory" in ratio else ""), flush=True)


def plot(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the speedups over each peer, with the spread from p10 to p90, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    bars = [
        (f"{row['name']}: {ratio['ours']} / {ratio['peer']}", ratio["speedup"])
        for row in rows
        for ratio in row["ratios"]
    ]
    figure, axes = pyplot.subplots(figsize=(9, 1.2 + 0.35 * len(bars)), layout="constrained")
    medians = [speed["median"] for _, speed in bars]
    spread = [
        [max(speed["median"] - speed["p10"], 0) for _, speed in bars],
        [max(speed["p90"] - speed["median"], 0) for _, speed in bars],
    ]
    axes.barh([label for label, _ in bars], medians, xerr=spread, color="tab:blue", ecolor="black", capsize=3)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.set_xlabel("speedup (above 1: Urform is faster)")
    device = rows[0]["device"]
    axes.set_title(f"{device.get('gpu', device['cpu'])}, {rows[0]['threads']} threads, {rows[0]['commit']}")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
