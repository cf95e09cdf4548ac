"""What the page's parts ask of report.json: who is who, which score, how a number is written."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from typing import Any

NAMES = dict(
    cola="CoLA",
    sst2="SST-2",
    mrpc="MRPC",
    stsb="STS-B",
    qqp="QQP",
    mnli="MNLI",
    qnli="QNLI",
    rte="RTE",
    wnli="WNLI",
    squad="SQuAD",
    mcc="Matthews",
    f1="F1",
    macro_f1="macro F1",
    pearson="Pearson",
    spearman="Spearman",
    em="EM",
    exact_match="exact match",
)
ABSENT = "–"
Score = Mapping[str, Any]


def title(name: str) -> str:
    """A task or metric as papers write it."""
    return NAMES.get(name, name)


def percent(value: float | None, digits: int = 1) -> str:
    """A fraction in percent, a dash for None."""
    return ABSENT if value is None else f"{100 * value:.{digits}f}"


def spread(mean: float | None, std: float | None) -> str:
    """Mean ± standard deviation in percent; the mean alone of one seed."""
    return percent(mean) if mean is None or std is None else f"{percent(mean)} ± {percent(std)}"


def times(larger: float | None, smaller: float | None) -> str:
    """How many times one is of the other, a dash where either is unknown."""
    return f"{larger / smaller:.1f}×" if larger and smaller else ABSENT


def when(**values: object) -> str:
    """The attribute of what is shown only while the page's switches stand so."""
    said = " ".join(f"{name}={value}" for name, value in values.items())
    return f' data-when="{escape(said)}"'


def switch(key: str, names: Sequence[str], what: str) -> str:
    """Buttons of which one is pressed, the first at the start; nothing for a single choice."""
    if len(names) < 2:
        return ""
    buttons = "".join(
        f'<button type="button" data-set="{key}={n}" aria-pressed="{str(n == 0).lower()}">'
        f"{escape(name)}</button>"
        for n, name in enumerate(names)
    )
    label = escape(what)
    return f'<div class="switch" role="group" aria-label="{label}"><b>{label}</b>{buttons}</div>'


@dataclass(frozen=True)
class Overall:
    """The one number by which models are compared: its name, what it is, and its values."""

    name: str
    definition: str
    values: Mapping[str, float | None]


@dataclass(frozen=True)
class Study:
    """A report, and what follows from it."""

    report: Mapping[str, Any]

    def part(self, name: str) -> list[Mapping[str, Any]]:
        """A part of the report; one that is missing is empty."""
        return list(self.report.get(name) or [])

    @cached_property
    def models(self) -> list[str]:
        """The models' names; the place in the list is the number of the series."""
        return [model["name"] for model in self.part("models")]

    @cached_property
    def tasks(self) -> list[str]:
        """The tasks' names."""
        return [task["name"] for task in self.part("tasks")]

    def facts(self, model: str) -> Mapping[str, Any]:
        """The entry of a model."""
        return self.part("models")[self.models.index(model)]

    def number(self, model: str) -> int:
        """The number of a model's series; models that are not listed come behind all others."""
        return self.models.index(model) if model in self.models else len(self.models)

    @cached_property
    def _scores(self) -> dict[tuple[str, str, str], Score]:
        found: dict[tuple[str, str, str], Score] = {}
        for score in self.part("scores"):
            found.setdefault((score["model"], score["task"], score["metric"]), score)
        return found

    @cached_property
    def main_metrics(self) -> dict[str, str]:
        """The metric of each task that decides."""
        return {task["name"]: task["metric"] for task in self.part("tasks")}

    def metrics(self, task: str) -> list[str]:
        """The metrics of a task, the main one first."""
        others = [metric for _, of, metric in self._scores if of == task]
        return list(dict.fromkeys([self.main_metrics[task], *others]))

    def decided(self, task: str) -> str:
        """The task with the metric that decides, in words."""
        return f"{title(task)} {title(self.main_metrics[task])}"

    def score(self, model: str, task: str, metric: str | None = None) -> Score | None:
        """A model's score on a task by a metric, the main one if None."""
        return self._scores.get((model, task, metric or self.main_metrics[task]))

    def mean(self, model: str, task: str) -> float | None:
        """The mean of the main metric over the seeds."""
        score = self.score(model, task)
        return None if score is None else score["mean"]

    @cached_property
    def seeds(self) -> set[int]:
        """The numbers of seeds that scores are means of."""
        return {len(score["values"]) for score in self.part("scores")}

    @cached_property
    def teacher(self) -> str | None:
        """The model marked as the teacher, else the only one whose name says so."""
        marked = [model["name"] for model in self.part("models") if model.get("teacher")]
        named = [name for name in self.models if "teacher" in name.lower()]
        return next((names[0] for names in (marked, named) if len(names) == 1), None)

    @cached_property
    def known_averages(self) -> Sequence[Mapping[str, Any]]:
        """The averages that at least one model has."""
        averages = self.part("averages")
        return [a for a in averages if any(v is not None for v in a["values"].values())]

    def marked(self, model: str) -> str:
        """The model's name; the teacher's says that it is one."""
        says = model != self.teacher or "teacher" in model.lower()
        return model if says else f"{model} (teacher)"

    @cached_property
    def overall(self) -> Overall | None:
        """An average that most models have, two at least, else the mean over all models' tasks."""
        most, best = min(2, len(self.models)) - 1, None
        for average in self.known_averages:
            count = sum(value is not None for value in average["values"].values())
            if count > most:
                most, best = count, average
        if best is not None:
            return Overall(f"average ({best['name']})", best["definition"], best["values"])
        means = {task: [self.mean(model, task) for model in self.models] for task in self.tasks}
        shared = [task for task, found in means.items() if found and None not in found]
        if not shared:
            return None
        values = {
            model: sum(means[task][n] or 0.0 for task in shared) / len(shared)
            for n, model in enumerate(self.models)
        }
        names = ", ".join(map(self.decided, shared))
        if len(shared) == 1:
            return Overall(names, "The one task that all models here have.", values)
        definition = (
            f"Plain mean of the main metrics of the tasks that every model here has: {names}. No "
            "paper's average: none of theirs has all its tasks here."
        )
        return Overall(f"mean of {len(shared)} tasks", definition, values)

    @cached_property
    def latencies(self) -> list[str]:
        """What latency was measured of, over all models."""
        measured = [model.get("latency_ms") or {} for model in self.part("models")]
        return list(dict.fromkeys(kind for times in measured for kind, ms in times.items() if ms))

    def latency(self, model: str, kind: str) -> float | None:
        """Milliseconds, None where it was not measured."""
        return (self.facts(model).get("latency_ms") or {}).get(kind)

    def pretraining_flops(self, model: str) -> float | None:
        """FLOPs of the distillation that made the model, None where unknown."""
        return (self.facts(model).get("pretraining") or {}).get("flops")
