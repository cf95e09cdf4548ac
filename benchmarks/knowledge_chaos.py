"""Storing knowledge, killed over and over: are all files, in the end, those of an unbroken run?

    python benchmarks/knowledge_chaos.py --output runs/knowledge-chaos --kills 20

Knowledge of the real teacher is stored once in peace, then in other folders where SIGKILL comes at
a random moment: to all ranks, or to one of them, whose launcher then ends the others. The ranks of
each start are one, two, or now this and now that. A folder that is finished before the last kill is
compared, and the next one begun. The same command again goes on with the cases that are not done.
The exit status is 1 where other bytes were found, or a finished file was written again.
Ranks are forked from this process, so that a start takes no import, and kills fall on the work.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
import torch
from common import DATA, RESULTS, machine, packaged_teacher, shard, write_report
from scaling import free_port

from potstill.console import program
from potstill.files import write_json
from pretrain import cache_knowledge

CASES = {"1 rank": (1,), "2 ranks": (2,), "1 or 2 ranks": (1, 2)}
ARTICLES, FILE_ROWS, MICRO_BATCH = 3, 8, 8
END_SECONDS = 60.0  # that a launcher leaves ranks to end after one of them is gone


def rows(output: Path) -> Path:
    """Shards of a few real articles."""
    output.mkdir(parents=True, exist_ok=True)
    few = output / "few.parquet"
    if not few.exists():
        articles = sorted((DATA / "corpus").glob("wiki-*.parquet"))[0]
        parquet.write_table(parquet.read_table(articles).slice(0, ARTICLES), few)
    return shard(few, packaged_teacher(), output / "shards")


@dataclass
class Start:
    """One start of the program: its ranks, forked from this process."""

    command: Sequence[str]
    ranks: int
    log: Path
    alive: dict[int, int] = field(default_factory=dict)
    statuses: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        port = free_port()
        for rank in range(self.ranks):
            process = os.fork()
            if process == 0:
                self._become(rank, port)
            self.alive[process] = rank

    def _become(self, rank: int, port: int) -> None:
        """Be a rank, and end."""
        own: dict[str, object] = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": self.ranks,
            "MASTER_PORT": port,
        }
        own |= {"LOCAL_SIZE": self.ranks, "MASTER_ADDR": "127.0.0.1", "HF_HUB_OFFLINE": 1}
        os.environ.update({name: str(value) for name, value in own.items()})
        words = os.open(self.log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(words, 1)
        os.dup2(words, 2)
        status = 1
        try:
            cache_knowledge.main([*self.command, f"--local_rank={rank}"])
            status = 0
        except SystemExit as stop:
            status = int(stop.code or 0)
        except Exception:  # a rank whose neighbour was killed
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)

    def poll(self) -> bool:
        """Whether all ranks have ended."""
        for process in list(self.alive):
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended:
                del self.alive[process]
                self.statuses.append(os.waitstatus_to_exitcode(status))
        return not self.alive

    def wait(self, seconds: float = float("inf")) -> bool:
        """Wait so long at most; whether all ranks have ended."""
        end = time.monotonic() + seconds
        while not self.poll():
            if time.monotonic() > end:
                return False
            time.sleep(0.01)
        return True

    def kill(self, number: int, only: bool) -> None:
        """Send a signal to one rank that lives, or to all."""
        for process in random.sample(list(self.alive), 1 if only else len(self.alive)):
            with suppress(ProcessLookupError):
                os.kill(process, number)


def strike(start: Start, only: bool) -> bool:
    """Kill one rank or all, and see to it that every rank ends; whether none had to be forced."""
    start.kill(signal.SIGKILL, only)
    if start.wait(0.2 if only else END_SECONDS):
        return True
    start.kill(signal.SIGTERM, only=False)
    if start.wait(END_SECONDS):
        return True
    start.kill(signal.SIGKILL, only=False)
    return start.wait() and False


def files(folder: Path) -> dict[str, bytes]:
    """All files of a knowledge; the lock names a process."""
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.name != ".lock"}


@dataclass
class Chaos:
    """One case: a command, killed on so many ranks again and again."""

    command: Sequence[str]
    ranks: Sequence[int]
    whole: dict[str, bytes]
    folder: Path
    dice: random.Random
    seen: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(
            ("kills", "of_one_rank_only", "kills_while_files_were_written", "starts")
            + ("finished_folders", "of_other_bytes", "files_written_again", "forced_to_end"),
            0,
        )
    )

    def run(self, kills: int, life: float) -> dict[str, int]:
        """Kill it so often, each time within `life` seconds, then let it finish; what was seen."""
        begun = False
        while self.seen["kills"] < kills or begun:
            begun = self._live(life if self.seen["kills"] < kills else float("inf"))
        return self.seen

    def _live(self, life: float) -> bool:
        """One start; whether the folder is unfinished after it."""
        before = self._stamps()
        start = self._start()
        ended = start.wait(self.dice.uniform(0, life) if life < float("inf") else life)
        if not ended:
            only = start.ranks > 1 and self.dice.random() < 0.5
            self.seen["forced_to_end"] += not strike(start, only)
            self.seen["kills"] += 1
            self.seen["of_one_rank_only"] += only
        now = self._stamps()
        self.seen["files_written_again"] += sum(now.get(n) != s for n, s in before.items())
        self.seen["kills_while_files_were_written"] += not ended and len(now) > len(before)
        if not (ended and set(start.statuses) == {0}):
            if ended:
                raise RuntimeError(f"a start failed by itself: see {start.log}")
            return True
        self.seen["of_other_bytes"] += files(self._current) != self.whole
        self.seen["finished_folders"] += 1
        return False

    def _start(self) -> Start:
        self.seen["starts"] += 1
        log = self.folder / "log"
        words = [*self.command, "--output", str(self._current)]
        return Start(words, self.dice.choice(self.ranks), log)

    @property
    def _current(self) -> Path:
        return self.folder / f"knowledge-{self.seen['finished_folders']}"

    def _stamps(self) -> dict[str, tuple[int, int]]:
        """Which file every finished one is: one that is written again would be another."""
        found = {path: path.stat() for path in self._current.glob("*.bin")}
        return {path.name: (stat.st_ino, stat.st_mtime_ns) for path, stat in found.items()}


def table(report: dict[str, Any]) -> str:
    """What was seen as Markdown, a column for every case."""
    cases = report["cases"]
    lines = [f"| what | {' | '.join(cases)} |", "|---|" + "---:|" * len(cases)]
    for name in next(iter(cases.values())):
        cells = [str(seen[name]) for seen in cases.values()]
        lines.append(f"| {name.replace('_', ' ')} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


@program
def main() -> None:
    """The program; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--output", type=Path, required=True, help="folder of the knowledge")
    parser.add_argument("--kills", type=int, default=20, help="in each case")
    parser.add_argument("--cases", default=",".join(CASES), help="with commas")
    parser.add_argument("--data", type=Path, help="shards; default: of a few real articles")
    parser.add_argument("--teacher", type=Path, help="default: the real one")
    parser.add_argument("--life", type=float, default=0.7, help="share of the time of the whole")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and of who is killed")
    parser.add_argument("--results", type=Path, default=RESULTS)
    chosen = parser.parse_args()
    chosen.output.mkdir(parents=True, exist_ok=True)
    random.seed(chosen.seed)
    data = chosen.data or rows(chosen.output)
    config = chosen.output / "ds_config.json"
    write_json(config, {"train_micro_batch_size_per_gpu": MICRO_BATCH})
    command = ["--ds_config", str(config), "--data", str(data), "--rows_per_file", str(FILE_ROWS)]
    command += ["--teacher", str(chosen.teacher or packaged_teacher()), "--objective", "hid-seq"]
    command += ["--copies", "2", "--compression", "zstd", "--dtype", "int8"]
    whole = chosen.output / "whole"
    shutil.rmtree(whole, ignore_errors=True)
    began = time.monotonic()
    start = Start([*command, "--output", str(whole)], 1, chosen.output / "whole.log")
    if not start.wait() or start.statuses != [0]:
        sys.exit(f"the unbroken storing failed: see {start.log}")
    lasts, expected = time.monotonic() - began, files(whole)
    device = torch.device("cpu")
    settings = {"kills": chosen.kills, "seed": chosen.seed, "commit": machine(device)["commit"]}
    cases = {}
    for name in chosen.cases.split(","):
        folder = chosen.output / name.replace(" ", "-")
        done = folder / "seen.json"
        if not (done.is_file() and settings.items() <= json.loads(done.read_text()).items()):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            dice = random.Random(f"{chosen.seed}-{name}")
            chaos = Chaos(command, CASES[name], expected, folder, dice)
            write_json(done, settings | {"seen": chaos.run(chosen.kills, chosen.life * lasts)})
        cases[name] = json.loads(done.read_text())["seen"]
    report = {
        "machine": machine(device),
        "files": len([file for file in expected if file.endswith(".bin")]),
        "bytes": sum(map(len, expected.values())),
        "unbroken_seconds": lasts,
        "cases": cases,
    }
    write_report(chosen.results / "knowledge-chaos.json", report, table(report))
    print(json.dumps(report, indent=2), table(report), sep="\n")
    sys.exit(any(own["of_other_bytes"] + own["files_written_again"] for own in cases.values()))


if __name__ == "__main__":
    main()
