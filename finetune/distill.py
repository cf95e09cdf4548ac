"""Distil a teacher fine-tuned on a task into a student with fewer layers, and score the student.

python finetune/distill.py --teacher runs/rte/model --task rte --data glue/ --init 1,2,3 \
    --objective att-mse --output runs/rte-att-mse
"""

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import EvalPrediction

from finetune import results
from finetune.classifier import save_classifier
from finetune.distillation.lessons import Intermediate, Lesson, Prediction, label_loss
from finetune.distillation.models import make_trainable
from finetune.distillation.parts import Parts, prepare
from finetune.distillation.settings import DistillSettings, parse
from finetune.distillation.stages import Pace, StageResult, train_stage
from finetune.run import report
from finetune.training import OnEpoch, scores_by_epoch
from finetune.trial import announce, facts, use_one_device, volume
from potstill.console import program, say
from potstill.files import write_json
from potstill.signals import Signalled, Stopped, raised_signals
from pretrain.environment import describe_environment
from pretrain.models import shape_of

EVALUATED = 64  # rows at a time, at least


@program
def main(arguments: Sequence[str] | None = None) -> None:
    """Distil as the command line says; `arguments` stands in for it."""
    try:
        with raised_signals():
            settings = parse(arguments)
            report(run_distillation(settings), Path(settings.folders.output))
    except Signalled as signalled:
        kept = "no result is kept: run the same command again, and it starts anew"
        raise Stopped(signalled.number, kept) from None


def run_distillation(settings: DistillSettings, on_epoch: OnEpoch | None = None) -> dict[str, Any]:
    """Distil as the settings say, unless it is done already; its result, as in result.json.

    Args:
        on_epoch: given an epoch of stage 2 (from 1) and its main score (None: undefined); False
            ends the training there.

    Raises:
        InputError: models, data or folders cannot be used; found before training starts.
        TrainingError: the loss is not finite, or a folder cannot be written.
    """
    use_one_device()
    output = Path(settings.folders.output)
    results.check_output(output)
    parts = prepare(settings)
    with results.claim(output, parts.config):
        finished = results.read_result(output)
        if finished is not None:
            say(f"finished already: {output / 'result.json'}")
            return finished
        announce(parts.student, parts.head.data, parts.head.order)
        run = Run(parts, on_epoch)
        run.train()
        result = run.result()
        if settings.folders.save_model:
            with results.writing(output):
                save_classifier(parts.student, output / "model")
                facts_file = output / "model/potstill.json"
                write_json(facts_file, {"distillation": result["distillation"]})
        results.write_result(output, result, run.log)
        return result


class Run:
    """Both stages, and the scores behind each epoch of the second."""

    def __init__(self, parts: Parts, on_epoch: OnEpoch | None = None) -> None:
        self.log: list[dict[str, Any]] = []
        self.stages: dict[str, StageResult] = {}
        self._parts, self._on_epoch = parts, on_epoch
        self._scorer = parts.head.scorer(parts.encoded)
        self._evaluating = 0.0  # seconds

    def train(self) -> None:
        """Stage 1, then stage 2; a stage without epochs is left out."""
        recipe = self._parts.settings.recipe
        torch.manual_seed(recipe.seed)  # of the projections
        make_trainable(self._parts.student, self._parts.computing)
        steps = 0
        for lesson, epochs, lr in self._lessons():
            steps += self._train(lesson, epochs, lr, steps)
        if not recipe.epochs:
            self._after_epoch(0, steps)

    def _lessons(self) -> list[tuple[Lesson, int, float]]:
        """The stages that there are, with their epochs and learning rates."""
        parts, settings, recipe = self._parts, self._parts.settings, self._parts.settings.recipe
        student, source = parts.student.model, parts.source()
        lessons: list[tuple[Lesson, int, float]] = []
        if parts.objective is not None and recipe.intermediate_epochs:
            projections = parts.objective.projections(
                shape_of(student.config), shape_of(parts.teacher.model.config)
            )
            first = Intermediate(student, source, parts.computing, parts.objective, projections)
            lessons.append((first, recipe.intermediate_epochs, settings.intermediate_lr))
        if recipe.epochs:
            second = Prediction(
                student,
                source,
                parts.computing,
                recipe.temperature,
                parts.head.data.task.regression,
                parts.rows["train"].labels if recipe.vanilla else None,
            )
            lessons.append((second, recipe.epochs, settings.lr))
        return lessons

    def _train(self, lesson: Lesson, epochs: int, lr: float, first_step: int) -> int:
        settings, recipe = self._parts.settings, self._parts.settings.recipe
        pace = Pace(
            epochs,
            lr,
            settings.batch_size,
            recipe.accumulation,
            recipe.warmup,
            recipe.weight_decay,
            recipe.seed,
        )
        scored = isinstance(lesson, Prediction)
        result = train_stage(
            lesson,
            self._parts.rows["train"],
            pace,
            first_step,
            self.log.append,
            self._after_epoch if scored else _go_on,
        )
        self.stages[lesson.name] = result
        return result.steps

    def _after_epoch(self, epoch: int, step: int) -> bool:
        """Score the student on every validation split; whether to go on."""
        start = time.perf_counter()
        for split in self._parts.rows:
            if split != "train":
                found = self._evaluate(split)
                line = {f"eval_{split}_{name}": value for name, value in found.items()}
                self.log.append({"stage": results.PREDICTION, "epoch": epoch, "step": step, **line})
        self._evaluating += time.perf_counter() - start
        data = self._parts.head.data
        main = scores_by_epoch(self.log, data)["last"]["scores"][data.main_split]
        return self._on_epoch is None or self._on_epoch(epoch, main[data.task.metrics[0]])

    @torch.no_grad()
    def _evaluate(self, split: str) -> dict[str, float | None]:
        """Mean loss against the true labels, and the task's metrics."""
        parts, rows = self._parts, self._parts.rows[split]
        model, computing = parts.student.model.eval(), parts.computing
        outputs = torch.zeros(len(rows.lengths), max(1, len(parts.head.order)))
        for numbers in rows.by_length(max(EVALUATED, parts.settings.batch_size)):
            batch = rows.batch(numbers).to(computing.device)
            outputs[numbers] = computing.logits(model, batch).cpu()
        loss = label_loss(outputs, rows.labels, parts.head.data.task.regression) / len(outputs)
        predicted = EvalPrediction(outputs.numpy(), np.asarray(rows.labels))
        return {"loss": float(loss), **self._scorer(predicted)}

    def result(self) -> dict[str, Any]:
        """What result.json holds."""
        parts, recipe = self._parts, self._parts.settings.recipe
        training = sum(stage.seconds for stage in self.stages.values())
        passes = sum(len(stage.losses) for stage in self.stages.values())
        seconds = {"training": training, "evaluation": self._evaluating}
        return {
            "model": parts.settings.folders.teacher,
            "task": parts.head.data.task.name,
            "settings": parts.config,
            "potstill": parts.origin,
            **facts(parts.student, parts.head.data, parts.head.order),
            **volume(parts.encoded, seconds, passes, parts.head.max_length),
            **scores_by_epoch(self.log, parts.head.data),
            "majority": parts.head.baselines(),
            "precision": "bf16" if parts.computing.dtype == torch.bfloat16 else "fp32",
            "environment": describe_environment(world_size=1),
            "distillation": {
                "teacher": parts.settings.folders.teacher,
                "objective": recipe.objective,
                "init": parts.plan.init,
                "layers": [list(pair) for pair in parts.plan.pairs],
                "stages": {name: asdict(stage) for name, stage in self.stages.items()},
            },
        }


def _go_on(epoch: int, step: int) -> bool:
    """Stage 1 is not scored: the student's outputs come only with stage 2."""
    return True


if __name__ == "__main__":
    main()
