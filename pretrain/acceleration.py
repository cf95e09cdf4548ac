"""How a step is made fast on the device at hand; none of it changes what is learned.

A library or a device that is asked for and not there is an error before long work starts, never a
silent fallback; whether a kernel can be built shows when it is. `auto` takes what is always there.
"""

from dataclasses import dataclass
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from potstill.errors import InputError
from pretrain.attention import Backend
from pretrain.options import option

TORCHAO = "torchao==0.18.0"
Fused = Literal["auto", "torch", "deepspeed", "apex"]


@dataclass(frozen=True)
class AccelerationConfig:
    """How a step is made fast."""

    attention: Backend = option("Attention backend.", "auto")
    compile: Literal["auto", "on", "off"] = option(
        "torch.compile both models and the loss. auto: on a GPU, except under ZeRO-3; on a CPU it "
        "is slower than what runs without (docs/speed.md).",
        "auto",
    )
    fused: Fused = option(
        "Whose AdamW (and, with apex, layer norm) updates in one kernel: torch, deepspeed "
        "(FusedAdam on a GPU, CPUAdam on a CPU; built at the first start), or NVIDIA's apex. "
        "auto: torch, which is always there.",
        "auto",
    )
    gradient_checkpointing: bool = option(
        "Compute the student's layers again in backward instead of keeping them: less memory, a "
        "third more of the student's work.",
        False,
    )
    teacher_precision: Literal["auto", "fp8"] = option(
        "auto: that of the student; fp8: the teacher's matrix products in 8 bits, by torchao, on "
        "GPUs that have them (Ada, Hopper and later).",
        "auto",
    )
    teacher_stream: bool = option(
        "Let the teacher run ahead by one micro-batch on a CUDA stream of its own; it needs "
        "gradient_accumulation_steps above 1 to have one to run ahead to.",
        False,
    )

    def check(
        self, device: torch.device, ds_config: dict[str, Any], accumulation: int, dtype: torch.dtype
    ) -> None:
        """Refuse what this machine or this ds_config cannot do.

        Args:
            accumulation: micro-batches of a rank and step. dtype: of teacher and student.

        Raises:
            InputError: names the flag, what is missing, and the remedy.
        """
        if self.compile == "on" and zero_stage(ds_config) == 3:
            raise InputError(
                "--compile on does not go with ZeRO-3, which gathers weights layer by layer; take "
                "stage 0, 1 or 2, or --compile auto"
            )
        if self.fused != "auto" and "optimizer" in ds_config:
            raise InputError(
                f"--fused {self.fused}: the --ds_config names an optimizer of its own; remove that "
                "section, or the flag"
            )
        if self.fused == "apex":
            _check_apex(device)
        if self.teacher_precision == "fp8":
            check_fp8(device, dtype)
        if self.teacher_stream and device.type != "cuda":
            raise InputError(
                f"--teacher_stream needs a CUDA device, and this one is {device.type}; leave it out"
            )
        if self.teacher_stream and accumulation == 1:
            raise InputError(
                "--teacher_stream runs ahead to a step's next micro-batch, and this step has one; "
                "raise gradient_accumulation_steps in the --ds_config, or leave it out"
            )

    def compiles(self, device: torch.device, zero_stage: int) -> bool:
        """Whether models and loss are compiled."""
        automatic = device.type == "cuda" and zero_stage < 3
        return self.compile == "on" or (self.compile == "auto" and automatic)


def _check_apex(device: torch.device) -> None:
    """Refuse to go on without NVIDIA's apex; PyPI's package of that name is a web toolkit."""
    remedy = "build NVIDIA's from github.com/NVIDIA/apex, or take --fused torch"
    spec = find_spec("apex")  # does not import it: the toolkit fails at that in its own ways
    if spec is None:
        raise InputError(f"--fused apex: apex is missing; {remedy}")
    folders = [Path(place) for place in spec.submodule_search_locations or ()]
    if not any(list(folder.glob("normalization*")) for folder in folders):
        found = _installed("apex") or "of unknown version"
        raise InputError(f"--fused apex: apex {found} is installed, but is not NVIDIA's; {remedy}")
    try:
        import_module("apex.optimizers").FusedAdam  # noqa: B018
        import_module("apex.normalization").FusedLayerNorm  # noqa: B018
    except (ImportError, AttributeError) as error:
        raise InputError(f"--fused apex: apex cannot be used ({error}); {remedy}") from error
    if device.type != "cuda":
        raise InputError(f"--fused apex needs a CUDA device, not {device.type}; take --fused torch")


def _installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def check_fp8(device: torch.device, dtype: torch.dtype) -> None:
    """Refuse an FP8 teacher where the hardware, the precision or torchao is missing.

    Raises:
        InputError: names which.
    """
    remedy = "take --teacher_precision auto"
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
        raise InputError(
            "--teacher_precision fp8 needs a GPU with FP8 units (Ada, Hopper or later), and "
            f"{device} has none; {remedy}"
        )
    if dtype != torch.bfloat16:
        raise InputError(
            f"--teacher_precision fp8 quantises a bfloat16 teacher, and this one is {dtype}; "
            f"enable bf16 in the --ds_config, or {remedy}"
        )
    if _installed("torchao") is None:
        raise InputError(
            f"--teacher_precision fp8 needs torchao: pip install {TORCHAO}, or {remedy}"
        )


def to_fp8(model: nn.Module) -> None:
    """Let a frozen model's linear layers multiply in FP8: weights once, activations as they come.

    The scales are per row, so that one outlier costs its own row only. The MLM head stays as it
    is: its logits are what `kd` compares.
    """
    quantization = import_module("torchao.quantization")
    settings = quantization.Float8DynamicActivationFloat8WeightConfig(
        granularity=quantization.PerRow()
    )
    encoder: Any = model.base_model
    quantization.quantize_(encoder.encoder, settings)


def use_apex_layer_norm(model: nn.Module) -> None:
    """Put apex's FusedLayerNorm, with the same weights and names, in place of `nn.LayerNorm`."""
    fused = import_module("apex.normalization").FusedLayerNorm
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.LayerNorm:
                own = fused(child.normalized_shape, eps=child.eps)
                own.weight, own.bias = child.weight, child.bias
                setattr(module, name, own)


def zero_stage(config: dict[str, Any]) -> int:
    """How much of the training's state ZeRO shares out: nothing (0) to everything (3)."""
    return int(config.get("zero_optimization", {}).get("stage", 0))


def offloads_optimizer(config: dict[str, Any]) -> bool:
    """Whether the optimiser's states stand outside the device: the CPU works on them."""
    offload = config.get("zero_optimization", {}).get("offload_optimizer") or {}
    return offload.get("device") == "cpu"
