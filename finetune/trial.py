"""One fine-tuning: everything read and checked, the folder claimed, trained, scored, written.

`finetune/run.py` runs one, `finetune/grid.py` many.
"""

import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from finetune import results
from finetune.classifier import Classifier, fingerprint, potstill_facts, save_classifier
from finetune.heads import Head, head_for
from finetune.settings import DataSettings, RunSettings, TrainSettings
from finetune.tasks import TaskData
from finetune.training import HeadData, OnEpoch, fine_tune, make_trainer, scores_by_epoch
from potstill.console import say
from potstill.files import write_json
from pretrain.environment import describe_environment


def run_trial(
    where: RunSettings,
    data_settings: DataSettings,
    settings: TrainSettings,
    on_epoch: OnEpoch | None = None,
) -> dict[str, Any]:
    """Fine-tune as the settings say, unless it is done already; its result, as in result.json.

    Args:
        on_epoch: given an epoch's number (from 1) and main score (None: undefined); False ends the
            training there.

    Raises:
        InputError: model, data or folder cannot be used; found before training starts.
        TrainingError: the loss is not finite, or the folder cannot be written.
    """
    use_one_device()
    model_folder, output = Path(where.model), Path(where.output)
    results.check_output(output)
    if where.tokenised is not None:
        results.check_writable(Path(where.tokenised), "--tokenised")

    head = head_for(data_settings, model_folder)
    data = head.data
    classifier = head.load(model_folder, settings.seed)
    classifier.check_epochs(settings.epochs)
    origin = potstill_facts(model_folder)
    config = describe(where, data_settings, settings, data)
    with results.claim(output, config):
        finished = results.read_result(output)
        if finished is not None:
            say(f"finished already: {output / 'result.json'}")
            return finished
        announce(classifier, data, head.order)
        encoded = head.encode(classifier, Path(where.tokenised) if where.tokenised else None)
        scorer, main = head.scorer(encoded), f"eval_{data.main_split}_{data.task.metrics[0]}"
        trainer = make_trainer(
            classifier, encoded, scorer, settings, output, main, on_epoch, head.trainer
        )
        seconds = fine_tune(trainer, settings.epochs)
        keep(classifier, head, where.save_model, output)
        scores = scores_by_epoch(trainer.state.log_history, data)
        passes = scores["last"]["epoch"]  # on_epoch may have ended it before the last one
        result = {
            "model": where.model,
            "task": data.task.name,
            "settings": config,
            "potstill": origin,
            **facts(classifier, data, head.order),
            **volume(encoded, seconds, passes, data_settings.max_length),
            **scores,
            "majority": head.baselines(),
            "precision": "bf16" if trainer.args.bf16 else "fp32",
            "environment": describe_environment(world_size=1),
        }
        results.write_result(output, result, trainer.state.log_history)
        return result


def use_one_device() -> None:
    """Hide all GPUs but the first: the Trainer would multiply --batch_size by their number."""
    if torch.backends.cuda.is_built():  # asking for the number itself could fix it for good
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[0]


def describe(
    run: RunSettings, data_settings: DataSettings, settings: TrainSettings, data: HeadData
) -> dict[str, Any]:
    """What makes this run this run: every setting, and the fingerprints of model and data."""
    named = {**asdict(data_settings), "task": data.task.name}
    return {
        "model": run.model,
        "model_sha256": fingerprint(Path(run.model)),
        "data_sha256": data.sha256,
        "save_model": run.save_model,
        **named,
        **asdict(settings),
    }


def keep(classifier: Classifier, head: Head, model: bool, output: Path) -> None:
    """Write what the head keeps, and the model if wanted; raises a TrainingError if it cannot."""
    with results.writing(output):
        for name, content in head.files(everything=model).items():
            write_json(output / name, content)
        if model:
            save_classifier(classifier, output / "model")


def announce(classifier: Classifier, data: HeadData, order: tuple[str, ...]) -> None:
    """Say what is about to be trained on what, and what starts untrained."""
    rows = ", ".join(f"{split} {len(part)}" for split, part in data.splits.items())
    say(f"{data.task.name}: {rows} rows" + (f"; labels {', '.join(order)}" if order else ""))
    if isinstance(data, TaskData) and order != data.label_names:
        say(f"the model's order of labels is kept; the data has {', '.join(data.label_names)}")
    if classifier.fresh_parameters:
        say(f"starting untrained: {', '.join(classifier.fresh_parameters)}")


def facts(classifier: Classifier, data: HeadData, order: tuple[str, ...]) -> dict[str, Any]:
    """What the result says of model and data."""
    return {
        "parameters": sum(weights.numel() for weights in classifier.model.parameters()),
        "fresh_parameters": list(classifier.fresh_parameters),
        "source": data.source,
        "rows": {split: len(part) for split, part in data.splits.items()},
        "label_names": list(order),
    }


def volume(
    encoded: Mapping[str, Dataset], seconds: Mapping[str, float], passes: int, max_length: int
) -> dict[str, Any]:
    """Time and tokens of `passes` over the training rows.

    `cut_rows` counts the rows (of SQuAD windows) that fill max_length, so perhaps were longer.
    """
    lengths = {split: [len(row) for row in rows["input_ids"]] for split, rows in encoded.items()}
    tokens = sum(lengths["train"]) * passes
    return {
        "seconds": dict(seconds),
        "train_tokens": tokens,
        "tokens_per_second": tokens / seconds["training"] if passes else None,
        "cut_rows": {split: sum(n >= max_length for n in ns) for split, ns in lengths.items()},
    }
