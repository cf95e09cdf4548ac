"""What is done for one point: store, train all seeds, validate, fine-tune; each stage once.

The programs of `pretrain/` run as processes of their own, which resume by themselves.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import pretrain
from data_prep.shard_format import TRAIN, Manifest
from finetune.search.folder import Records
from finetune.search.points import NONE, Point
from finetune.search.settings import INPUTS, STORING, STUDENT, SearchSettings
from finetune.search.students import write_untrained
from finetune.settings import RunSettings
from finetune.trial import run_trial
from potstill.console import say
from potstill.errors import TrainingError
from potstill.files import write_json
from potstill.signals import Signalled
from pretrain import config as training
from pretrain.knowledge import settings as storing
from pretrain.knowledge.job import check_cut
from pretrain.objectives import LayerPair, Settings, build_objective

STORE, TRAINING, VALIDATE = "store", "train", "validate"
PROGRAMS = Path(str(pretrain.__file__)).parent
CHECKPOINTS = 10  # of a training, so that one that is killed loses a tenth


class Runner:
    """Does the stages of points in the folder of a search.

    Args:
        teacher_layers: how many the teacher has.
    """

    def __init__(self, settings: SearchSettings, manifest: Manifest, teacher_layers: int) -> None:
        self._settings, self._manifest = settings, manifest
        self._teacher_layers = teacher_layers
        self._output = Path(os.path.abspath(settings.output))
        self._seeds = range(settings.seeds)

    def check(self, points: Iterable[Point]) -> None:
        """Refuse cuts that the objective cannot learn from, and flags that a program would refuse.

        Raises:
            InputError: there is one.
        """
        pair = LayerPair(self._settings.student_layers, self._teacher_layers)
        objective = build_objective(self._settings.objective, Settings((pair,)))
        for point in points:
            if point.keep != NONE:
                check_cut(storing.parse_config(self._storing(point)), point.cut(), objective)
                training.parse_config([*self._training(point), "--output", str(self._output)])

    def run(self, point: Point) -> None:
        """Do what is not done of a point.

        Raises:
            PotstillError: a stage failed; those before it are kept.
            Signalled: a signal came.
        """
        records = Records(self._output, point)
        records.clear()
        if point.keep == NONE:
            records.done(STORE, lambda: {"bytes": 0, "bytes_per_token": 0.0})
            records.done(TRAINING, self._untrained)
        else:
            records.done(STORE, lambda: self._store(point))
            records.done(TRAINING, lambda: self._train(point))
        records.done(VALIDATE, lambda: self._validate(point))
        for task, seed in self._tunings():
            records.done(f"{task}-{seed}", partial(self._tune, point, task, seed))

    def fail(self, point: Point, reason: str) -> None:
        """Write why a point did not come to its end."""
        Records(self._output, point).fail(reason)

    def is_done(self, point: Point) -> bool:
        """Whether nothing of a point is left to do."""
        return None not in self._stages(point)

    def longest(self, points: Sequence[Point]) -> float:
        """Seconds that the longest of the finished points took."""
        done = [self._stages(point) for point in points if self.is_done(point)]
        return max((sum(s["seconds"] for s in stages if s) for stages in done), default=0.0)

    def _stages(self, point: Point) -> list[dict[str, Any] | None]:
        """The records of all stages of a point; None for one that is not done."""
        names = [STORE, TRAINING, VALIDATE, *(f"{task}-{seed}" for task, seed in self._tunings())]
        return [Records(self._output, point).get(name) for name in names]

    def _tunings(self) -> list[tuple[str, int]]:
        return [(task, seed) for task in self._settings.task_names for seed in self._seeds]

    def _store(self, point: Point) -> dict[str, Any]:
        """Run the teacher over all rows; bytes of the training rows, per token of a row."""
        self._execute(point, STORE, ["cache_knowledge.py", *self._storing(point)])
        size = sum(path.stat().st_size for path in self._knowledge(point).glob("train-*"))
        rows = self._manifest.splits[TRAIN].rows * self._settings.copies
        return {"bytes": size, "bytes_per_token": size / (rows * self._manifest.seq_length)}

    def _storing(self, point: Point) -> list[str]:
        """The flags of `cache_knowledge.py`."""
        settings = self._settings
        layers = [] if self._layers_of(point) else ["--layers", settings.layers]
        shared = settings.flags(*INPUTS, *STORING, "objective", "student_layers")
        return [*shared, *layers, *point.flags, "--output", str(self._knowledge(point))]

    def _knowledge(self, point: Point) -> Path:
        return self._output / "knowledge" / point.name

    def _layers_of(self, point: Point) -> str | None:
        """The layers to learn from where the cut says so."""
        return point.layers(self._settings, self._teacher_layers)

    def _untrained(self) -> dict[str, Any]:
        """Students as they start: {seed: folder}."""
        folder = self._output / "untrained"
        write_untrained(self._settings, self._manifest, folder, self._seeds)
        return {"students": {str(seed): f"untrained/seed-{seed}" for seed in self._seeds}}

    def _train(self, point: Point) -> dict[str, Any]:
        """Train a student for each seed, all in one run: {seed: folder}."""
        names = {str(seed): f"seed-{seed}" for seed in self._seeds}
        students = {name: {"student_seed": int(seed)} for seed, name in names.items()}
        several = self._students(self._output / "students" / point.name, students)
        self._execute(point, TRAINING, ["run.py", *self._training(point), *several])
        inside = f"students/{point.name}/students"
        return {"students": {seed: f"{inside}/{name}/student" for seed, name in names.items()}}

    def _training(self, point: Point) -> list[str]:
        """The flags of `run.py`, without those of the single students."""
        settings = self._settings
        form = [] if point.cut().whole else settings.flags("cut_form")  # nothing to mask
        return (
            [*settings.flags(*INPUTS, *STUDENT, "objective", "lr", "copies"), *form]
            + ["--layers", self._layers_of(point) or settings.layers]
            + ["--knowledge", str(self._knowledge(point))]
            + ["--max_steps", str(settings.steps), "--keep_checkpoints", "1"]
            + ["--save_every", str(max(1, settings.steps // CHECKPOINTS))]
        )

    def _students(self, folder: Path, students: Mapping[str, Mapping[str, Any]]) -> list[str]:
        """Flags of a run of several students in `folder`."""
        file = folder.with_name(f"{folder.name}.json")
        write_json(file, students)
        return ["--students", str(file), "--output", str(folder)]

    def _validate(self, point: Point) -> dict[str, Any]:
        """The held-out loss of each student, uncut, against the teacher itself: {seed: loss}."""
        settings, folder = self._settings, self._output / "held_out" / point.name
        names = {f"seed-{seed}": str(path) for seed, path in self._models(point).items()}
        self._execute(
            point,
            VALIDATE,
            ["run.py", *settings.flags(*INPUTS, "layers"), "--objective", settings.compared_by]
            + self._students(folder, {n: {"student": path} for n, path in names.items()})
            + ["--max_steps", "0"],
        )
        losses = {n.removeprefix("seed-"): last_loss(folder / "students" / n) for n in names}
        return {"losses": losses}

    def _models(self, point: Point) -> dict[int, Path]:
        """The finished students of a cut by seed."""
        record = Records(self._output, point).get(TRAINING)
        assert record is not None
        return {seed: self._output / record["students"][str(seed)] for seed in self._seeds}

    def _tune(self, point: Point, task: str, seed: int) -> dict[str, Any]:
        """Fine-tune the student of a seed with the same seed; its main score."""
        log = self._log(point, f"{task}-{seed}")
        where = RunSettings(
            model=str(self._models(point)[seed]),
            output=str(self._output / "finetuned" / point.name / f"{task}-{seed}"),
            save_model=False,
            tokenised=str(self._output / "tokenised"),
        )
        knobs = self._settings.tuning(seed)
        with open(log, "w") as file, redirect_stdout(file), redirect_stderr(file):
            result = run_trial(where, self._settings.task_settings(task), knobs)
        main = result["main"]
        score = result["last"]["scores"][main["split"]][main["metric"]]
        constant = result["majority"][main["split"]][main["metric"]]
        return {"task": task, "metric": main["metric"], "score": score, "majority": constant}

    def _execute(self, point: Point, stage: str, words: Sequence[str]) -> None:
        """Run a program of `pretrain/`, and forward a signal to it."""
        log = self._log(point, stage)
        execute([sys.executable, str(PROGRAMS / words[0]), *words[1:]], log)

    def _log(self, point: Point, stage: str) -> Path:
        """Say that a stage begins, and where what it prints will be."""
        log = self._output / "logs" / f"{point.name}-{stage}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        say(f"{point.name}: {stage} (its output: {log})")
        return log


def execute(command: Sequence[str], log: Path) -> None:
    """Run a command to its end, its output going to a file.

    Raises:
        TrainingError: it failed; its own reason.
        Signalled: a signal came; the command got it too, and has ended.
    """
    with open(log, "wb") as file:
        # A group of its own: an interrupt from the keyboard comes once, from here.
        process = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)
        try:
            status = process.wait()
        except Signalled as signalled:
            process.send_signal(signalled.number)
            process.wait()
            raise
        finally:
            if process.poll() is None:  # a second signal did not wait for its end
                process.kill()
                process.wait()
    if status:
        raise TrainingError(_reason(log, status))


def _reason(log: Path, status: int) -> str:
    """What a program that failed printed last about itself."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    told = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    died = f"ended by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
    return f"{(told or lines or ['it printed nothing'])[-1][:500]} ({died}; see {log.name})"


def last_loss(folder: Path) -> float:
    """The loss of the last validation in a run's metrics.jsonl."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    losses = [one["loss"] for one in map(json.loads, lines) if one["kind"] == "validation"]
    return float(losses[-1])
