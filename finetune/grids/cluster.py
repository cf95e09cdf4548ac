"""Workers on Ray: processes that run one trial after another, on this machine or on many.

A worker is a Ray actor pinned to a node: it holds one GPU where nodes have some, else its share of
the cores. It is reused, since a fresh one imports for seconds, and replaced when it dies. Ray
retries nothing: whether a trial runs again is for `finetune/grids/loop.py`.
"""

import time
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from finetune.grids.worker import Promise, Worker
from potstill.errors import InputError, PotstillError, TrainingError

LOOK_SECONDS = 5.0  # between two looks at which nodes there are
BAD_STARTS = 3  # of workers of one node, one after another


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
    _had_workers: bool = False
    _looked: float = -LOOK_SECONDS

    def nodes(self) -> dict[str, dict[str, Any]]:
        """The nodes that are alive, by their id."""
        return {node["NodeID"]: node for node in self.ray.nodes() if node["Alive"]}

    def hire(self) -> None:
        """Start workers wherever a node has room for more; looks at the nodes now and then.

        Raises:
            InputError: no node ever had room for a worker.
            TrainingError: all nodes that had room are gone.
        """
        if time.monotonic() - self._looked < LOOK_SECONDS:
            return
        self._looked = time.monotonic()
        nodes = self.nodes()
        has_gpus = any(node["Resources"].get("GPU", 0) >= 1 for node in nodes.values())
        self._forget_lost(nodes)
        for node_id, node in nodes.items():
            there = sum(hand.node == node_id for hand in self._hands)
            for _ in range(self._slots(node["Resources"], has_gpus) - there):
                self._start(node_id, node["NodeManagerAddress"], has_gpus)
        if not self._hands:
            raise self._no_room(has_gpus)

    def _forget_lost(self, nodes: Container[str]) -> None:
        """Leave out who idles on a node that is gone: it would lose one trial after another."""
        lost = [hand for hand in self.idle if hand.node not in nodes]
        self.idle = [hand for hand in self.idle if hand not in lost]
        self._hands = [hand for hand in self._hands if hand not in lost]

    def _no_room(self, has_gpus: bool) -> PotstillError:
        if self._had_workers:
            return TrainingError(
                "no machine of the cluster is left that has room for a trial; start the same "
                "command again when there is one"
            )
        return InputError(
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
        except errors.ActorUnschedulableError:  # its node died before Ray had told so
            self._hands.remove(hand)
            return Event(ticket, hand, reason="its node has died", by_node=True)
        except errors.RayError as error:
            if ticket is not None:  # it started once: whatever it was, the trial may run again
                return self._lost(hand, ticket, error)
            raise _cannot_start(hand, error) from error
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
        self._had_workers = True
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
            raise _cannot_start(hand, error)
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


def _cannot_start(hand: Hand, error: Exception) -> InputError:
    return InputError(
        f"node {hand.address}: a worker cannot start ({last_line(error)}); install the same "
        "Potstill, Python and Ray there as here"
    )


def death(error: Exception) -> str:
    """What Ray knows of a process's end, without its advice."""
    text = " ".join(str(error).split())
    for start in ("Worker exit detail: ", "The actor died because ", "The actor is dead because "):
        if start in text:
            return text.partition(start)[2].partition(". ")[0].partition(" Some common")[0]
    return text[:200]


def last_line(error: Exception) -> str:
    """The last line of what an error of Ray says, which is often a whole traceback."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()


def rungs_on_this_node(ray: Any, rungs: Callable[[], Any]) -> Any:
    """An actor of a class, on the node of this program, so that it lives as long as the grid."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = ray.get_runtime_context().get_node_id()
    placed = NodeAffinitySchedulingStrategy(here, soft=False)
    return ray.remote(rungs).options(num_cpus=0, scheduling_strategy=placed).remote()
