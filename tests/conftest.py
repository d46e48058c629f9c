"""One environment for all tests: offline, one thread, a cache of their own, a fixed seed."""

import os
import tempfile
from collections.abc import Iterator
from typing import Any

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


@pytest.fixture(scope="session")
def _world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from hub_client import open_world

    with open_world(tmp_path_factory.mktemp("hub")) as world:
        yield world


@pytest.fixture
def world(_world: Any) -> Any:
    """A Hub on loopback and its clients, see `hub_client.open_world`; without the trouble of the test before."""
    _world.hub.trouble.clear()
    _world.hub.requests.clear()
    return _world


@pytest.fixture(autouse=True)
def seed() -> Iterator[int]:
    """Seed Python, NumPy and torch before every test."""
    import random

    import numpy

    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)
    yield 0
