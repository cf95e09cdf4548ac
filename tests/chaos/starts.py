"""Starting the trainer as a user does, seeing its processes, and sending them signals.

All processes of a start share a process group of their own, so that what is left of it can be
found and ended, and a signal to it is what Ctrl-C on a terminal is.
"""

import os
import signal
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.forked import free_port
from tests.launch import PROGRAM, command

LAUNCH = "deepspeed.launcher.launch"  # launch.py, which `deepspeed` starts and which starts ranks
LOOK_SECONDS = 0.05
SHARED_MEMORY = Path("/dev/shm")
_running: set[int] = set()  # groups that nobody has ended yet


@dataclass(frozen=True)
class Started:
    """A start of the trainer.

    Attributes:
        processes: those that we started: the launcher alone, or every rank.
        group: their process group. launcher: whether `deepspeed` started the ranks.
        port: at which the ranks meet. log: everything they print.
    """

    processes: list[subprocess.Popen[bytes]]
    group: int
    launcher: bool
    port: str
    log: Path

    def ended(self) -> bool:
        """Whether all that we started has ended; cheap."""
        return all([process.poll() is not None for process in self.processes])

    def statuses(self) -> list[int | None]:
        """Exit statuses of what we started, negative after a signal, None while it runs."""
        return [process.poll() for process in self.processes]

    def alive(self) -> dict[int, int]:
        """Every process of the start that has not ended, with its parent."""
        self.ended()  # takes leave of our own children
        return members(self.group)

    def find(self, target: str, rank: int = 0) -> list[int]:
        """Processes by role: `rank` (this one), `ranks`, `launch.py`, `deepspeed`, `group`.

        Empty where there is none (yet, or any more).
        """
        live = self.alive()
        if target == "group":
            return list(live)
        if target == "deepspeed":
            return [self.group] if self.launcher and self.group in live else []
        launch = [pid for pid in live if LAUNCH in command_of(pid)]
        if target == "launch.py":
            return [pid for pid in launch if live[pid] == self.group]
        ranks = self._ranks(live, launch)
        wanted = range(len(ranks)) if target == "ranks" else [rank]
        return [ranks[number] for number in wanted if ranks.get(number) in live]

    def _ranks(self, live: Mapping[int, int], launch: list[int]) -> dict[int, int]:
        if not self.launcher:
            return {number: process.pid for number, process in enumerate(self.processes)}
        words = {pid: command_of(pid) for pid, parent in live.items() if parent in launch}
        flag = "--local_rank="
        return {
            int(word.removeprefix(flag)): pid
            for pid, line in words.items()
            for word in line
            if word.startswith(flag)
        }

    def send(self, number: signal.Signals, target: str, rank: int = 0) -> str:
        """Signal processes by role, or all of them where there is no such one; who it was."""
        pids = self.find(target, rank)
        for pid in pids or self.find("group"):
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue  # it ended meanwhile
        return target if pids else "group"

    def wait_ended(self, limit: float) -> float | None:
        """Seconds until every process has ended; None: some have not within the limit."""
        begin = time.monotonic()
        while self.alive():
            if time.monotonic() - begin > limit:
                return None
            time.sleep(LOOK_SECONDS)
        for process in self.processes:
            process.wait()  # it may have ended only when `alive` had asked it already
        return time.monotonic() - begin

    def end(self) -> None:
        """Kill whatever is left."""
        while self.alive():
            self.send(signal.SIGKILL, "group")
            time.sleep(LOOK_SECONDS)
        _running.discard(self.group)

    def remove_memory(self) -> int:
        """Remove the shared memory that DeepSpeed's ranks left behind; how many pieces it was.

        A rank takes the name off its piece as soon as all have met; one killed before cannot.
        """
        pieces = list(SHARED_MEMORY.glob(f"deepspeed_allreduce_buffer_*_{self.port}_*"))
        for piece in pieces:
            piece.unlink()
        return len(pieces)

    def tail(self, characters: int = 600) -> str:
        """The end of what was printed, in one line."""
        return " ".join(self.log.read_text(errors="replace").split())[-characters:]


def end_all() -> None:
    """Kill every start that is still there."""
    for group in tuple(_running):
        for pid in members(group):
            os.kill(pid, signal.SIGKILL)


def members(group: int) -> dict[int, int]:
    """The living processes of a group, with the parent of each."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent, own_group = path.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue  # it ended meanwhile
        if int(own_group) == group and state not in "ZX":
            found[int(path.parent.name)] = int(parent)
    return found


def command_of(pid: int) -> list[str]:
    """A process's command line; empty once it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []


def start_run(
    arguments: list[str],
    ranks: int,
    launcher: bool,
    environment: Mapping[str, str],
    log: Path,
    program: Path = PROGRAM,
) -> Started:
    """Start the trainer on so many ranks, by DeepSpeed's launcher or each rank by itself."""
    words = [*command(ranks if launcher else None, program), *arguments]
    if launcher:
        environments, port = [dict(environment)], words[words.index("--master_port") + 1]
    else:
        port = str(free_port())
        environments = [{**environment, **own} for own in rank_environments(ranks, port)]
    processes: list[subprocess.Popen[bytes]] = []
    with open(log, "wb") as printed:
        for own in environments:
            process = subprocess.Popen(
                words,
                env=own,
                cwd=log.parent,
                stdin=subprocess.DEVNULL,
                stdout=printed,
                stderr=subprocess.STDOUT,
                process_group=processes[0].pid if processes else 0,
            )
            processes.append(process)
            _running.add(processes[0].pid)
    return Started(processes, processes[0].pid, launcher, port, log)


def rank_environments(ranks: int, port: str) -> list[dict[str, str]]:
    """What a cluster's own starter sets for each rank; a lone one is told no more than a port."""
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    if ranks == 1:
        return [meeting]
    common = {"WORLD_SIZE": str(ranks), **meeting}
    return [{**common, "RANK": str(n), "LOCAL_RANK": str(n)} for n in range(ranks)]
