"""A block that was freed is used again without new pages; in a process of its own, which the setting belongs to."""

import subprocess
import sys
from pathlib import Path

import pytest

FAULTS = """
import resource
import torch
from runtime.allocator import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(1 << 22)  # 16 MB, 4096 pages
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(keep_freed_memory())
faults()
print(faults())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_freed_memory_is_used_again_without_a_page_fault():
    root = Path(__file__).parents[2]
    run = subprocess.run([sys.executable, "-c", FAULTS], cwd=root, capture_output=True, text=True, check=True)
    kept, faults = run.stdout.split()
    if kept == "False":
        pytest.skip("another C library")
    assert int(faults) < 4096  # the pages of one block of the twenty
