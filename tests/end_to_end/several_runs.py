"""Several runs of pretrain/run.py behind one another, in one start of their ranks.

several_runs.py RUNS.json     a list of argument lists, and of shell commands to do between them

A list that begins with the word `cache_knowledge` is for that program. A run that fails is no end:
behind each, rank 0 prints `ended with STATUS` to both streams, and the worst of them is the status
of the start. A run that was told to leave is the last.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from torch import distributed as dist

from potstill.console import is_main_rank
from pretrain import cache_knowledge, run


def main() -> None:
    """Do the runs in order; the ranks stay together between them."""
    leave, dist.destroy_process_group = dist.destroy_process_group, lambda: None
    worst = 0
    for item in json.loads(Path(sys.argv[-1]).read_text()):
        if isinstance(item, str):
            do_alone(item)
            continue
        status = status_of(item)
        worst = max(worst, status)
        for stream in (sys.stdout, sys.stderr) if is_main_rank() else ():
            stream.write(f"\nended with {status}\n")  # at once: both ranks print to one file
            stream.flush()
        if status > 2:
            break
    dist.destroy_process_group = leave
    sys.exit(worst)


def do_alone(command: str) -> None:
    """Let rank 0 do a shell command, and the others wait for it."""
    if is_main_rank():
        subprocess.run(["sh", "-ec", command], check=True)
    dist.barrier()


def status_of(arguments: list[str]) -> int:
    """Do a run; the exit status that it would have had."""
    program: Callable[[], None] = run.main
    if arguments[0] == "cache_knowledge":
        program, arguments = cache_knowledge.main, arguments[1:]
    sys.argv = ["program", *arguments]
    try:
        program()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


if __name__ == "__main__":
    main()
