"""The measurements of `benchmarks/gpu.py`, each in a process of its own.

A kernel that fails leaves a GPU's context unusable, and a compiler that fails can leave PyTorch so;
neither may spoil the rungs behind it. The processes are forked from a server that has imported
PyTorch, but not touched the device, so that starting one takes no more than opening the device.
Each leads a group of its own, which is killed with it: an nvcc that runs on would slow the next
rung. What one builds in PyTorch's extension folder goes, too, since a build that was killed leaves
a lock there, at which the next one would wait for ever.
"""

import multiprocessing
import os
import signal
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

import torch
from bare_step import MASKED_SHARE, random_batch
from common import quartiles, seconds
from gpu_rungs import RUNGS, Setting, Step
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from potstill.errors import InputError
from pretrain.batches import Batch
from pretrain.flops import Work, training_flops
from pretrain.models import Shape
from pretrain.peak import measure_peak, product_speed

WARM_UP = 3
KERNELS = 12
PRELOADED = [
    *("torch._dynamo", "transformers.models.bert.modeling_bert"),
    *("pretrain.step", "pretrain.teacher", "data_prep.shard_format"),
]
"""What takes seconds to import and does not touch the device; the server does not look here."""
Found = Mapping[str, Any]
"""Figures, or under `reason` why there are none."""


def isolated(limit: float, act: Callable[..., Found], *arguments: Any) -> Found:
    """What an act gives in a process of its own, or why it gave nothing.

    Args:
        limit: seconds, after which the process is killed with all that it has started.
    """
    # otherwise a library that asks for a GPU opens the device in the server, which forks then
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    receive, send = context.Pipe(duplex=False)
    # what dies while its files go may still add one
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as extensions:
        process = context.Process(target=_call, args=(send, extensions, act, arguments))
        process.start()
        assert process.pid is not None
        send.close()
        try:
            if not receive.poll(limit):
                return {"reason": f"took longer than {limit:.0f} s"}
            return dict(receive.recv())
        except EOFError:
            process.join()
            return {"reason": f"its process ended with status {process.exitcode}"}
        finally:
            with suppress(ProcessLookupError):  # no group yet, or nobody left in it
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.join()


def _call(
    send: Connection, extensions: str, act: Callable[..., Found], arguments: tuple[Any, ...]
) -> None:
    os.setsid()
    os.environ["TORCH_EXTENSIONS_DIR"] = extensions
    try:
        found = act(*arguments)
    except InputError as error:
        found = {"reason": str(error)}
    except Exception as error:  # whatever a kernel, a compiler or a package does on a new machine
        lines = [line for line in str(error).splitlines() if line.strip()]
        found = {"reason": f"{type(error).__name__}: {' '.join(lines[:2])[:200]}"}
    send.send(dict(found))


def timed(act: Callable[[], Any], wanted: float, device: torch.device) -> list[float]:
    """Seconds of each of several calls after a warm-up: at least three, `wanted` in all."""
    for _ in range(WARM_UP):
        act()
    found: list[float] = []
    while len(found) < 3 or sum(found) < wanted:
        found.append(seconds(act, device))
    return found


def build(setting: Setting, name: str) -> tuple[Step, Batch]:
    """A rung's step, and the batch that it takes again and again."""
    batch = random_batch(setting.learning.pair.vocab, setting.rows, setting.length)
    return RUNGS[name].build(setting), batch.to(setting.device)


def take_step(setting: Setting, name: str, wanted: float) -> Found:
    """Seconds of a step of a rung over `wanted` seconds, its speed, and the most tensor memory.

    `needed_flops_per_second` counts what the objective needs, whatever the rung computes.
    """
    step, batch = build(setting, name)
    found = timed(lambda: step(batch), wanted, setting.device)
    spread, gpu = quartiles(found), setting.device.type == "cuda"
    speed = setting.rows * setting.length / spread["median"]
    return {
        "seconds": spread["median"],
        "low": spread["low"],
        "high": spread["high"],
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


def take_gemms(setting: Setting, wanted: float) -> Found:
    """bf16 products at the shapes of a teacher's layer and of its head, and of large squares."""
    tokens, width = setting.rows * setting.length, setting.learning.pair.teacher[1]
    shapes = {
        "projection": (tokens, width, width),
        "feed-forward in": (tokens, width, 4 * width),
        "feed-forward out": (tokens, 4 * width, width),
        "MLM head": (max(1, round(MASKED_SHARE * tokens)), width, setting.learning.pair.vocab),
    }
    rows = []
    for name, shape in shapes.items():
        speed = product_speed(shape, setting.device, torch.bfloat16, wanted)
        rows.append({"product": name, "shape": list(shape), "flops_per_second": speed})
    return {"products": rows, "large_squares": measure_peak(setting.device, torch.bfloat16)}


def take_profile(setting: Setting, name: str) -> Found:
    """The kernels that a step of a rung spends most time in."""
    step, batch = build(setting, name)
    for _ in range(WARM_UP):
        step(batch)
    gpu = setting.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    with profile(activities=activities) as seen:
        seconds(lambda: step(batch), setting.device)
    field = "self_device_time_total" if gpu else "self_cpu_time_total"
    events = [e for e in seen.key_averages() if not gpu or is_kernel(e)]
    times = sorted(((getattr(e, field), e.key, e.count) for e in events), reverse=True)
    total = sum(spent for spent, *_ in times)
    rows = [
        {"kernel": key[:100], "ms": spent / 1e3, "share": spent / total, "calls": count}
        for spent, key, count in times[:KERNELS]
    ]
    return {"kernels": [{"rung": name, **row} for row in rows]}


def is_kernel(event: Any) -> bool:
    """Whether an average is of work on a GPU: what launches it has the same device time."""
    return event.device_type != DeviceType.CPU and not event.is_user_annotation
