"""Stages of a pipeline: each is a command that is shown, run, and not run again once it is done."""

import json
import os
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from potstill.console import say
from potstill.errors import PotstillError
from potstill.files import write_json


@dataclass(frozen=True)
class Stage:
    """One command.

    Attributes:
        name: of the record that says that it is done.
        title: what it does, for people.
        command: program and arguments.
        threads: threads of each of its processes; None leaves the choice to the program.
        log: where its output goes; None lets it through.
    """

    name: str
    title: str
    command: Sequence[str]
    threads: int | None = None
    log: Path | None = None

    @property
    def shown(self) -> str:
        """The command as one would type it in the environment."""
        words = ["python" if word == sys.executable else word for word in self.command]
        return shlex.join(words)


@dataclass
class Pipeline:
    """Runs stages and keeps their records.

    Attributes:
        folder: of the records, `NAME.json` with the command and its seconds.
    """

    folder: Path
    records: dict[str, dict[str, Any]] = field(default_factory=dict)

    def run(self, stage: Stage) -> None:
        """Run a stage, unless the same command is on record as done.

        Raises:
            PotstillError: the command failed.
        """
        self.records[stage.name] = self._done(stage)

    def run_together(self, stages: Sequence[Stage], workers: int) -> None:
        """Run stages that do not need each other, several at a time.

        Their records stand in the order of `stages`, whichever ends first.
        """
        with ThreadPoolExecutor(workers) as pool:
            for stage, record in zip(stages, pool.map(self._done, stages), strict=True):
                self.records[stage.name] = record

    def _done(self, stage: Stage) -> dict[str, Any]:
        """The record of a stage that has run, now or before."""
        record = self._record(stage)
        say(f"\n== {stage.title}\n$ {stage.shown}")
        if record is not None:
            say("(done already)")
            return record
        record = {"command": stage.shown, "seconds": _execute(stage)}
        write_json(self.folder / f"{stage.name}.json", record)
        say(f"({record['seconds']:.0f} s)")
        return record

    def _record(self, stage: Stage) -> dict[str, Any] | None:
        path = self.folder / f"{stage.name}.json"
        record = json.loads(path.read_text()) if path.exists() else None
        return record if record and record["command"] == stage.shown else None


def _execute(stage: Stage) -> float:
    """Seconds that the command took."""
    # The programs' folder comes first, so that `deepspeed` and ninja are this environment's.
    programs = Path(sys.executable).parent
    variables = {**os.environ, "PATH": f"{programs}{os.pathsep}{os.environ.get('PATH', '')}"}
    # The demo loads nothing from the model hub, and must not wait for one.
    variables |= {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    # One compiler at a time builds DeepSpeed's op, beside the ranks that wait for it: two more
    # would lift the demo's peak of memory over 4 GiB.
    variables["MAX_JOBS"] = "1"
    if stage.threads:
        variables["OMP_NUM_THREADS"] = str(stage.threads)
    command = list(stage.command)
    if command[0] == "deepspeed":  # the default port may be another run's
        command[1:1] = ["--master_port", str(free_port())]
    start = time.monotonic()
    if stage.log is None:
        status = subprocess.run(command, env=variables).returncode
    else:
        stage.log.parent.mkdir(parents=True, exist_ok=True)
        with open(stage.log, "wb") as log:
            done = subprocess.run(command, env=variables, stdout=log, stderr=log)
        status = done.returncode
    if status != 0:
        where = f"; its output is in {stage.log}" if stage.log else ""
        raise PotstillError(f"{stage.title}: the command ended with status {status}{where}")
    return time.monotonic() - start


def free_port() -> int:
    """A port that nothing listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
