"""Every Triton kernel is compiled ahead of time for four chips, on a machine without any of them.

A subprocess puts a stand-in for the GPU driver into Triton and calls the host code of the backend on CPU tensors: what
is compiled is exactly what a GPU would be asked to launch, types, alignments and launch configuration included, and
nothing runs. (A subprocess, because other tests need `TRITON_INTERPRET=1`, which is read when kernels are decorated.)
The cache is a fresh directory: no stale result hides a failure.

Checked: machine code is made, shared memory (and sm100's tensor memory) fits the chip, tensor cores are used by every
kernel that multiplies matrices (not float32 on NVIDIA: its products are IEEE, for which there are none), and no length
leads to a second compile. Registers that spill are reported, not refused.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="there is nothing to compile without the package triton")

#: name -> backend, architecture, threads per warp, bytes of shared memory that a block may use
CHIPS: dict[str, tuple[str, int | str, int, int]] = {
    "sm80": ("cuda", 80, 32, 163 * 1024),
    "sm90": ("cuda", 90, 32, 227 * 1024),
    "sm100": ("cuda", 100, 32, 227 * 1024),
    "gfx942": ("hip", "gfx942", 64, 64 * 1024),
}
TENSOR_MEMORY = 512  #: columns that a block may use on sm100
TENSOR_CORES = {"ptx": r"mma\.sync|wgmma\.mma_async|tcgen05\.mma", "amdgcn": r"v_mfma"}

Case = dict[str, Any]


# What is compiled ----------------------------------------------------------------------------------------------------


FEW: Case = {"causal": True}
EVERYTHING: Case = {"causal": True, "window": (512, None), "bias": "table", "softcap": 30.0, "dropout": 0.1}
DTYPES = ("float16", "bfloat16", "float32")
#: head dims at the borders of the launch table, and between them (of v, where it differs)
BORDERS = ((64, 64), (128, 128), (256, 256))
BETWEEN = ((16, 16), (40, 40), (80, 80), (192, 128), (64, 256), (200, 200))

#: what every test run compiles: each kernel once, and the head dims that need the most shared memory
USUAL: tuple[Case, ...] = (
    {"host": "attention", "dtype": "bfloat16", "dims": (128, 128), **EVERYTHING},
    {"host": "attention", "dtype": "float16", "dims": (256, 256)},
    {"host": "decode", "dtype": "bfloat16", "dims": (128, 128), "bias": "dense", "cache": True, **FEW},
    {"host": "decode", "dtype": "float16", "dims": (256, 256), "max_q": 16, **EVERYTHING},
)


def pairwise_features() -> Iterator[Case]:
    """Eight combinations in which every pair of values of any two features occurs (orthogonal array L8, 4 x 2^4)."""
    for bias, half in itertools.product(range(4), range(2)):
        low, high = bias & 1, bias >> 1
        causal, dropout, softcap, window = half, half ^ low, half ^ high, half ^ low ^ high
        yield {
            "bias": (None, "alibi", "table", "dense")[bias],
            "causal": bool(causal),
            "dropout": 0.1 * dropout,
            "softcap": 30.0 * softcap,
            "window": (512, 0) if window else None,
        }


def matrix(host: str, dtype: str, dims: tuple[int, int]) -> list[Case]:
    """Give every case of a dtype and head dims: all features where a launch configuration ends, else few and most."""
    case: Case = {"host": host, "dtype": dtype, "dims": dims}
    features = list(pairwise_features()) if dims in BORDERS else [FEW, EVERYTHING]
    if host == "attention":
        return [{**case, **some} for some in features]
    sizes = [{"max_q": 1, "cache": True}, {"max_q": 4, "cache": True, "holes": True}, {"max_q": 16}]
    return [{**case, **some, **size} for some, size in zip(features * 3, itertools.cycle(sizes), strict=False)]


def run_decode(case: Case, length: int = 1000) -> None:
    """Call the host code once: two sequences, eight query heads for two key/value heads."""
    import torch

    from urform.modeling.kernels.triton.attention_triton_decode import decode_attention

    dtype, (dim, v_dim), max_q = getattr(torch, case["dtype"]), case["dims"], case.get("max_q", 1)
    kind = case.get("bias")
    q = torch.zeros(2 * max_q, 8, dim, dtype=dtype)
    cu_q = torch.tensor([0, max_q, 2 * max_q], dtype=torch.int32)
    if case.get("cache"):
        k, v = (torch.zeros(2, 2, length + 9, d, dtype=dtype).transpose(1, 2) for d in (dim, v_dim))
        cu_k = torch.tensor([[9, 9], [length, length + 9]])
    else:
        k, v = (torch.zeros(2 * length + 1, 2, d, dtype=dtype) for d in (dim, v_dim))
        cu_k = torch.tensor([0, length, 2 * length + 1], dtype=torch.int32)
    decode_attention(
        q, k, v, cu_q, cu_k, max_q, length + 1, causal=case.get("causal", False), window=case.get("window"),
        slopes=torch.zeros(8) if kind == "alibi" else None,
        lut=torch.zeros(8, 257) if kind == "table" else None,
        dense=torch.zeros(1, 8, max_q, length + 9, dtype=dtype) if kind == "dense" else None,
        softcap=case.get("softcap") or None, scale=dim**-0.5,
        map_k=torch.zeros(2, length + 9, dtype=torch.int64) if case.get("holes") else None,
    )  # fmt: skip


def run_attention(case: Case, length: int = 1000) -> None:
    """Run the backend forward and backward once: two sequences, eight query heads for two key/value heads."""
    import torch

    from urform import ALiBi, DenseBias, Layout, RelativeBias
    from urform.modeling.kernels.attention_settings import AttentionSettings
    from urform.modeling.kernels.triton import attention_triton

    attention_triton._check_served = lambda q, v: None  # these CPU tensors stand for a GPU's
    dtype, (dim, v_dim) = getattr(torch, case["dtype"]), case["dims"]
    q_layout, kv_layout = (
        Layout.packed(torch.tensor([0, size, 2 * size + 1]), size + 1) for size in (length, length + 4)
    )
    q = torch.zeros(2 * length + 1, 8, dim, dtype=dtype, requires_grad=True)
    k, v = (torch.zeros(2 * length + 9, 2, d, dtype=dtype, requires_grad=True) for d in (dim, v_dim))
    bias = {
        "alibi": lambda: ALiBi(torch.zeros(8, requires_grad=True)),
        "table": lambda: RelativeBias(torch.zeros(8, 257, requires_grad=True)),
        "dense": lambda: DenseBias(torch.zeros(1, 8, length + 1, length + 5, dtype=dtype, requires_grad=True)),
    }.get(str(case.get("bias")), lambda: None)()
    dropout = case.get("dropout", 0.0)
    settings = AttentionSettings(
        case.get("causal", False), case.get("window"), bias, case.get("softcap") or None, dim**-0.5, dropout,
        1 if dropout else None,
    )  # fmt: skip
    out, _lse = attention_triton.triton_attention(q, k, v, q_layout, kv_layout, settings)
    out.backward(torch.zeros_like(out))


# In the subprocess ---------------------------------------------------------------------------------------------------


class _Machine:
    """What Triton asks of a GPU driver in order to compile: which chip. Each chip is a device of its own."""

    def __init__(self) -> None:
        self.chip = next(iter(CHIPS))

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget(*CHIPS[self.chip][:3])

    def get_current_device(self) -> int:
        return list(CHIPS).index(self.chip)

    def get_current_stream(self, device: int) -> int:
        return 0


def _worker() -> None:
    """Read jobs `{"chip", "case", "lengths"}` as JSON lines from stdin, print a JSON line per job."""
    import triton
    from triton.runtime.jit import JITFunction

    machine = _Machine()
    triton.runtime.driver.set_active(machine)
    launched: list[Any] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        launched.append(kernel)
        return kernel

    JITFunction.run = compile_only  # type: ignore[method-assign]
    for line in sys.stdin:
        job = json.loads(line)
        machine.chip = job["chip"]
        launched.clear()
        start = time.perf_counter()
        report: dict[str, Any] = {**job, "kernels": []}
        try:
            for length in job["lengths"]:
                RUN[job["case"]["host"]](job["case"], length)
            distinct = list({id(kernel): kernel for kernel in launched}.values())
            report["kernels"] = [_describe(kernel) for kernel in distinct]
        except Exception as error:
            report["error"] = f"{type(error).__name__}: {error}"[-2000:]
        report["seconds"] = round(time.perf_counter() - start, 2)
        print(json.dumps(report), flush=True)


RUN = {"decode": run_decode, "attention": run_attention}


def _describe(kernel: Any) -> dict[str, Any]:
    """Say what came out of a compile."""
    asm = kernel.asm
    text = next((name for name in TENSOR_CORES if name in asm), "none")
    binary = next((name for name in ("cubin", "hsaco") if name in asm), "none")
    found = re.findall(TENSOR_CORES[text], asm[text]) if text in asm else []
    return {
        "name": kernel.metadata.name,
        "text": text,
        "binary": binary,
        "bytes": len(asm[binary]) if binary in asm else 0,
        "shared": kernel.metadata.shared,
        "tensor_memory": getattr(kernel.metadata, "tmem_size", None) or 0,
        "multiplies": "tt.dot" in asm["ttir"],
        "tensor_cores": sorted(set(found)),
        "spilled": _spilled(asm, text),
    }


def _spilled(asm: Any, text: str) -> int:
    """Bytes of stack per thread (NVIDIA), or registers spilled (AMD)."""
    if text == "amdgcn":
        return max((int(count) for count in re.findall(r"\.vgpr_spill_count:\s*(\d+)", asm[text])), default=0)
    import triton.backends.nvidia

    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    if not tool.exists():
        return -1
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True).stdout
    return max((int(count) for count in re.findall(r"STACK:(\d+)", usage)), default=-1)


# Tests ---------------------------------------------------------------------------------------------------------------


def compile_all(jobs: list[Case], cache: Path, python_path: str = "") -> list[dict[str, Any]]:
    """Compile in a subprocess without TRITON_INTERPRET; one report per job."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    environment["TRITON_CACHE_DIR"] = str(cache)
    process = subprocess.run(
        [sys.executable, __file__], input="\n".join(map(json.dumps, jobs)), capture_output=True, text=True,
        env=environment,
    )  # fmt: skip
    reports = [json.loads(line) for line in process.stdout.splitlines() if line.startswith("{")]
    if process.returncode != 0 or len(reports) != len(jobs):
        raise RuntimeError(f"{len(reports)} of {len(jobs)} jobs, exit status {process.returncode}: {process.stderr}")
    return reports


def check(report: dict[str, Any]) -> list[str]:
    """Give what is wrong with a compiled case."""
    if "error" in report:
        return [report["error"]]
    backend, _arch, _warp, limit = CHIPS[report["chip"]]
    wrong = []
    for kernel in report["kernels"]:
        if kernel["bytes"] == 0 or kernel["binary"] != {"cuda": "cubin", "hip": "hsaco"}[backend]:
            wrong.append(f"{kernel['name']}: no machine code")
        if kernel["shared"] > limit:
            wrong.append(f"{kernel['name']}: {kernel['shared']} bytes of shared memory, the chip has {limit}")
        if kernel["tensor_memory"] > TENSOR_MEMORY:  # the kernel is made into a single trap
            wrong.append(f"{kernel['name']}: {kernel['tensor_memory']} columns of tensor memory")
        ieee = backend == "cuda" and report["case"]["dtype"] == "float32"
        if kernel["multiplies"] and not ieee and not kernel["tensor_cores"]:
            wrong.append(f"{kernel['name']}: no tensor-core instruction")
    return wrong if report["kernels"] else ["nothing was compiled"]


def assert_compiles(chips: Sequence[str], cases: Sequence[Case], cache: Path) -> None:
    """Compile, print what was found (`pytest -s` shows it), and fail with everything that is wrong."""
    jobs = [{"chip": chip, "case": case, "lengths": [1000]} for chip in chips for case in cases]
    reports = compile_all(jobs, cache)
    print(*summary(reports), sep="\n")
    wrong = [f"{report['chip']} {report['case']}: {message}" for report in reports for message in check(report)]
    assert not wrong, "\n".join(wrong)


def summary(reports: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Give a line for each chip."""
    for chip in CHIPS:
        kernels = [kernel for report in reports if report["chip"] == chip for kernel in report["kernels"]]
        if kernels:
            yield (
                f"{chip}: {len(kernels)} kernels, {max(kernel['shared'] for kernel in kernels)} bytes of shared memory "
                f"at most, {sum(kernel['spilled'] > 0 for kernel in kernels)} of them spill "
                f"(at most {max(kernel['spilled'] for kernel in kernels)})"
            )


@pytest.mark.timeout(900)
def test_every_kernel_compiles(tmp_path: Path) -> None:
    """Each kernel on each chip; one subprocess, whose imports cost as much as a chip's compiles."""
    assert_compiles(list(CHIPS), USUAL, tmp_path)


def test_matrix_has_the_borders_of_the_launch_table() -> None:
    from urform.modeling.kernels.triton.attention_triton import LAUNCHES

    limits = {limit for family in LAUNCHES.values() for by_width in family.values() for limit in by_width}
    assert limits == {dim for dim, _v_dim in BORDERS}
    assert set(CHIPS) - set(LAUNCHES) == {"gfx942"}  # "other" is made for it


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("dims", BORDERS + BETWEEN, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("host", ["attention", "decode"])
@pytest.mark.parametrize("chip", CHIPS)
def test_matrix_compiles(chip: str, host: str, dtype: str, dims: tuple[int, int], tmp_path: Path) -> None:
    """Every launch configuration: dtypes x head dims x pairs of features."""
    assert_compiles([chip], matrix(host, dtype, dims), tmp_path)


@pytest.mark.timeout(600)
def test_one_compile_serves_all_lengths(tmp_path: Path) -> None:
    """Fifty lengths, divisible by 16 and not, windows and tables of other sizes: each kernel is compiled once."""
    case: Case = {"dtype": "float16", "dims": (40, 40), **FEW, "bias": "table"}
    lengths = [1, 2, 16, 17, *range(200, 1350, 25)]
    jobs = [
        {"chip": "sm80", "case": {"host": "attention", **case}, "lengths": lengths},
        {"chip": "sm80", "case": {"host": "decode", **case}, "lengths": lengths[4:]},  # shorter ones are not split
    ]
    for report, expected in zip(compile_all(jobs, tmp_path), (5, 2), strict=True):
        assert not check(report)
        names = [kernel["name"] for kernel in report["kernels"]]
        assert len(names) == len(set(names)) == expected, names


if __name__ == "__main__":
    _worker()
