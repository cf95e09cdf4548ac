"""What an extraction kept, cost and did to the loss: printed, and written beside the student."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from data_prep.shard_format import TRAIN
from potstill.console import say
from potstill.files import whole_folder, write_json, write_text
from pretrain.environment import git_commit
from pretrain.extract_config import IMPORTANCE
from pretrain.models import HEADS, UNTRAINED, Encoder
from pretrain.student.extraction import RECORD, Extraction
from pretrain.student.importance import importance_flops
from pretrain.student.width import INCONSISTENT, Indices, Kept
from pretrain.summary import describe_shape


def parameters_by_kind(model: nn.Module) -> dict[str, int]:
    """Parameters of embeddings, attention, ffn, norms and head; a tied decoder is an embedding."""
    counts = dict.fromkeys(("embeddings", "attention", "ffn", "norms", "head"), 0)
    heads = HEADS[model.config.model_type]  # type: ignore[union-attr, index]
    words = model.get_input_embeddings().weight  # type: ignore[operator]
    for name, parameter in model.named_parameters():
        if parameter is words:  # the library lists XLM-R's under the head that shares it
            kind = "embeddings"
        elif name.split(".")[0] in heads:
            kind = "head"
        elif "LayerNorm" in name:
            kind = "norms"
        elif ".embeddings" in name:
            kind = "embeddings"
        else:
            kind = "attention" if ".attention." in name else "ffn"
        counts[kind] += parameter.numel()
    return counts


def ranges(indices: Indices) -> str:
    """Ascending indices in short: `0-3,7`."""
    starts = [i for n, i in enumerate(indices) if n == 0 or indices[n - 1] != i - 1]
    ends = [i for n, i in enumerate(indices) if n + 1 == len(indices) or indices[n + 1] != i + 1]
    pairs = zip(starts, ends, strict=True)
    return ",".join(f"{a}-{b}" if b > a else f"{a}" for a, b in pairs)


def describe_kept(kept: Kept, chosen: Sequence[int]) -> list[dict[str, Any]]:
    """The kept indices of each student layer, in short."""
    return [
        {
            "teacher_layer": number,
            "hidden": ranges(kept.hidden[number - 1]),
            "ffn": ranges(kept.ffn[number - 1]),
            "query_key": [ranges(one) for one in kept.query_key[number - 1]],
            "value": [ranges(one) for one in kept.value[number - 1]],
        }
        for number in chosen
    ]


def describe(
    job: Extraction, kept: Kept, student: Encoder, losses: tuple[float, float] | str
) -> dict[str, Any]:
    """The content of extraction.json."""
    config, manifest = job.config, job.manifest
    flops, rows = 0.0, 0
    if config.method == IMPORTANCE and manifest:
        rows = min(config.rows, manifest.splits[TRAIN].rows)
        per_token = importance_flops(job.teacher.shape, manifest.seq_length, config.mlm_probability)
        flops = per_token * rows * manifest.seq_length
    return {
        "identity": config.identity(),
        "teacher": describe_shape(job.teacher),
        "student": asdict(student.shape),
        "teacher_layers": job.chosen,
        "hidden_consistency": config.ablation != INCONSISTENT,
        "importance_rows": rows,
        "flops": flops,
        "mlm_loss": losses
        if isinstance(losses, str)
        else dict(zip(("teacher", "student"), losses, strict=True)),
        "parameters": {
            kind: {"teacher": before, "student": parameters_by_kind(student.model)[kind]}
            for kind, before in parameters_by_kind(job.teacher.model).items()
        },
        "untrained": getattr(student.model.config, UNTRAINED),
        "code_commit": git_commit(),
        "kept": describe_kept(kept, job.chosen),
    }


def show(record: dict[str, Any]) -> None:
    """Print what was kept, what it cost, and what it did to the loss."""
    say("parameters      teacher      student   kept")
    for kind, count in record["parameters"].items():
        share = count["student"] / count["teacher"]
        say(f"{kind:11} {count['teacher']:>11,}  {count['student']:>11,}  {share:5.1%}")
    say(f"cost       {record['flops']:.2e} FLOP on {record['importance_rows']:,} rows")
    loss = record["mlm_loss"]
    if not isinstance(loss, str):
        loss = f"teacher {loss['teacher']:.4f}, student {loss['student']:.4f} (held-out rows)"
    say(f"MLM loss   {loss}")


def write(folder: Path, student: Encoder, tokenizer: Any, record: dict[str, Any]) -> None:
    """Write the Hugging Face folder, atomically."""
    with whole_folder(folder) as beside:
        student.model.cpu().save_pretrained(beside)  # type: ignore[operator]
        tokenizer.save_pretrained(beside)
        write_text(beside / "README.md", _card(record))
        write_json(beside / RECORD, record)


def _card(record: dict[str, Any]) -> str:
    """The model card."""
    told, shape, loss = record["identity"], record["student"], record["mlm_loss"]
    losses = loss if isinstance(loss, str) else f"{loss['teacher']:.4f} → {loss['student']:.4f}"
    parts = ", ".join(f"`{part}`" for part in record["untrained"]) or "none"
    return f"""---
library_name: transformers
pipeline_tag: fill-mask
tags: [potstill, extraction]
---

# {shape["layers"]}x{shape["hidden"]} student, extracted

Parts of a larger encoder, cut out with Potstill (ETD) as the start of a distillation; not yet
distilled. It opens with `AutoModelForMaskedLM` or any `AutoModelFor…` class.

| | |
|---|---|
| teacher | {record["teacher"]} |
| method | {told["method"]}, ablation {told["ablation"]}, seed {told["seed"]} |
| teacher layers | {", ".join(map(str, record["teacher_layers"]))} |
| rows for importance | {record["importance_rows"]} |
| MLM loss, teacher → student | {losses} |
| cost | {record["flops"]:.2e} FLOP |
| code commit | {record["code_commit"] or "unknown"} |

Parts that were never trained: {parts}.
"""
