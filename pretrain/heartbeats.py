"""Signs of life of all ranks, through the store that they met at."""

import itertools
import json
import os
import socket
import threading
import time
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

from torch import distributed as dist

from potstill.errors import TrainingError
from pretrain.launcher import look

BEAT_SECONDS, LINGER_SECONDS = 1.0, 5.0

_numbers = itertools.count()  # of the runs of this process: each has keys of its own


class Loss(NamedTuple):
    """A rank that is gone: what became of it, for a message, and what the others end with."""

    rank: int
    what: str
    status: int = TrainingError.exit_status


@dataclass(frozen=True)
class Sign:
    """What a rank tells of itself.

    Attributes:
        place: what processes share that can see one another by their ids.
        started: tells the process from a later one of the same id.
        beat: counts up. left: it has ended, well unless it names itself in `lost`.
        lost: the rank that it misses, if any.
    """

    rank: int
    pid: int
    host: str
    place: str
    started: str
    beat: int = 0
    left: bool = False
    lost: Loss | None = None

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.pid} on {self.host})"

    def is_dead(self) -> bool:
        """Whether the process is known to have ended: seen from its own place only."""
        if self.place != _place():
            return False
        process = look(self.pid)
        return process is None or process.started != self.started


def _place() -> str:
    """This host and its space of process ids: containers may share a host's name."""
    return Path("/proc/sys/kernel/random/boot_id").read_text() + os.readlink("/proc/self/ns/pid")


def _own_sign() -> Sign:
    process = look(os.getpid())
    assert process is not None
    rank, host = dist.get_rank(), socket.gethostname()
    return Sign(rank, os.getpid(), host, _place(), process.started)


def _read(text: bytes) -> Sign:
    fields: dict[str, Any] = json.loads(text)
    lost = fields.pop("lost")
    return Sign(**fields, lost=Loss(*lost) if lost else None)


class Heartbeats:
    """Tells the other ranks that this one lives, and finds out which of them does not.

    The store's server is a thread of rank 0 (or of torchrun), which answers whatever the rank
    does. Its clients wait for an answer, so this one is its own, in its own thread.

    Args:
        silence: seconds without a sign of life after which a rank is lost.

    Attributes:
        lost: the first rank found to be gone. speaks: whether this one is to say so.
    """

    def __init__(self, silence: float) -> None:
        self.lost: Loss | None = None
        self.speaks = False
        self._silence, self._number = silence, next(_numbers)
        self._own = _own_sign()
        self._others = [r for r in range(dist.get_world_size()) if r != self._own.rank]
        self._signs = {self._own.rank: self._own}
        self._silent = dict.fromkeys(self._others, 0)  # rounds, of which a stopped process has none
        self._unanswered = 0.0
        self._met, self._leaving = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._exchange, name="heartbeats", daemon=True)

    def start(self) -> None:
        """Begin, in a thread, and meet all other ranks; alone there is nothing to do."""
        if self._others:
            self._thread.start()
            self._met.wait(self._silence)

    def stop(self, failure: str | None, status: int) -> None:
        """Tell the others that this rank leaves: well, or with a failure that they must know of."""
        if failure and self.lost is None:
            self.lost = Loss(self._own.rank, f"{self._own} {failure}", status)
        self._leaving.set()
        if self._others:
            self._thread.join(LINGER_SECONDS + BEAT_SECONDS)

    def has_others(self) -> bool:
        """Whether there is any other rank."""
        return bool(self._others)

    def tick(self, seconds: float) -> None:
        """Count time in which the store may not have answered: rank 0, its host, may hang.

        Time is counted in calls, not read: a process that was stopped itself knows of nobody.
        """
        self._unanswered += seconds if self._thread.is_alive() else 0.0
        if self._unanswered > self._silence:
            self._store_is_gone()

    def all_here(self) -> bool:
        """Whether the end of any other rank is seen at once."""
        here = self._own.place
        return all(r in self._signs and self._signs[r].place == here for r in self._others)

    def is_lowest(self, but: int | None = None) -> bool:
        """Whether this is the lowest living rank of its place, one left out."""
        signs = [s for s in list(self._signs.values()) if s.place == self._own.place]
        others = (s.rank for s in signs if s.rank not in (but, self._own.rank) and not s.is_dead())
        return all(self._own.rank < other for other in others)

    def _exchange(self) -> None:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        limit = timedelta(seconds=self._silence)
        try:
            client = dist.TCPStore(address, port, timeout=limit, wait_for_workers=False)
            store = dist.PrefixStore(f"heartbeats/{self._number}", client)
            self._meet(store)
            while not self._leaving.wait(BEAT_SECONDS):
                self._tell(store)
                self._listen(store)
            self._tell(store)
            self._linger(store)
        except RuntimeError:  # what torch raises for any trouble with the store
            self._store_is_gone()

    def _meet(self, store: dist.Store) -> None:
        """Wait for a first sign of all, so that whoever is lost later can be named."""
        self._tell(store)
        end = time.monotonic() + self._silence
        while not store.check([str(rank) for rank in self._others]) and time.monotonic() < end:
            time.sleep(0.05)
        self._listen(store)
        self._met.set()

    def _tell(self, store: dist.Store) -> None:
        before, left = self._signs[self._own.rank], self._leaving.is_set()
        sign = replace(before, beat=before.beat + 1, left=left, lost=self.lost)
        self._signs[self._own.rank] = sign
        store.set(str(self._own.rank), json.dumps(asdict(sign)))

    def _listen(self, store: dist.Store) -> None:
        for rank in self._others:
            self._hear(rank, store)
        self._unanswered = 0.0

    def _hear(self, rank: int, store: dist.Store) -> None:
        before = self._signs.get(rank)
        dead = before is not None and before.is_dead()  # first: it may leave well right now
        sign = _read(store.get(str(rank))) if store.check([str(rank)]) else None
        self._silent[rank] = self._silent[rank] + 1 if sign == before else 0
        if sign is not None:
            self._signs[rank] = sign
        if sign is not None and sign.lost:
            self._miss(sign.lost)
        elif sign is not None and sign.left:
            pass  # it is not missed
        elif dead:
            self._miss(Loss(rank, f"{sign} was killed or died"))
        elif self._silent[rank] * BEAT_SECONDS > self._silence:
            self._miss(Loss(rank, f"{sign or f'rank {rank}'} {self._no_sign()}"))

    def _no_sign(self) -> str:
        return f"has given no sign of life for {self._silence:.0f} s: it hangs, or its host is lost"

    def _miss(self, loss: Loss) -> None:
        if self.lost is None and not self._leaving.is_set():
            # Now, not when it speaks: until then another one may have spoken, and ended.
            self.speaks = self.is_lowest(but=loss.rank)
            self.lost = loss

    def _store_is_gone(self) -> None:
        """The store went with rank 0; torchrun's went with torchrun, of which others take care."""
        host = self._signs.get(0)
        if self._own.rank == 0 or (host and host.left) or "TORCHELASTIC_RUN_ID" in os.environ:
            return
        dead = host is not None and host.is_dead()
        self._miss(
            Loss(0, f"{host or 'rank 0'} {'was killed or died' if dead else self._no_sign()}")
        )

    def _linger(self, store: dist.Store) -> None:
        """Rank 0, which has the store, leaves last, so that the others can say that they leave."""
        end = time.monotonic() + LINGER_SECONDS
        while self._own.rank == 0 and time.monotonic() < end:
            self._listen(store)
            if all(s.left or s.is_dead() for s in self._signs.values()):
                break
            time.sleep(0.05)
