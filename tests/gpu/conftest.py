"""Tests on a GPU: `make test-gpu`. Each takes the device as a fixture, which is never skipped.

LFM_GPU_TEST_DEVICE=cpu runs the same tests on a CPU, to check the tests themselves.
"""

import os
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
REPORT = pytest.StashKey[list[str]]()

# cuBLAS reads this when it is first used; with it, products are deterministic.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="session")
def device():
    """The GPU. Without one, the whole run fails."""
    name = os.environ.get("LFM_GPU_TEST_DEVICE", "cuda")
    found = torch.device(name)
    if found.type == "cuda" and not torch.cuda.is_available():
        pytest.exit(
            f"make test-gpu needs a GPU, but torch {torch.__version__} finds none (built for CUDA {torch.version.cuda}). "
            "LFM_GPU_TEST_DEVICE=cpu runs the same tests on the CPU",
            returncode=2,
        )
    if found.type == "cuda" and found.index is None:
        found = torch.device("cuda", torch.cuda.current_device())
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    return found


@pytest.fixture(scope="session")
def on_gpu(device):
    """Whether the device is a GPU, whose speed, memory and waiting can be checked."""
    return device.type == "cuda"


@pytest.fixture
def report(request, device):
    """`report(text)` adds a line to the end of the run."""
    from benchmarks._gpu_timing import describe  # here, because every test run reads this file

    return request.config.stash.setdefault(REPORT, [f"on {describe(device)}"]).append


def pytest_terminal_summary(terminalreporter, config):
    if lines := config.stash.get(REPORT, []):
        terminalreporter.section("measured")
        for line in lines:
            terminalreporter.write_line(line)
