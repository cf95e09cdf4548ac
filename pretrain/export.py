"""The student as a Hugging Face folder: weights, tokenizer, model card, and a check of it all."""

import copy
import html
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForMaskedLM

from data_prep.shard_format import TOKENIZER_FOLDER
from potstill.console import is_main_rank
from potstill.errors import TrainingError
from potstill.files import whole_folder, write_json, write_text
from pretrain.agreement import from_main_rank
from pretrain.attention import Attention
from pretrain.batches import Batch
from pretrain.checkpoint import disk_errors
from pretrain.encoder import encode
from pretrain.engine_state import whole_weights
from pretrain.features import Feature
from pretrain.models import UNTRAINED
from pretrain.step import Distillation, evaluation_mode

LARGEST_DIFFERENCE = {torch.float32: 1e-4, torch.bfloat16: 0.25, torch.float16: 0.03}
"""Between logits before and after an export, by the trainer's precision; seen is 0 in float32."""


def full_weights(engine: Any, frozen: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The student's weights in float32 on the CPU, by name; all ranks call it, rank 0 gets them.

    Under half precision they are the optimiser's master weights, and what was never trained is
    as it was before it was rounded. Under ZeRO-3 the parts of all ranks are gathered.
    """
    masters = whole_weights(engine)
    if not is_main_rank():
        return {}
    names = (name for name, _ in engine.module.student.named_parameters())
    return {n: frozen[n] if n in frozen else masters[f"student.{n}"] for n in names}


def export_student(
    engine: Any,
    frozen: Mapping[str, Tensor],
    untrained: list[str],
    facts: Mapping[str, Any],
    shards: Path,
    folder: Path,
    probe: Batch,
) -> float:
    """Write the student to `folder`, atomically, open it again and compare logits.

    Args:
        frozen, untrained: from `freeze_unreached`. facts: rows of the model card, in order.
        shards: whose tokenizer goes along. probe: a few rows for the comparison.

    Returns:
        The largest absolute difference between the logits of the trainer's student and of the
        reopened folder in the trainer's precision.

    Raises:
        TrainingError: they differ by more than rounding explains; on every rank.
        OSError: rank 0 cannot write; on every rank.
    """
    module: Distillation = engine.module
    probe = probe.to(engine.device)
    with evaluation_mode(module):
        ours = module.logits(probe)
    weights = full_weights(engine, frozen)

    def write() -> float:
        with whole_folder(folder) as beside:
            _write_model(module.student, weights, untrained, beside)
            _copy_tokenizer(shards, beside)
            write_text(beside / "README.md", _card_text(facts, untrained))
            write_json(beside / "potstill.json", {**facts, "untrained": untrained})
        difference = _difference(folder, ours, probe, module.attention)
        largest = LARGEST_DIFFERENCE[ours.dtype]
        if not difference <= largest:
            raise TrainingError(
                f"{folder}: the exported student's logits differ from the trainer's by "
                f"{difference}, more than {largest}; do not use it. The checkpoints are unharmed"
            )
        return difference

    return from_main_rank(write)


def _copy_tokenizer(shards: Path, folder: Path) -> None:
    """Its files, not their permissions: shards may be for reading only."""
    for file in (shards / TOKENIZER_FOLDER).iterdir():
        shutil.copyfile(file, folder / file.name)


def _write_model(
    student: nn.Module, weights: Mapping[str, Tensor], untrained: list[str], folder: Path
) -> None:
    config = copy.deepcopy(student.config)
    setattr(config, UNTRAINED, untrained)
    config.dtype = torch.float32
    model = AutoModelForMaskedLM.from_config(config, dtype=torch.float32)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    parameters = {name for name, _ in model.named_parameters()}
    assert not unexpected and not parameters & set(missing), (missing, unexpected)
    model.tie_weights()
    with disk_errors(folder):
        model.save_pretrained(folder)


@torch.no_grad()
def _difference(folder: Path, ours: Tensor, probe: Batch, attention: Attention) -> float:
    model = AutoModelForMaskedLM.from_pretrained(folder, dtype=torch.float32)
    model = model.to(device=ours.device, dtype=ours.dtype).eval()
    feature = Feature("logits", "all")
    reopened = encode(model, probe, frozenset({feature}), attention)[feature]
    return float((reopened.float() - ours.float()).abs().max())


def _card_text(facts: Mapping[str, Any], untrained: list[str]) -> str:
    rows = "\n".join(f"| {name} | {_cell(value)} |" for name, value in facts.items())
    parts = ", ".join(f"`{part}`" for part in untrained) or "none"
    return f"""---
library_name: transformers
pipeline_tag: fill-mask
tags: [potstill, distillation]
---

# {facts["name"]}

A general student encoder, distilled at the pretraining stage with Potstill; fine-tune it like its
teacher. It opens with `AutoModelForMaskedLM` or any `AutoModelFor…` class.

| | |
|---|---|
{rows}

Parts that no objective trained (they are as initialised): {parts}.
Where the MLM head is among them, fill-mask gives nothing of worth.
"""


def _cell(value: Any) -> str:
    """A value in a row of a Markdown table, in one line."""
    return html.escape(" ".join(str(value).split()), quote=False).replace("|", "\\|")
