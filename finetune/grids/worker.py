"""What runs in a worker's process: one trial after another, each as if the process were fresh."""

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from finetune.results import LOCK
from potstill.errors import InputError, PotstillError
from potstill.lock import hold_soon

LOCK_SECONDS = 300.0  # for which the worker of a grid that was killed may still hold a trial


@dataclass(frozen=True)
class Promise:
    """What a node must see: a file with its own name as its text, and paths that exist."""

    token: Path
    paths: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """How a trial ended in its process.

    One that "failed" would do so again. One that "died" may not: its process lacked memory, or
    broke, and is not to be used again.
    """

    kind: Literal["done", "failed", "died"]
    result: dict[str, Any] | None = None
    reason: str = ""


class Worker:
    """A process that runs trials with so many threads."""

    def __init__(self, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self._threads = threads

    def missing(self, promise: Promise) -> list[str]:
        """What of the promised files is not there, or another one's."""
        lost = [path for path in promise.paths if not os.path.exists(path)]
        if not promise.token.is_file() or promise.token.read_text() != promise.token.name:
            lost.append(str(promise.token.parent))
        return lost

    def work(self, job: Any, folder: Path, judge: "Judge | None") -> Outcome:
        """Run a trial; whatever it raises becomes its outcome."""
        import torch

        torch.set_num_threads(self._threads)
        await_lock(folder / LOCK)
        try:
            return Outcome("done", result=job.run(judge))
        except PotstillError as error:
            return Outcome("failed", reason=_line(error))
        except Exception as error:  # torch raises many kinds where memory ends, or a GPU breaks
            return Outcome("died", reason=f"{type(error).__name__}: {_line(error)}")


@dataclass(frozen=True)
class Judge:
    """A trial's `on_epoch`: asks the rungs, in their own process, whether it goes on."""

    rungs: Any
    key: tuple[str, str, int]
    configuration: str

    def __call__(self, epoch: int, score: float | None) -> bool:
        import ray

        asked = self.rungs.goes_on.remote(self.key, self.configuration, epoch, score)
        return bool(ray.get(asked))


def await_lock(path: Path) -> None:
    """Wait until nobody holds the lock, within reason; the trial itself then takes it."""
    if path.exists():
        with suppress(InputError):
            hold_soon(path, "held", LOCK_SECONDS).release()


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:500]
