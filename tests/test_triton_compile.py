"""Every Triton kernel is compiled ahead of time for four chips, on a machine without any of them.

A subprocess puts a stand-in for the GPU driver into Triton and calls the host code of the backend on CPU tensors: what
is compiled is exactly what a GPU would be asked to launch, types, alignments and launch configuration included, and
nothing runs. (A subprocess, because other tests need `TRITON_INTERPRET=1`, which is read when kernels are decorated.)
The cache is a fresh directory: no stale result hides a failure.

Checked: machine code is made, shared memory fits the chip, tensor cores are used by every kernel that multiplies
matrices (not float32 on NVIDIA: its products are IEEE, for which there are none), and no length leads to a second
compile.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

#: name -> backend, architecture, threads per warp, bytes of shared memory that a block may use
CHIPS: dict[str, tuple[str, int | str, int, int]] = {
    "sm80": ("cuda", 80, 32, 163 * 1024),
    "sm90": ("cuda", 90, 32, 227 * 1024),
    "sm100": ("cuda", 100, 32, 227 * 1024),
    "gfx942": ("hip", "gfx942", 64, 64 * 1024),
}
TENSOR_CORES = {"ptx": r"mma\.sync|wgmma\.mma_async|tcgen05\.mma", "amdgcn": r"v_mfma"}

Case = dict[str, Any]


# What is compiled ----------------------------------------------------------------------------------------------------


def decode_cases(full: bool) -> Iterator[Case]:
    """Calls of `decode_attention`: dtype x head dims x rows of a tile, with few and with all features."""
    few = {"causal": True}
    cached = {"causal": True, "window": (512, None), "bias": "dense", "cache": True}
    all_ = {"causal": True, "window": (512, 0), "bias": "lut", "softcap": 30.0}
    dims = ((16, 16), (40, 40), (64, 64), (72, 72), (128, 128), (192, 128), (256, 256))
    if full:
        for dtype, dim, max_q in itertools.product(("float16", "bfloat16", "float32"), dims, (1, 4, 16)):
            for features in (few, cached, all_, {"bias": "alibi"}):
                yield {"host": "decode", "dtype": dtype, "dims": dim, "max_q": max_q, **features}
    else:
        yield {"host": "decode", "dtype": "bfloat16", "dims": (128, 128), "max_q": 1, **cached}
        yield {"host": "decode", "dtype": "float16", "dims": (256, 256), "max_q": 16, **all_}


def run_decode(case: Case, length: int = 1000) -> None:
    """Call the host code once: two sequences, eight query heads for two key/value heads."""
    import torch

    from urform.modeling.kernels.attention_triton_decode import decode_attention

    dtype, (dim, v_dim), max_q = getattr(torch, case["dtype"]), case["dims"], case["max_q"]
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
        lut=torch.zeros(8, 257) if kind == "lut" else None,
        dense=torch.zeros(1, 8, max_q, length + 9, dtype=dtype) if kind == "dense" else None,
        softcap=case.get("softcap"), scale=dim**-0.5,
    )  # fmt: skip


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


RUN = {"decode": run_decode}


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
        ieee = backend == "cuda" and report["case"]["dtype"] == "float32"
        if kernel["multiplies"] and not ieee and not kernel["tensor_cores"]:
            wrong.append(f"{kernel['name']}: no tensor-core instruction")
    return wrong if report["kernels"] else ["nothing was compiled"]


if __name__ == "__main__":
    _worker()
