"""The measurements of `benchmarks/gpu.py`, each in a process of its own.

A kernel that fails leaves a GPU's context unusable, and a compiler that fails can leave PyTorch so;
neither may spoil the rungs behind it. The processes are forked from a server that has imported
PyTorch, but not touched the device, so that starting one takes no more than opening the device.
"""

import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any

import torch
from bare_step import MASKED_SHARE, random_batch
from gpu_rungs import RUNGS, Setting, Step
from torch.profiler import ProfilerActivity, profile

from potstill.errors import InputError
from pretrain.batches import Batch
from pretrain.flops import Work, training_flops
from pretrain.models import Shape
from pretrain.peak import measure_peak

WARM_UP = 3
KERNELS = 12
PRELOADED = ["torch._dynamo", "transformers.models.bert.modeling_bert", "pretrain.step"]
"""What takes seconds to import, and does not touch the device."""
Found = Mapping[str, Any]
"""Figures, or under `reason` why there are none."""


def isolated(limit: float, act: Callable[..., Found], *arguments: Any) -> Found:
    """What an act gives in a process of its own, or why it gave nothing.

    Args:
        limit: seconds, after which the process is killed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_call, args=(send, act, arguments))
    process.start()
    send.close()
    try:
        if not receive.poll(limit):
            return {"reason": f"took longer than {limit:.0f} s"}
        return dict(receive.recv())
    except EOFError:
        process.join()
        return {"reason": f"its process ended with status {process.exitcode}"}
    finally:
        process.kill()
        process.join()


def _call(send: Connection, act: Callable[..., Found], arguments: tuple[Any, ...]) -> None:
    try:
        found = act(*arguments)
    except InputError as error:
        found = {"reason": str(error)}
    except Exception as error:  # whatever a kernel, a compiler or a package does on a new machine
        lines = [line for line in str(error).splitlines() if line.strip()]
        found = {"reason": f"{type(error).__name__}: {' '.join(lines[:2])[:200]}"}
    send.send(dict(found))


def synchronize(device: torch.device) -> None:
    """Wait for what the device still has to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(act: Callable[[], Any], wanted: float, device: torch.device) -> list[float]:
    """Seconds of each of several calls after a warm-up: at least three, `wanted` in all."""
    for _ in range(WARM_UP):
        act()
    found: list[float] = []
    while len(found) < 3 or sum(found) < wanted:
        synchronize(device)
        start = time.perf_counter()
        act()
        synchronize(device)
        found.append(time.perf_counter() - start)
    return found


def build(setting: Setting, name: str) -> tuple[Step, Batch]:
    """A rung's step, and the batch that it takes again and again."""
    batch = random_batch(setting.learning.pair.vocab, setting.rows, setting.length)
    return RUNGS[name].build(setting), batch.to(setting.device)


def take_step(setting: Setting, name: str, seconds: float) -> Found:
    """Seconds of a step of a rung, its speed, and the most memory that tensors took.

    `needed_flops_per_second` counts what the objective needs, whatever the rung computes.
    """
    step, batch = build(setting, name)
    low, middle, high = statistics.quantiles(
        found := timed(lambda: step(batch), seconds, setting.device), n=4
    )
    speed, gpu = setting.rows * setting.length / middle, setting.device.type == "cuda"
    return {
        "seconds": middle,
        "low": low,
        "high": high,
        "steps": len(found),
        "tokens_per_second": speed,
        "needed_flops_per_second": speed * needed_flops(setting),
        "memory_bytes": torch.cuda.max_memory_allocated(setting.device) if gpu else None,
    }


def needed_flops(setting: Setting) -> float:
    """FLOPs per token that the objective needs, by formula."""
    learning = setting.learning
    student, teacher = (
        Shape(layers, width, learning.pair.heads, 4 * width, learning.pair.vocab, 512, width)
        for layers, width in (learning.pair.student, learning.pair.teacher)
    )
    objective = learning.build(student, teacher, setting.rows * setting.length)
    work = Work(setting.rows, setting.length, MASKED_SHARE)
    return float(training_flops(objective, student, teacher, work))


def take_gemms(setting: Setting, seconds: float) -> Found:
    """bf16 products at the shapes of a teacher's layer and of its head, and of large squares."""
    tokens, width = setting.rows * setting.length, setting.learning.pair.teacher[1]
    shapes = {
        "projection": (tokens, width, width),
        "feed-forward in": (tokens, width, 4 * width),
        "feed-forward out": (tokens, 4 * width, width),
        "MLM head": (max(1, round(MASKED_SHARE * tokens)), width, setting.learning.pair.vocab),
    }
    rows = []
    for name, (m, k, n) in shapes.items():
        left = torch.randn(m, k, device=setting.device, dtype=torch.bfloat16)
        right = torch.randn(k, n, device=setting.device, dtype=torch.bfloat16)
        middle = statistics.median(timed(lambda: left @ right, seconds, setting.device))  # noqa: B023
        rows.append(
            {"product": name, "shape": [m, k, n], "flops_per_second": 2 * m * k * n / middle}
        )
    return {"products": rows, "large_squares": measure_peak(setting.device, torch.bfloat16)}


def take_profile(setting: Setting, name: str) -> Found:
    """The kernels that a step of a rung spends most time in."""
    step, batch = build(setting, name)
    for _ in range(WARM_UP):
        step(batch)
    gpu = setting.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    with profile(activities=activities) as seen:
        step(batch)
        synchronize(setting.device)
    field = "self_device_time_total" if gpu else "self_cpu_time_total"
    times = sorted(((getattr(e, field), e.key, e.count) for e in seen.key_averages()), reverse=True)
    total = sum(spent for spent, *_ in times)
    return {
        "kernels": [
            {"kernel": key[:100], "ms": spent / 1e3, "share": spent / total, "calls": count}
            for spent, key, count in times[:KERNELS]
        ]
    }
