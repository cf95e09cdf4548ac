"""Which parameters are trained, and by what."""

from importlib import import_module
from typing import Any

import torch
from torch import nn

from potstill.errors import InputError
from pretrain.acceleration import Fused
from pretrain.config import ScheduleConfig


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: matrices decay; biases and layer norms do not."""
    trained = [p for p in module.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]


def build_optimizer(
    groups: list[dict[str, Any]],
    settings: ScheduleConfig,
    fused: Fused = "auto",
    on_cpu: bool = False,
) -> torch.optim.Optimizer:
    """AdamW in one fused kernel per device, for a ds_config without an optimizer section.

    Args:
        on_cpu: whether its states stand in the CPU's memory: on a CPU, or offloaded by ZeRO.

    Raises:
        InputError: DeepSpeed cannot build its kernel here.
    """
    betas = (settings.adam_beta1, settings.adam_beta2)
    common: dict[str, Any] = {"lr": settings.lr, "betas": betas, "eps": settings.adam_eps}
    if fused == "apex":
        return import_module("apex.optimizers").FusedAdam(groups, adam_w_mode=True, **common)
    if fused != "deepspeed":
        return torch.optim.AdamW(groups, fused=True, **common)
    adam = import_module("deepspeed.ops.adam")
    try:
        if on_cpu:
            return adam.DeepSpeedCPUAdam(groups, adamw_mode=True, **common)
        return adam.FusedAdam(groups, adam_w_mode=True, **common)
    except (RuntimeError, OSError, ImportError) as error:
        raise InputError(
            f"--fused deepspeed: its kernel cannot be built here ({error}); it needs a compiler "
            "and, for a GPU, the CUDA toolkit; or take --fused torch"
        ) from error
