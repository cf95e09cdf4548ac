"""Workers on Ray: processes that run one trial after another, on this machine or on many.

Without an address Ray runs inside this program and ends with it, however it ends. It listens on all
interfaces whatever it is told, but lets in nobody without a token, made for this one grid. A worker
is a Ray actor pinned to a node: it holds one GPU where nodes have some, else its share of the
cores. It is reused, since a fresh one imports for seconds, and replaced when it dies. Ray itself
retries nothing: whether a trial runs again is for `finetune/grid_loop.py`.
"""

import logging
import os
import secrets
import shutil
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune.grid_settings import GridSettings
from finetune.worker import Promise, Worker
from potstill.errors import InputError, TrainingError
from potstill.files import write_text

OBJECT_STORE_BYTES = 80 * 2**20  # results are small; Ray's own choice is a third of the memory
LOOK_SECONDS = 5.0  # between two looks at which nodes there are
STARTS = 3  # of Ray in this program
BAD_STARTS = 3  # of workers of one node, one after another
LONGEST_SOCKET_FOLDER = 40  # characters: the paths of Ray's sockets must stay below 107
TEMPORARY = ".ray"  # in the grid's folder: where Ray keeps its sockets and logs
TOKEN = ".seen-"  # a file there that every node must see
PREFIX = "potstill-ray-"
LOOPBACK = "127.0.0.2" if sys.platform == "linux" else "127.0.0.1"
"""Ray puts the address of the network in the place of 127.0.0.1, and breaks when that changes."""


@dataclass
class Hand:
    """One worker: its actor, and the node that it is on."""

    actor: Any
    node: str
    address: str


@dataclass(frozen=True)
class Event:
    """What became of a job: what the worker answered, or how it was lost."""

    ticket: Any
    hand: Hand
    outcome: Any = None
    reason: str = ""
    by_node: bool = False  # lost because the node is gone or unreachable: not the job's fault


@dataclass
class Cluster:
    """The workers that there are, and what they are at."""

    ray: Any
    threads: int
    promise: Promise
    limit: int | None = None
    idle: list[Hand] = field(default_factory=list)
    _busy: dict[Any, tuple[Hand, Any, bool]] = field(default_factory=dict)
    _hands: list[Hand] = field(default_factory=list)
    _bad_starts: dict[str, int] = field(default_factory=dict)
    _looked: float = -LOOK_SECONDS

    def nodes(self) -> dict[str, dict[str, Any]]:
        """The nodes that are alive, by their id."""
        return {node["NodeID"]: node for node in self.ray.nodes() if node["Alive"]}

    def hire(self) -> None:
        """Start workers wherever a node has room for more; looks at the nodes now and then."""
        if time.monotonic() - self._looked < LOOK_SECONDS:
            return
        self._looked = time.monotonic()
        nodes = self.nodes()
        has_gpus = any(node["Resources"].get("GPU", 0) >= 1 for node in nodes.values())
        for node_id, node in nodes.items():
            there = sum(hand.node == node_id for hand in self._hands)
            for _ in range(self._slots(node["Resources"], has_gpus) - there):
                self._start(node_id, node["NodeManagerAddress"], has_gpus)
        if not self._hands and not self._bad_starts:
            raise InputError(
                f"--threads {self.threads}: no machine of the cluster has room for one trial "
                f"({self.threads} CPUs{' and a GPU' if has_gpus else ''}); give fewer"
            )

    def _slots(self, resources: dict[str, float], has_gpus: bool) -> int:
        by_cores = int(resources.get("CPU", 0) // self.threads)
        slots = min(by_cores, int(resources.get("GPU", 0))) if has_gpus else by_cores
        return slots if self.limit is None else min(slots, self.limit)

    def _start(self, node: str, address: str, has_gpu: bool) -> None:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        actor = self.ray.remote(Worker).options(
            num_cpus=self.threads,
            num_gpus=int(has_gpu),
            max_restarts=0,
            max_task_retries=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
        )
        hand = Hand(actor.remote(self.threads), node, address)
        self._hands.append(hand)
        self._busy[hand.actor.missing.remote(self.promise)] = (hand, None, False)

    def give(self, ticket: Any, *work: Any) -> None:
        """Let an idle worker do `work`; `wait` tells of it under `ticket`."""
        hand = self.idle.pop()
        self._busy[hand.actor.work.remote(*work)] = (hand, ticket, False)

    def wait(self, seconds: float) -> Iterator[Event]:
        """What happened to jobs, after at most so many seconds."""
        if not self._busy:
            time.sleep(seconds)
            return
        done, _ = self.ray.wait(list(self._busy), num_returns=1, timeout=seconds)
        for reference in done:
            hand, ticket, unsure = self._busy.pop(reference)
            event = self._settle(hand, ticket, unsure, reference)
            if event is not None and ticket is not None:
                yield event

    def _settle(self, hand: Hand, ticket: Any, unsure: bool, reference: Any) -> Event | None:
        errors = self.ray.exceptions
        try:
            answer = self.ray.get(reference)
        except errors.ActorUnavailableError:  # gone, or only out of reach: it is asked again
            self._busy[hand.actor.missing.remote(self.promise)] = (hand, ticket, True)
            return None
        except (errors.RayActorError, errors.NodeDiedError, errors.OutOfMemoryError) as error:
            return self._lost(hand, ticket, error)
        except errors.RayError as error:
            if ticket is not None:  # it started once: whatever it was, the trial may run again
                return self._lost(hand, ticket, error)
            raise InputError(
                f"node {hand.address}: a worker cannot start ({_last_line(error)}); install the "
                "same Potstill, Python and Ray there as here"
            ) from error
        if ticket is None or unsure:
            self._welcome(hand, answer)
            return Event(ticket, hand, reason="its worker was out of reach", by_node=True)
        self.idle.append(hand)
        return Event(ticket, hand, outcome=answer)

    def _welcome(self, hand: Hand, missing: Sequence[str]) -> None:
        if missing:
            raise InputError(
                f"node {hand.address} does not see {', '.join(missing)} as this one does; mount "
                "output, models and data by the same paths on every node"
            )
        self._bad_starts.pop(hand.node, None)
        self.idle.append(hand)

    def _lost(self, hand: Hand, ticket: Any, error: Exception) -> Event | None:
        self._hands.remove(hand)
        self._looked = -LOOK_SECONDS
        by_node = "node has died" in str(error) or hand.node not in self.nodes()
        if ticket is None and not by_node:
            self._note_bad_start(hand, error)
        return Event(ticket, hand, reason=f"its process died: {death(error)}", by_node=by_node)

    def _note_bad_start(self, hand: Hand, error: Exception) -> None:
        if getattr(error, "actor_init_failed", False):
            raise InputError(
                f"node {hand.address}: a worker cannot start ({_last_line(error)}); install the "
                "same Potstill, Python and Ray there as here"
            )
        self._bad_starts[hand.node] = self._bad_starts.get(hand.node, 0) + 1
        if self._bad_starts[hand.node] >= BAD_STARTS:
            raise TrainingError(
                f"node {hand.address}: workers die at their start ({death(error)}); see Ray's "
                "logs there, then start the same command again"
            )

    def dismiss(self) -> None:
        """End all workers at once."""
        for hand in self._hands:
            self.ray.kill(hand.actor)

    def replace(self, hand: Hand) -> None:
        """End an idle worker, so that a fresh one comes: its memory may be full of what failed."""
        self.idle.remove(hand)
        self._hands.remove(hand)
        self.ray.kill(hand.actor)
        self._looked = -LOOK_SECONDS


def death(error: Exception) -> str:
    """What Ray knows of a process's end, without its advice."""
    text = " ".join(str(error).split())
    for start in ("Worker exit detail: ", "The actor died because ", "The actor is dead because "):
        if start in text:
            return text.partition(start)[2].partition(". ")[0].partition(" Some common")[0]
    return text[:200]


def _last_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()


@contextmanager
def connected(settings: GridSettings, output: Path, paths: Sequence[Path]) -> Iterator[Cluster]:
    """Workers on an embedded Ray, or on the cluster at `--address`; all of it ends with the block.

    Args:
        paths: what every node must see where this one does.

    Raises:
        InputError: Ray is not installed, or no such cluster can be joined.
        TrainingError: Ray does not start on this machine.
    """
    ray = _ray()
    for left in output.glob(f"{TOKEN}*"):  # of a grid that was killed; the folder is this one's
        left.unlink()
    promise = Promise(output / f"{TOKEN}{uuid.uuid4().hex}", tuple(map(str, paths)))
    write_text(promise.token, promise.token.name)
    try:
        with _joined(ray, settings, output):
            cluster = Cluster(ray, settings.threads, promise, settings.workers)
            try:
                yield cluster
            finally:
                cluster.dismiss()
    finally:
        promise.token.unlink(missing_ok=True)


def _ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nobody is told that Ray runs here
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
        import ray.exceptions
    except ImportError as error:
        raise InputError(
            f"a grid runs on Ray, which is not installed ({error}): pip install -e .[cluster]"
        ) from error
    logging.getLogger("ray").setLevel(logging.CRITICAL)  # the grid itself tells what matters
    return ray


@contextmanager
def _joined(ray: Any, settings: GridSettings, output: Path) -> Iterator[None]:
    quiet: dict[str, Any] = {"log_to_driver": False, "configure_logging": False}
    temporary, handler = None, signal.getsignal(signal.SIGTERM)
    try:
        if settings.address is not None:
            _join(ray, settings.address, quiet)
        else:
            temporary = _temporary_folder(output)
            _embed(ray, settings, temporary, quiet)
        signal.signal(signal.SIGTERM, handler)  # Ray puts its own in its place
        yield
    finally:
        ray.shutdown()
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
            (output / TEMPORARY).unlink(missing_ok=True)


def _join(ray: Any, address: str, quiet: dict[str, Any]) -> None:
    try:
        ray.init(address=address, **quiet)
    except Exception as error:  # Ray raises whatever its parts raise, Exception itself too
        raise InputError(
            f"--address {address}: no cluster could be joined ({_last_line(error)}); start the "
            "grid on a machine of the cluster"
        ) from error


def _embed(ray: Any, settings: GridSettings, temporary: Path, quiet: dict[str, Any]) -> None:
    """Start Ray in this program; on a busy machine it may take longer than Ray itself waits."""
    for start in range(1, STARTS + 1):
        try:
            _start_here(ray, settings, temporary, quiet)
            return
        except Exception as error:  # as for a cluster
            ray.shutdown()
            if start == STARTS:
                raise TrainingError(
                    f"Ray cannot start on this machine ({_last_line(error)}); start the same "
                    "command again when it is less busy"
                ) from error


def _start_here(ray: Any, settings: GridSettings, temporary: Path, quiet: dict[str, Any]) -> None:
    """Start Ray once; threads are set for the processes that it starts."""
    gpus = _gpus()
    workers = settings.workers or gpus or max(1, _cores() // settings.threads)
    os.environ["OMP_NUM_THREADS"] = str(settings.threads)
    # what Ray asks of all who connect; by itself it would keep one for good in the home folder
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's own is 15: behind all other programs
    ray.init(
        address="local",
        num_cpus=workers * settings.threads,
        num_gpus=min(workers, gpus),
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        _node_ip_address=LOOPBACK,
        _temp_dir=str(temporary),
        **quiet,
    )


def check_machine(settings: GridSettings) -> None:
    """Find out before anything is written whether trials can run.

    Raises:
        InputError: Ray is not installed, or there are fewer GPUs than workers.
    """
    _ray()
    gpus, workers = _gpus(), settings.workers or 1
    if settings.address is None and 0 < gpus < workers:
        raise InputError(
            f"--workers {workers}: a trial takes a GPU of its own, and this machine has {gpus}; "
            f"give at most {gpus}, or hide them (CUDA_VISIBLE_DEVICES=) to use the cores"
        )


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _temporary_folder(output: Path) -> Path:
    """A new folder for Ray; removes that of a grid which was killed before it could."""
    note = output / TEMPORARY
    if note.exists():
        former = Path(note.read_text(encoding="utf-8").strip())
        if former.name.startswith(PREFIX):
            shutil.rmtree(former, ignore_errors=True)
    short = len(tempfile.gettempdir()) <= LONGEST_SOCKET_FOLDER
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=None if short else "/tmp"))
    write_text(note, f"{folder}\n")
    return folder


def rungs_on_this_node(ray: Any, rungs: Callable[[], Any]) -> Any:
    """An actor of a class, on the node of this program, so that it lives as long as the grid."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = ray.get_runtime_context().get_node_id()
    placed = NodeAffinitySchedulingStrategy(here, soft=False)
    return ray.remote(rungs).options(num_cpus=0, scheduling_strategy=placed).remote()
