"""Freed memory stays with a process on a CPU: a second tensor's pages are not paid for again."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent

PAGES = """
import os, resource, sys
import torch
from pretrain.allocator import keep_freed_memory

if "keep" in sys.argv:
    keep_freed_memory()
for repeat in range(12):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    large = [torch.empty(40 * 2**20, dtype=torch.uint8).fill_(1) for _ in range(2)]
    del large
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(*words: str, **environment: str) -> int:
    """Page faults of the last of some equal allocations, in a process of its own."""
    own = {n: v for n, v in os.environ.items() if not n.startswith(("MALLOC_", "GLIBC_", "THP_"))}
    done = subprocess.run(
        [sys.executable, "-c", PAGES, *words],
        env={**own, **environment, "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    return int(done.stdout.split()[-1])


@pytest.mark.skipif(sys.platform != "linux", reason="it is glibc's allocator that is set")
class TestKeepFreedMemory:
    def test_large_tensors_find_the_memory_of_those_before_them(self) -> None:
        kept, given_back = faults("keep"), faults()
        assert kept < 100 < 10_000 < given_back

    def test_what_a_user_has_set_stays(self) -> None:
        own = {"MALLOC_MMAP_THRESHOLD_": "65536", "THP_MEM_ALLOC_ENABLE": "0"}
        assert faults("keep", **own) > 10_000
