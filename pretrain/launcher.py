"""The processes above a rank: whether what started it still lives."""

import os
from pathlib import Path
from typing import NamedTuple

LAUNCHED = ("CROSS_RANK", "TORCHELASTIC_RUN_ID")
"""Variables that tell a rank that DeepSpeed's launcher, or torchrun, started it."""


class Process(NamedTuple):
    """What the system says of a process; `started` tells it from a later one of the same id."""

    parent: int
    session: int
    started: str


def look(pid: int) -> Process | None:
    """A process of this host; None if it is gone, or dead and only waited for."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text.rpartition(")")[2].split()  # behind the program's name, which may be anything
    return None if fields[0] in "ZX" else Process(int(fields[1]), int(fields[3]), fields[19])


class Launcher:
    """What started this rank, if a launcher did; made early, while it most likely still lives.

    DeepSpeed has two processes above its ranks: `deepspeed`, the runner, and below it `launch`. If
    the runner is killed, the launcher goes on, and so would the ranks, though nobody waits for them
    any more. A shell that ends is no reason to stop: that is what nohup is for.
    """

    def __init__(self) -> None:
        self._watched: dict[int, int] = {}  # process: its parent
        self._orphaned = False
        if any(name in os.environ for name in LAUNCHED):
            self._watch(os.getpid())
            launch = os.getppid()
            if _is_launch(launch) and (_is_runner(_parent(launch)) or _is_orphan(launch)):
                self._watch(launch)

    def _watch(self, pid: int) -> None:
        self._watched[pid] = _parent(pid)
        self._orphaned |= _is_orphan(pid)

    def is_gone(self) -> bool:
        """Whether one of the processes above ended, so that another one adopted what it left."""
        changed = (_parent(pid) != parent for pid, parent in self._watched.items())
        return self._orphaned or any(changed)


def _parent(pid: int) -> int:
    process = look(pid)
    return process.parent if process else 0


def _is_orphan(pid: int) -> bool:
    """Whether a process was adopted, by init or the like, which is of another session."""
    process = look(pid)
    parent = process and look(process.parent)
    if process is None or parent is None:
        return False
    return parent.session != process.session != pid


def _words(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")[:5]
    except OSError:
        return []


def _is_launch(pid: int) -> bool:
    return any(w.endswith(("deepspeed.launcher.launch", "launcher/launch.py")) for w in _words(pid))


def _is_runner(pid: int) -> bool:
    ends = ("/deepspeed", "/ds", "deepspeed.launcher.runner", "launcher/runner.py")
    return any(word.endswith(ends) for word in _words(pid)[:4])
