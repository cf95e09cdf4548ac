"""How long a command takes, and how much memory it holds at most, over all its processes.

    python benchmarks/peak_memory.py make demo

Memory is the proportional set size: a page that several processes share counts once. Sampled twice
a second, so a shorter peak may be missed. Without a command it measures the demo, in a new folder.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import psutil

INTERVAL = 0.5  # seconds


@dataclass(frozen=True)
class Measured:
    """What a command took; `peak_gib` is the largest sum of the processes' PSS."""

    command: Sequence[str]
    status: int
    seconds: float
    peak_gib: float
    processes_at_peak: int


def measure(command: Sequence[str]) -> Measured:
    """Run a command to its end and sample it and all its descendants."""
    start, peak, processes = time.monotonic(), 0, 0
    child = subprocess.Popen(command)
    while child.poll() is None:
        sizes = proportional_sizes(psutil.Process(child.pid))
        if sum(sizes) > peak:
            peak, processes = sum(sizes), len(sizes)
        time.sleep(INTERVAL)
    seconds = time.monotonic() - start
    return Measured(list(command), child.returncode, seconds, peak / 2**30, processes)


def proportional_sizes(root: psutil.Process) -> list[int]:
    """Bytes of each process of a tree; those that end meanwhile are left out."""
    sizes = []
    try:
        tree = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []
    for process in tree:
        try:
            sizes.append(process.memory_full_info().pss)
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
    return sizes


def main() -> None:
    command = sys.argv[1:]
    if not command:
        command = [sys.executable, "-m", "examples.demo", "--output", tempfile.mkdtemp()]
    measured = measure(command)
    print(json.dumps(asdict(measured)))
    sys.exit(measured.status)


if __name__ == "__main__":
    main()
