"""Where a run runs: ranks and devices, versions, hardware, commit."""

import os
import platform
import re
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from potstill.secrets import redacted_command

PACKAGES = (
    *("torch", "deepspeed", "transformers", "tokenizers", "datasets", "h5py", "numpy"),
    *("accelerate", "scikit-learn", "scipy", "apex", "torchao", "triton"),
)


def single_rank_defaults() -> None:
    """What the launcher would set, for a start without it: one rank on a free port."""
    if "RANK" in os.environ:
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", str(port))


def git_commit() -> str | None:
    """The commit of this code, with "+changes" if the tree differs; None outside a checkout."""
    folder = Path(__file__).parent
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        return commit + ("+changes" if _git(folder, "status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    return subprocess.run(
        ["git", "-C", str(folder), *arguments], check=True, capture_output=True, text=True
    ).stdout.strip()


def describe_environment(world_size: int) -> dict[str, Any]:
    """Versions, hardware, commit and command (without secrets), for environment.json."""
    versions = {name: _version(name) for name in PACKAGES}
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "command": redacted_command(sys.argv),
        "commit": git_commit(),
        "python": platform.python_version(),
        "packages": {name: version for name, version in versions.items() if version},
        "platform": platform.platform(),
        "machine": platform.node(),
        "cpu": _cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpus": os.cpu_count(),
        "threads_per_rank": torch.get_num_threads(),
        "gpu": gpu,
        "ranks": world_size,
    }


def lacks_bf16() -> bool:
    """True on a CPU without bf16 instructions, where bf16 products are emulated."""
    try:
        information = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False  # not Linux: nothing is known
    return not re.search(r"\b(avx512_bf16|amx_bf16|bf16)\b", information)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if "model name" in line), "unknown")
