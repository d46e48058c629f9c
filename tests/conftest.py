"""One environment for all tests: offline, one thread, a cache of their own, a fixed seed."""

import os
import tempfile
from collections.abc import Iterator

# Read by huggingface_hub, transformers and torch when they are imported: set before anything imports them.
_HOME = tempfile.TemporaryDirectory(prefix="urform-tests-", ignore_cleanup_errors=True)
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    HF_HOME=_HOME.name,
    HF_MODULES_CACHE=f"{_HOME.name}/modules",
    TOKENIZERS_PARALLELISM="false",
    OMP_NUM_THREADS="1",
)
os.environ.pop("HF_TOKEN", None)

import pytest  # noqa: E402
import torch  # noqa: E402

if not torch.accelerator.is_available():  # read when Triton kernels are decorated: they run in its interpreter
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu = [item for item in items if "gpu" in item.keywords]
    if gpu and not torch.accelerator.is_available():
        for item in gpu:
            item.add_marker(pytest.mark.skip(reason="needs an accelerator; torch finds none on this machine"))


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed() -> Iterator[int]:
    """Seed Python, NumPy and torch before every test."""
    import random

    import numpy

    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)
    yield 0
