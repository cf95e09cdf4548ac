"""Programs forked from one process: what all of them import is imported once.

python tests/forked.py JOBS.json     a list of jobs, done behind one another

A rank is told of the others as DeepSpeed's launcher does it, by its environment and `--local_rank`.
For tests in which neither the launcher nor the start of Python is the point: the launcher with two
ranks takes 24 seconds of the processor to import.
"""

import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

LATE_SECONDS = 60.0  # for which the others go on once a rank has failed
LIMIT = int(os.environ.get("POTSTILL_TEST_LIMIT", 600))  # seconds that all jobs may take


@dataclass(frozen=True)
class Job:
    """So many ranks of a program; with 0, one process that is told nothing of ranks."""

    program: str
    ranks: int
    arguments: list[str]


@dataclass(frozen=True)
class Ended:
    """The exit status of each rank, and what all of them printed."""

    statuses: list[int]
    output: str
    errors: str


def forked(
    folder: Path, jobs: list[Job], environment: dict[str, str], cwd: Path | None = None
) -> list[Ended]:
    """Do the jobs from a process of their own; how each ended.

    Args:
        folder: a new one, for what they print.
        cwd: where they are; `folder` without it.
    """
    folder.mkdir()
    (folder / "jobs.json").write_text(json.dumps([asdict(job) for job in jobs]))
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(
            [sys.executable, __file__, str(folder / "jobs.json")],
            cwd=cwd or folder,
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            status = process.wait(LIMIT)
        finally:
            with suppress(ProcessLookupError):  # of its ranks too, if it did not wait for them
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert status == 0, (folder / "log").read_text()[-5000:]
    found = []
    for number, statuses in enumerate(json.loads((folder / "statuses.json").read_text())):
        texts = ((folder / f"{number}.{kind}").read_text() for kind in ("out", "err"))
        found.append(Ended(statuses, *texts))
    return found


def main() -> None:
    """Import the programs, then fork the ranks of each job and wait for them."""
    path = Path(sys.argv[1])
    jobs = [Job(**job) for job in json.loads(path.read_text())]
    for program in dict.fromkeys(job.program for job in jobs):
        sys.path[0] = str(Path(program).parent)
        runpy.run_path(program, run_name="imported")
    statuses = [run(job, path.parent / str(number)) for number, job in enumerate(jobs)]
    (path.parent / "statuses.json").write_text(json.dumps(statuses))


def run(job: Job, place: Path) -> list[int]:
    """Fork the ranks of a job; their exit statuses."""
    common = {"WORLD_SIZE": job.ranks, "LOCAL_SIZE": job.ranks, "MASTER_PORT": free_port()}
    ranks = []
    sys.stdout.flush()
    for rank in range(max(1, job.ranks)):
        own = {"RANK": rank, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", **common}
        ranks.append(os.fork())
        if ranks[-1] == 0:
            told = {name: str(value) for name, value in own.items()} if job.ranks else {}
            os.environ.update(told)
            become(job, [f"--local_rank={rank}"] if job.ranks else [], place)
    return wait_for(ranks)


def free_port() -> int:
    """A port of this machine on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def become(job: Job, given: list[str], place: Path) -> None:
    """Run the program as this process's own, and end."""
    for number, kind in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{place}.{kind}", os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
    sys.path[0] = str(Path(job.program).parent)
    sys.argv = [job.program, *given, *job.arguments]
    runpy.run_path(job.program, run_name="__main__")
    sys.exit()


def wait_for(ranks: list[int]) -> list[int]:
    """The exit statuses of processes; what is left long after one failed is killed."""
    found: dict[int, int] = {}
    end = float("inf")
    while len(found) < len(ranks):
        for rank in ranks:
            if rank not in found and (ended := os.waitpid(rank, os.WNOHANG))[0]:
                found[rank] = os.waitstatus_to_exitcode(ended[1])
                end = min(end, time.monotonic() + LATE_SECONDS) if found[rank] else end
            elif rank not in found and time.monotonic() > end:
                os.kill(rank, signal.SIGKILL)
        time.sleep(0.02)
    return [found[rank] for rank in ranks]


if __name__ == "__main__":
    main()
