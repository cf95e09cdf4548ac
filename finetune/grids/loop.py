"""Runs a grid's trials on workers until all are over: the order, retries, failures, progress."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import AutoModel

from data_prep.tokenization import load_tokenizer
from finetune.grids.cluster import Cluster, Event, rungs_on_this_node
from finetune.grids.early_stop import Rungs, was_stopped
from finetune.grids.file import FAILED_FILE, STARTED_FROM
from finetune.grids.plan import FineTuning, Planned, first_seed, is_started
from finetune.grids.settings import GridSettings
from finetune.grids.worker import Judge, Outcome
from finetune.reporting.selection import best_of_grid, read_trials
from finetune.results import writing
from potstill.console import progress, say
from potstill.files import whole_folder, write_json
from potstill.signals import Signalled

ATTEMPTS = 3  # of a trial that dies: whole batches, halves, quarters
NODE_DEATHS = 10  # after which a trial is given up though none was its own fault
WAIT_SECONDS = 0.5  # for which a signal waits at most
BAR: dict[str, Any] = {
    "desc": "grid",
    "bar_format": "{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}",
    "smoothing": 0,  # time left by the mean speed: trials differ too much for the latest
}


@dataclass(frozen=True)
class Try:
    """A trial under way: how often it died already, and how often a node under it."""

    trial: Planned
    deaths: int = 0
    node_deaths: int = 0

    @property
    def parts(self) -> int:
        """1, 2, 4: in how many parts a batch is computed."""
        return int(2**self.deaths)


class Loop:
    """The trials that wait, those under way and those that are over."""

    def __init__(
        self, trials: Sequence[Planned], settings: GridSettings, pending: Callable[[], int | None]
    ) -> None:
        """`pending` gives the number of a signal that came, or None."""
        self._settings, self._pending = settings, pending
        self._output = Path(os.path.abspath(settings.output))
        self._all, self._waiting = len(trials), [Try(trial) for trial in trials]
        self._results: dict[Path, dict[str, Any]] = {}
        self._over: set[Path] = set()
        self._failed = 0
        self._under_way = 0
        self._best: dict[str, float] = {}
        self._rungs: Any = None
        self._total = sum(trial.cost for trial in trials)
        self._take_finished()

    @property
    def open(self) -> int:
        """How many trials are not over."""
        return self._all - len(self._over)

    @property
    def failed(self) -> int:
        """How many trials were given up."""
        return self._failed

    def _take_finished(self) -> None:
        """Leave out what finished before, and other seeds of what was stopped early.

        What failed is tried again.
        """
        finished = {trial.folder: trial.result for trial in read_trials([self._output])}
        for attempt in self._waiting:
            if attempt.trial.folder in finished:
                self._note(attempt.trial, finished[attempt.trial.folder])
        self._over |= {one.trial.folder for one in self._waiting if self._is_hopeless(one.trial)}
        self._waiting = [one for one in self._waiting if one.trial.folder not in self._over]

    def run(self, cluster: Cluster) -> None:
        """Work until every trial is over.

        Raises:
            Signalled: a signal came; what finished is kept.
            InputError: a node cannot be used.
        """
        done = self._total - sum(one.trial.cost for one in self._waiting)
        self._start_rungs(cluster)
        with progress(total=self._total, initial=done, **BAR) as bar:
            while self.open:
                number = self._pending()
                if number is not None:
                    raise Signalled(number)
                cluster.hire()
                self._hand_out(cluster, bar)
                for event in cluster.wait(WAIT_SECONDS):
                    self._under_way -= 1
                    self._take(cluster, event, bar)

    def _start_rungs(self, cluster: Cluster) -> None:
        if not self._settings.early_stop:
            return
        self._rungs = rungs_on_this_node(cluster.ray, Rungs)
        for folder, result in self._results.items():
            if folder.name.endswith("-0"):
                key = (folder.parts[-3], folder.parts[-2], int(result["settings"]["epochs"]))
                cluster.ray.get(self._rungs.refill.remote(key, folder.name, result))

    def _hand_out(self, cluster: Cluster, bar: Any) -> None:
        for attempt in [one for one in self._waiting if self._over.issuperset(one.trial.after)]:
            if not cluster.idle:
                return
            self._waiting.remove(attempt)
            trial = self._prepared(attempt.trial, bar)
            if trial is None:
                continue
            (trial.folder / FAILED_FILE).unlink(missing_ok=True)
            job = trial.job.in_parts(attempt.parts)
            cluster.give(replace(attempt, trial=trial), job, trial.folder, self._judge(trial))
            self._under_way += 1

    def _judge(self, trial: Planned) -> Judge | None:
        if self._rungs is None or trial.seed > 0:
            return None
        return Judge(self._rungs, (trial.task, trial.model, trial.epochs), trial.folder.name)

    def _prepared(self, trial: Planned, bar: Any) -> Planned | None:
        """The trial with what it waited for put in place; None where that leaves nothing to do."""
        if self._is_hopeless(trial):
            self._end(trial, bar)
            return None
        if is_started(self._settings.start_from_task, trial.task):
            model = starting_model(self._output, self._settings.start_from_task, trial.model)
            if model is None:
                reason = f"no trial of {self._settings.start_from_task} finished to start from"
                self._give_up(Try(trial), reason, bar)
                return None
            assert isinstance(trial.job, FineTuning)
            return replace(trial, job=trial.job.starting_from(model))
        return trial

    def _is_hopeless(self, trial: Planned) -> bool:
        """Whether early stopping measured its configuration on the first seed and ended it."""
        first = self._results.get(first_seed(trial)) if self._settings.early_stop else None
        return trial.seed > 0 and first is not None and was_stopped(first)

    def _take(self, cluster: Cluster, event: Event, bar: Any) -> None:
        attempt, outcome = event.ticket, event.outcome
        if event.by_node:
            self._again(replace(attempt, node_deaths=attempt.node_deaths + 1), event.reason, bar)
        elif outcome is None:
            self._again(replace(attempt, deaths=attempt.deaths + 1), event.reason, bar)
        elif outcome.kind == "died":
            cluster.replace(event.hand)
            self._again(replace(attempt, deaths=attempt.deaths + 1), outcome.reason, bar)
        elif outcome.kind == "failed":
            self._give_up(replace(attempt, deaths=attempt.deaths + 1), outcome.reason, bar)
        else:
            self._finish(attempt, outcome, bar)

    def _again(self, attempt: Try, reason: str, bar: Any) -> None:
        if attempt.deaths >= ATTEMPTS or attempt.node_deaths >= NODE_DEATHS:
            self._give_up(attempt, reason, bar)
            return
        parts = f", every batch in {attempt.parts} parts" if attempt.deaths else ""
        say(f"{attempt.trial.label}: {reason}; once more{parts}")
        self._waiting.insert(0, attempt)

    def _give_up(self, attempt: Try, reason: str, bar: Any) -> None:
        say(f"{attempt.trial.label}: failed: {reason}")
        with writing(attempt.trial.folder):
            write_json(
                attempt.trial.folder / FAILED_FILE, {"reason": reason, "attempts": attempt.deaths}
            )
        self._failed += 1
        self._end(attempt.trial, bar)

    def _finish(self, attempt: Try, outcome: Outcome, bar: Any) -> None:
        assert outcome.result is not None
        self._note(attempt.trial, outcome.result)
        seconds = sum(outcome.result["seconds"].values())
        stopped = ", stopped early" if was_stopped(outcome.result) else ""
        say(f"{attempt.trial.label}: {_score(outcome.result)} ({seconds:.0f} s{stopped})")
        self._end(attempt.trial, bar)

    def _note(self, trial: Planned, result: dict[str, Any]) -> None:
        self._over.add(trial.folder)
        self._results[trial.folder] = result
        score = main_score(result)
        if score is not None:
            self._best[trial.task] = max(score, self._best.get(trial.task, score))

    def _end(self, trial: Planned, bar: Any) -> None:
        self._over.add(trial.folder)
        best = ", ".join(f"{task} {100 * score:.1f}" for task, score in self._best.items())
        bar.set_postfix_str(f"{len(self._over)}/{self._all} trials; best {best}", refresh=False)
        bar.update(trial.cost)


def main_score(result: dict[str, Any]) -> float | None:
    """The main metric after the last epoch."""
    main = result["main"]
    score = result["last"]["scores"][main["split"]][main["metric"]]
    return None if score is None else float(score)


def _score(result: dict[str, Any]) -> str:
    score = main_score(result)
    return f"{result['main']['metric']} {'undefined' if score is None else f'{100 * score:.1f}'}"


def starting_model(output: Path, task: str | None, model: str) -> Path | None:
    """The encoder of a model's best trial of a task, without its head; None if none finished.

    Best is the configuration of `best_of_grid`, and of it the trial with the smallest seed. The
    choice is made once: what extends the grid later starts from the same encoder.
    """
    place = output / f"{STARTED_FROM}{task}" / model
    if place.is_dir():
        return place
    trials = [one for one in read_trials([output]) if (one.task, one.model) == (task, model)]
    best = best_of_grid(trials)
    if not best:
        return None
    source = min(best[0].trials, key=lambda trial: trial.seed).folder / "model"
    with writing(place), whole_folder(place) as beside:
        AutoModel.from_pretrained(source, trust_remote_code=False).save_pretrained(beside)
        load_tokenizer(source).save_pretrained(beside)
    return place
