"""What a model costs: parameters, size on disk, FLOPs of a row, and its latency on this machine.

OUTPUT/costs.json keeps what was measured by the models' fingerprints, so that a second report of
the same models on the same machine does not measure again.
"""

import json
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from finetune.classifier import fingerprint
from finetune.reporting.latency import LENGTH, ONNX_PACKAGES, case_names, has_onnx, latencies
from potstill.console import say
from potstill.errors import InputError
from potstill.files import write_json
from pretrain.environment import describe_environment
from pretrain.features import Feature
from pretrain.flops import forward_flops
from pretrain.model_folder import check_model_folder
from pretrain.models import HEADS, shape_of

STORE = "costs.json"


def static_costs(folder: Path) -> dict[str, Any]:
    """What needs no clock: counts of a classifier of two classes made from the model.

    Returns:
        parameters: of encoder and head. parameters_without_embeddings: the same without the
        embeddings of words, positions and types. size_bytes: of the folder's safetensors files.
        flops_per_row: of the encoder's forward pass over 128 tokens, 2 for a multiply-add; None
        for an architecture that Potstill does not distil.

    Raises:
        InputError: the folder holds no model that can be read.
    """
    check_model_folder(folder, "--models")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        with torch.device("meta"):  # shapes only
            model = AutoModelForSequenceClassification.from_config(config)
        parameters = sum(weights.numel() for weights in model.parameters())
        embeddings = sum(w.numel() for w in model.base_model.embeddings.parameters())
    except Exception as error:  # a wrong value raises whatever its first use happens to raise
        raise InputError(f"--models {folder}: no encoder there ({error}); copy it again") from error
    return {
        "parameters": parameters,
        "parameters_without_embeddings": parameters - embeddings,
        "size_bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
        "flops_per_row": row_flops(config),
    }


def row_flops(config: Any) -> float | None:
    """FLOPs of an encoder's forward pass over one row of 128 tokens; None: not one of ours."""
    if config.model_type not in HEADS:
        return None
    shape = shape_of(config)
    return LENGTH * forward_flops(shape, {Feature("hidden", shape.layers)}, LENGTH, 0.0)


def positions(folder: Path) -> int:
    """The longest row that a model takes, as far as its config says."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if config.model_type in HEADS:
        return shape_of(config).positions
    return int(getattr(config, "max_position_embeddings", LENGTH))


def machine(threads: int) -> dict[str, Any]:
    """What latencies depend on besides the model."""
    versions = {}
    for name in ("torch", "transformers", *ONNX_PACKAGES):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    here = describe_environment(world_size=1)
    return {
        **{name: here[name] for name in ("cpu", "cpu_capability", "cpus", "gpu")},
        "threads": threads,
        "versions": versions,
    }


def costs(
    models: Mapping[str, Path], output: Path, threads: int, with_latency: bool
) -> dict[str, dict[str, Any]]:
    """Costs of each model, by name: `static_costs` and, if asked for, "latency_ms" by case.

    A case that could not be measured is None: without onnxruntime, or where the model has fewer
    than 128 positions.

    Raises:
        InputError: a folder holds no model that can be used, or what is stored is damaged.
        TrainingError: an exported model answers otherwise than the one in torch.
    """
    found = {name: static_costs(folder) for name, folder in models.items()}
    if not with_latency:
        return {name: cost | {"latency_ms": {}} for name, cost in found.items()}
    long_enough = {name: folder for name, folder in models.items() if positions(folder) >= LENGTH}
    measured = _measured(long_enough, output / STORE, threads)
    cases = case_names()
    return {
        name: cost | {"latency_ms": {case: measured.get(name, {}).get(case) for case in cases}}
        for name, cost in found.items()
    }


def _measured(models: Mapping[str, Path], path: Path, threads: int) -> dict[str, dict[str, float]]:
    """Latencies by name, from `path` if all are there; else all are timed, in turn, and kept."""
    keys = {name: fingerprint(folder) for name, folder in models.items()}
    here = machine(threads)
    stored = _read(path)
    known: dict[str, dict[str, float]] = stored["models"] if stored["machine"] == here else {}
    if not known.keys() >= set(keys.values()):
        onnx = "" if has_onnx() else "; onnxruntime is missing (pip install -e .[report])"
        folders = {key: models[name] for name, key in keys.items()}
        say(f"timing {len(folders)} models with {threads} threads{onnx}")
        known = {**known, **latencies(folders, threads)}
        write_json(path, {"machine": here, "models": known})
    return {name: known[key] for name, key in keys.items()}


def _read(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {"machine": None, "models": {}}
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        return {"machine": stored["machine"], "models": dict(stored["models"])}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read ({error!r}); remove the file") from error
