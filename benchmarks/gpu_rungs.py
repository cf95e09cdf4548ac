"""The rungs of `benchmarks/gpu.py`: each builds a training step that is one thing faster.

A rung gets a `Setting` and gives a function that takes one step on a batch. What it needs and does
not find (a GPU, a package, a capability) it says by an `InputError`, which becomes its table row.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from bare_step import BareStep, Learning, MasterWeights, Precision
from naive import NaiveStep
from torch import Tensor

from potstill.errors import InputError
from pretrain.acceleration import check_fp8
from pretrain.batches import Batch
from pretrain.config import ScheduleConfig
from pretrain.optim import build_optimizer

Step = Callable[[Batch], Any]


@dataclass(frozen=True)
class Setting:
    """What a step is taken on."""

    learning: Learning
    rows: int
    length: int
    device: torch.device

    def bare(self, precision: Precision = "bf16", compile: bool = False) -> BareStep:
        """The product's own step."""
        return BareStep(
            self.learning, precision, self.rows, self.length, compile=compile, device=self.device
        )

    def need_gpu(self, what: str) -> None:
        """Refuse what only a GPU has.

        Raises:
            InputError: the device is none.
        """
        if self.device.type != "cuda":
            raise InputError(f"{what} needs a GPU; --device is {self.device.type}")


def naive(setting: Setting) -> Step:
    """The library's own models in float32, eager attention, all heads and layers."""
    return NaiveStep(setting.learning, False, setting.device).step


def autocast(setting: Setting) -> Step:
    """The same under bfloat16 autocast."""
    return NaiveStep(setting.learning, True, setting.device).step


def sdpa(setting: Setting) -> Step:
    """The same with the library's SDPA attention, without attention probabilities as output."""
    return NaiveStep(setting.learning, True, setting.device, "sdpa").step


def lean_fp32(setting: Setting) -> Step:
    """Ours in float32: nothing behind the deepest feature, masked positions only."""
    return with_optimizer(setting.bare("fp32"), "foreach").step


def lean(setting: Setting) -> Step:
    """Ours in bfloat16 over float32 master weights; AdamW as PyTorch has it by default."""
    return with_optimizer(setting.bare(), "foreach").step


def fused(setting: Setting) -> Step:
    """The same with PyTorch's fused AdamW."""
    return setting.bare().step


def compiled(setting: Setting) -> Step:
    """The same with both models and the loss compiled."""
    return setting.bare(compile=True).step


def cuda_graphs(setting: Setting) -> Step:
    """The same, replayed as CUDA graphs (compile mode reduce-overhead)."""
    setting.need_gpu("a CUDA graph")
    bare = setting.bare()
    bare.compile(mode="reduce-overhead")

    def step(batch: Batch) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return bare.step(batch)

    return step


def own_stream(setting: Setting) -> Step:
    """Compiled, the teacher's forward of the next micro-batch beside the student's work.

    A step here is one update from two micro-batches, halves of the batch.
    """
    setting.need_gpu("a stream of its own")
    bare = setting.bare(compile=True)
    bare.teacher.stream = torch.cuda.Stream(setting.device)
    return lambda batch: bare.step(*halves(batch))


def halves(batch: Batch) -> tuple[Batch, Batch]:
    """The upper and the lower rows of a batch without padding, of an even number of rows."""
    parts: dict[str, tuple[Tensor, Tensor]] = {
        name: getattr(batch, name).tensor_split(2)
        for name in ("input_ids", "valid", "masked", "labels")
    }
    upper, lower = parts["masked"]
    parts["masked"] = upper, lower - batch.input_ids.numel() // 2
    counts = {name: count // 2 for name, count in batch.counts.items()}
    first, second = (
        replace(batch, counts=counts, **{name: part[side] for name, part in parts.items()})
        for side in (0, 1)
    )
    return first, second


def fp8_teacher(setting: Setting) -> Step:
    """Compiled, the teacher's products in FP8."""
    setting.need_gpu("an FP8 teacher")
    bare = setting.bare()
    check_fp8(setting.device, torch.bfloat16)
    bare.teacher.quantize()
    bare.compile()
    return bare.step


def with_deepspeed(setting: Setting) -> Step:
    """Compiled, with DeepSpeed's FusedAdam."""
    setting.need_gpu("DeepSpeed's FusedAdam")
    return with_optimizer(setting.bare(compile=True), "deepspeed").step


def with_apex(setting: Setting) -> Step:
    """Compiled, with NVIDIA apex's FusedAdam."""
    setting.need_gpu("apex's FusedAdam")
    return with_optimizer(setting.bare(compile=True), "apex").step


def with_optimizer(bare: BareStep, kind: str) -> BareStep:
    """The step with another AdamW: `foreach`, `deepspeed` or `apex`.

    Raises:
        InputError: its package is missing, or is another one of that name.
    """
    holder: Any = bare.optimizer
    if isinstance(holder, MasterWeights):
        holder.optimizer = _build_optimizer(holder.optimizer, kind)
    else:
        bare.optimizer = _build_optimizer(holder, kind)
    return bare


def _build_optimizer(old: Any, kind: Any) -> Any:
    """An AdamW of this kind over the groups of another one."""
    names = ("params", "weight_decay")
    groups = [{name: group[name] for name in names} for group in old.param_groups]
    settings = ScheduleConfig(max_steps=1)
    if kind == "foreach":
        return torch.optim.AdamW(groups, lr=settings.lr, foreach=True)
    try:
        return build_optimizer(groups, settings, kind)
    except (ImportError, AttributeError) as error:
        raise InputError(f"{kind}: no FusedAdam here ({error}); install {kind}") from error


class Rung(NamedTuple):
    """A step of the ladder; those that are not `main` run for the first case only."""

    build: Callable[[Setting], Step]
    what: str
    main: bool = False


RUNGS: Mapping[str, Rung] = {
    "naive-fp32": Rung(naive, "library, eager attention, everything computed, fp32"),
    "naive-bf16": Rung(autocast, "the same under bf16 autocast", True),
    "sdpa": Rung(sdpa, "the same with SDPA"),
    "lean-fp32": Rung(lean_fp32, "ours: dead compute off, fp32"),
    "lean-bf16": Rung(lean, "ours in bf16, foreach AdamW"),
    "fused": Rung(fused, "+ torch's fused AdamW", True),
    "compile": Rung(compiled, "+ torch.compile", True),
    "cuda-graphs": Rung(cuda_graphs, "+ CUDA graphs"),
    "own-stream": Rung(own_stream, "compile, teacher on its own stream"),
    "fp8-teacher": Rung(fp8_teacher, "compile, FP8 teacher (torchao)"),
    "apex-adam": Rung(with_apex, "compile, apex's FusedAdam"),
    "deepspeed-adam": Rung(with_deepspeed, "compile, DeepSpeed's FusedAdam"),
}
