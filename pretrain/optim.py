"""Which parameters are trained, and by what."""

from typing import Any

import torch
from torch import nn

from pretrain.config import ScheduleConfig


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: matrices decay; biases and layer norms do not."""
    trained = [p for p in module.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]


def build_optimizer(groups: list[dict[str, Any]], settings: ScheduleConfig) -> torch.optim.AdamW:
    """AdamW in one fused kernel per device, for a ds_config without an optimizer section."""
    return torch.optim.AdamW(
        groups,
        lr=settings.lr,
        betas=(settings.adam_beta1, settings.adam_beta2),
        eps=settings.adam_eps,
        fused=True,
    )
