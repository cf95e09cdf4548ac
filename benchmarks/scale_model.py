"""The formula of scale: seconds of a step on n devices, from one device's steps and two links.

`benchmarks/forecast.py` is its program; `docs/scale.md` has it in words, and what it assumes. Times
are in seconds, sizes in bytes, links in bytes per second of one device in one direction.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from potstill.errors import InputError

GRADIENT_HALVES = {0: 2, 1: 2, 2: 2, 3: 1}
"""Reduce-scatters (half an all-reduce each) of the gradients per exchange, by ZeRO stage.

ZeRO needs one under stages 1 and 2; DeepSpeed 0.19 makes a whole all-reduce there by default
(`use_multi_rank_bucket_allreduce`) and keeps its part."""


@dataclass(frozen=True)
class Link:
    """What one device sends in one direction, while it receives as much."""

    bytes_per_second: float
    latency_seconds: float


@dataclass(frozen=True)
class Cluster:
    """Nodes of `node` devices: a link inside a node, another between nodes."""

    inside: Link
    between: Link
    node: int = 8


@dataclass(frozen=True)
class Work:
    """What is trained, and how.

    Attributes:
        points: rows of a micro-batch and seconds of a whole step on it alone, optimiser and all,
            one device, measured.
        trained: numbers with a gradient.
        gradient_bytes, parameter_bytes: of one number as it travels.
        stage: of ZeRO. bucket: numbers sent at once. overlap: exchange during the backward pass.
        backward_share: of the student's backward pass in a step.
        global_batch, length: rows of a step and tokens of a row. tokens: of the whole run.
    """

    points: tuple[tuple[int, float], ...]
    trained: int
    gradient_bytes: int = 4
    parameter_bytes: int = 2
    stage: int = 1
    bucket: int = 500_000_000
    overlap: bool = False
    backward_share: float = 0.4
    global_batch: int = 1024
    length: int = 128
    tokens: float = 13.1e9


def fit_line(points: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """Fixed seconds and seconds per row through measured (rows, seconds), least relative squares.

    Raises:
        InputError: fewer than two sizes of micro-batch, which say nothing about small ones.
    """
    if len({rows for rows, _ in points}) < 2 or any(r < 1 or s <= 0 for r, s in points):
        raise InputError(
            "--step_seconds: give ROWS:SECONDS of two different micro-batches or more, all "
            "positive; one says nothing about smaller ones"
        )
    # weights 1 / seconds^2, so that a large micro-batch does not drown the small ones
    weighted = [(rows, seconds, seconds**-2.0) for rows, seconds in points]
    total = sum(w for *_, w in weighted)
    mean_rows = sum(w * r for r, _, w in weighted) / total
    mean_seconds = sum(w * s for _, s, w in weighted) / total
    spread = sum(w * (r - mean_rows) ** 2 for r, _, w in weighted)
    slope = sum(w * (r - mean_rows) * (s - mean_seconds) for r, s, w in weighted) / spread
    fixed = mean_seconds - slope * mean_rows
    if fixed < 0:  # no device has a negative cost of starting: the line then goes through zero
        ratio = sum(w * r * s for r, s, w in weighted) / sum(w * r * r for r, _, w in weighted)
        return 0.0, ratio
    return fixed, slope


def half_ring_seconds(devices: int, size: float, link: Link) -> float:
    """A reduce-scatter or an all-gather of `size` bytes in a ring: n-1 messages of size/n."""
    return (devices - 1) * (size / devices / link.bytes_per_second + link.latency_seconds)


def half_seconds(devices: int, size: float, cluster: Cluster) -> float:
    """The same over nodes: inside each, then rings between equal devices of all nodes.

    Raises:
        InputError: more devices than a node has, but no whole number of nodes.
    """
    local = min(devices, cluster.node)
    if devices % local:
        raise InputError(
            f"--devices {devices}: no whole number of nodes of --node {cluster.node}; take a "
            "multiple of it"
        )
    between = half_ring_seconds(devices // local, size / local, cluster.between)
    return half_ring_seconds(local, size, cluster.inside) + between


def exposed_seconds(exchange: float, window: float, buckets: int, overlap: bool) -> float:
    """What of an exchange in equal buckets is left when the pass that fills them ends.

    The k-th of K buckets is full after k/K of the window; they travel one behind another.
    """
    if not overlap:
        return exchange
    return max(exchange / buckets, exchange - window * (buckets - 1) / buckets)


def exchange_seconds(devices: int, work: Work, cluster: Cluster) -> tuple[float, float]:
    """Seconds of one exchange of all gradients, and of one gathering of all parameters."""
    buckets = math.ceil(work.trained / work.bucket)
    gradients = work.trained * work.gradient_bytes / buckets
    parameters = work.trained * work.parameter_bytes / buckets
    halves = GRADIENT_HALVES[work.stage] * buckets
    return (
        halves * half_seconds(devices, gradients, cluster),
        buckets * half_seconds(devices, parameters, cluster),
    )


@dataclass(frozen=True)
class Row:
    """The forecast for a number of devices.

    `traffic_seconds`: of all exchanges of a step; `exposed_seconds`: what of them the step waits
    for. `efficiency`: speed per device over that of one device at its largest micro-batch.
    """

    devices: int
    rows_per_device: int
    accumulation: int
    traffic_seconds: float
    exposed_seconds: float
    step_seconds: float
    efficiency: float
    tokens_per_second: float
    hours: float


def forecast(devices: int, rows: int, work: Work, cluster: Cluster) -> Row:
    """A step of `rows` sequences per device, in the fewest micro-batches that were measured."""
    fixed, per_row = fit_line(work.points)
    largest = max(rows for rows, _ in work.points)
    accumulation = math.ceil(rows / largest)
    compute = fixed * accumulation + per_row * rows
    traffic, exposed = traffic_seconds(devices, accumulation, compute / accumulation, work, cluster)
    seconds = compute + exposed
    best = largest / (fixed + per_row * largest)  # rows per second
    speed = devices * rows * work.length / seconds
    return Row(
        devices=devices,
        rows_per_device=rows,
        accumulation=accumulation,
        traffic_seconds=traffic,
        exposed_seconds=exposed,
        step_seconds=seconds,
        efficiency=rows / seconds / best,
        tokens_per_second=speed,
        hours=work.tokens / speed / 3600,
    )


def traffic_seconds(
    devices: int, accumulation: int, micro_seconds: float, work: Work, cluster: Cluster
) -> tuple[float, float]:
    """Seconds of all exchanges of a step, and those that are not hidden behind computing."""
    if devices == 1:
        return 0.0, 0.0
    gradients, parameters = exchange_seconds(devices, work, cluster)
    buckets = math.ceil(work.trained / work.bucket)
    overlap = work.overlap and work.stage > 0  # DeepSpeed's stage 0 waits for the whole backward
    backward = micro_seconds * work.backward_share
    times = accumulation if work.stage >= 2 else 1
    if work.stage < 3:
        gather = parameters if work.stage else 0.0
        left = exposed_seconds(gradients, backward, buckets, overlap)
        return times * gradients + gather, times * left + gather
    # stage 3 gathers the parameters for the forward pass, half as long as the backward pass, and
    # again for the backward pass, where they share the link with the gradients
    left = exposed_seconds(parameters, backward / 2, buckets, overlap)
    left += exposed_seconds(parameters + gradients, backward, buckets, overlap)
    return times * (gradients + 2 * parameters), times * left


def forecasts(devices: Sequence[int], work: Work, cluster: Cluster) -> dict[str, list[Row]]:
    """Both ways to grow: the global batch stays, or every device keeps its largest micro-batch.

    Raises:
        InputError: no number of devices divides the global batch.
    """
    largest = max(rows for rows, _ in work.points)
    fits = [n for n in devices if work.global_batch % n == 0]
    if not fits:
        given = ",".join(map(str, devices))
        raise InputError(
            f"--devices {given}: --global_batch {work.global_batch} is a multiple of none of them"
        )
    return {
        "fixed": [forecast(n, work.global_batch // n, work, cluster) for n in fits],
        "growing": [forecast(n, largest, work, cluster) for n in devices],
    }
