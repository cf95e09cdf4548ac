"""The report's page as text: whose figures it shows, what it says of them, what it lets in."""

import base64
import copy
import hashlib
import re
from collections.abc import Callable
from html import unescape
from html.parser import HTMLParser
from typing import Any

import pytest

from finetune.page.assemble import page
from tests.finetune.sample_report import MODELS, TASKS, sample_report

SCRIPT = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>"
VOID = ("meta", "br", "img")
Report = dict[str, Any]


class Checker(HTMLParser):
    """Collects the tags, the attributes that could act or load, and holds ends to their starts."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.acting: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            inner = name == "href" and str(value).startswith("#")
            if name in ("src", "href", "style", "srcset") or name.startswith("on"):
                self.acting += [] if inner else [f"{tag} {name}"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def checked(shown: str) -> Checker:
    """The page's tags, once it is well formed."""
    checker = Checker()
    checker.feed(shown)
    assert checker.open == []
    return checker


def words(shown: str) -> str:
    """The page's text."""
    body = re.sub(r"<(style|script)>.*?</\1>", "", shown, flags=re.DOTALL)
    return unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", body)))


def renamed(value: Any) -> Any:
    """The same report with a harmful text wherever a text may stand."""
    if isinstance(value, dict):
        keys = {k: k + SCRIPT if k in (*MODELS, *TASKS) else k for k in value}
        return {keys[k]: renamed(v) for k, v in value.items()}
    if isinstance(value, list):
        return [renamed(item) for item in value]
    return value + SCRIPT if isinstance(value, str) else value


def test_no_text_of_the_report_becomes_part_of_the_page() -> None:
    checker = checked(page(renamed(sample_report())))
    assert checker.tags.count("script") == 1 and "img" not in checker.tags
    assert checker.acting == []


def test_the_policy_allows_this_script_and_this_style_alone() -> None:
    shown = page(sample_report())
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', shown)
    assert policy and policy[1].startswith("default-src 'none'; ")
    for kind in ("script", "style"):
        (content,) = re.findall(rf"<{kind}>(.*?)</{kind}>", shown, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy[1]
    assert "unsafe" not in policy[1]


def test_every_score_stands_in_the_table_with_its_deviation() -> None:
    report = sample_report()
    told = words(page(report))
    for score in report["scores"]:
        assert f"{100 * score['mean']:.1f} ± {100 * score['std']:.1f}" in told


def test_the_answer_of_the_commonest_label_has_a_score_by_every_metric() -> None:
    told = words(page(sample_report())).split("always the commonest answer")[1]
    assert told.split()[:4] == ["52.7", "61.2", "52.7", "52.7"]  # CoLA has two metrics, SST-2 one


def made(**overall: float) -> Report:
    """A report with these averages; sizes and latencies as in the sample."""
    report = sample_report(dict(overall))
    report["averages"] = [{"name": "A", "definition": "", "tasks": [], "values": overall}]
    return report


def test_the_summary_names_the_best_student_and_what_it_keeps_of_the_teacher() -> None:
    report = made(teacher=0.8, good=0.72, small=0.6)
    told = words(page(report))
    assert "The best student is good with average (A) 72.0 : 90.0% of what the teacher has" in told
    # the sample's second model is 1.4 times smaller and 1.3 times faster than its first
    assert "It is 1.4× smaller" in told and "1.3× faster" in told
    assert "No student keeps 95% of the teacher's score" in told


def test_the_smallest_student_that_is_good_enough_is_named() -> None:
    told = words(page(made(teacher=0.8, good=0.79, small=0.77)))
    assert "The smallest student that keeps 95% of the teacher's score is small" in told


def test_the_summary_counts_the_tasks_on_which_the_difference_is_real() -> None:
    report = made(teacher=0.8, good=0.79)
    for test, p in zip(report["tests"], (0.01, 0.2, 0.03, 0.5, None), strict=True):
        test["p"] = p
    assert "differs beyond chance (paired t-test over seeds, p < 0.05) on 2 (CoLA, MRPC) of 4" in (
        words(page(report))
    )


def test_the_test_over_all_tasks_is_told_too() -> None:
    report = made(teacher=0.8, good=0.79)
    whole = {"task": "all tasks together", "metric": "main", "difference": -0.026, "p": 0.0004}
    report["tests"].append(report["tests"][0] | whole)
    assert "All tasks together: 2.6 points apart, p < 0.001." in words(page(report))


@pytest.mark.parametrize(
    ("size", "said"),
    [(22_700_000, "It is no smaller"), (45_400_000, "It is 2.0× larger")],
)
def test_a_student_that_is_no_smaller_is_not_called_smaller(size: int, said: str) -> None:
    report = made(teacher=0.8, good=0.79)
    report["models"][1]["parameters"] = size
    assert said in words(page(report))


def test_the_star_of_a_grid_stands_by_the_configuration_of_the_scores() -> None:
    report = made(teacher=0.8, good=0.79)
    score = next(s for s in report["scores"] if (s["model"], s["task"]) == ("good", "rte"))
    score |= {"lr": 3e-5, "batch_size": 32}
    (grid,) = [g for g in report["grids"] if (g["model"], g["task"]) == ("good", "rte")]
    report["grids"] = [grid]
    for cell in grid["cells"]:  # as good with fewer seeds, and as good with another rate
        cell |= {"mean": 0.9, "seeds": 1}
    shown = page(report).split('id="grid"')[1]
    assert shown.split("</section>")[0].count(" ★</td>") == 1
    assert re.search(r"3e-5</td><td[^>]*>[^<★]*</td><td[^>]*>90\.0 ± 0\.4 ★</td>", shown)


def test_an_average_that_no_model_has_is_named_but_gets_no_column() -> None:
    told = words(page(sample_report()))
    assert "average: GLUE-5" in told and "average: HTD" not in told
    assert "No model here has all the tasks of the averages of HTD." in told


def test_a_verdict_needs_a_small_p_and_follows_the_sign() -> None:
    report = made(a=0.7, b=0.6)
    verdicts = []
    for p, difference in ((0.01, 0.1), (0.01, -0.1), (0.06, 0.1), (None, None)):
        report["tests"] = [report["tests"][0] | {"p": p, "t": p, "difference": difference}]
        said = re.findall(
            r"a is better|b is better|no difference shown|not tested: too few seeds",
            words(page(report)).split("Is the difference real?")[2],
        )
        verdicts.append(said[0])
    expected = ["a is better", "b is better", "no difference shown", "not tested: too few seeds"]
    assert verdicts == expected


def test_beside_a_papers_accuracy_stands_our_accuracy_and_the_column_is_marked() -> None:
    report = sample_report()
    told = words(page(report)).split("HTD, table 1")[-1]
    assert "CoLA accuracy*" in told and "CoLA is read as accuracy" in told
    ours = next(s for s in report["scores"] if s["task"] == "cola" and s["metric"] == "accuracy")
    assert f"teacher here {100 * ours['mean']:.1f} ± " in told


def test_without_an_average_models_are_compared_by_the_tasks_that_all_have() -> None:
    report = sample_report({"teacher": 0.8, "good": 0.7})
    report["averages"] = []
    report["scores"] = [s for s in report["scores"] if s["task"] in ("rte", "mrpc")]
    means = [s["mean"] for s in report["scores"] if s["model"] == "good"]
    mrpc, _, rte = means  # F1, accuracy; accuracy
    told = words(page(report))
    assert f"mean of 2 tasks {100 * (mrpc + rte) / 2:.1f}" in told
    assert "the tasks that every model here has: MRPC F1, RTE accuracy." in told


def test_an_average_that_one_model_alone_has_compares_nothing() -> None:
    report = made(teacher=0.8, good=0.7)
    report["averages"][0]["values"] = {"teacher": 0.8, "good": None}
    report["scores"] = [
        s for s in report["scores"] if s["model"] == "teacher" or s["task"] == "rte"
    ]
    (mean,) = [s["mean"] for s in report["scores"] if (s["model"], s["task"]) == ("good", "rte")]
    assert f"The best student is good with RTE accuracy {100 * mean:.1f}" in words(page(report))


def test_machine_and_versions_are_words_and_what_is_not_there_is_left_out() -> None:
    environment = {"gpu": None, "threads_per_rank": 2, "packages": {"torch": "2.13.0"}}
    told = words(page(sample_report() | {"environment": environment}))
    assert "threads per rank 2 packages torch 2.13.0" in told and "gpu" not in told


def one_model(report: Report) -> Report:
    return sample_report({"teacher": 0.8})


def forty_models(report: Report) -> Report:
    return sample_report({f"student {n}": 0.5 + n / 100 for n in range(40)})


def one_seed(report: Report) -> Report:
    return sample_report(seeds=(0,)) | {"tests": []}


def same_scores(report: Report) -> Report:
    for test in report["tests"]:
        test |= {"t": None, "p": None, "difference": 0.0, "reason": "identical scores"}
    return report


def no_latency(report: Report) -> Report:
    for model in report["models"]:
        model["latency_ms"] = {"torch fp32, batch 1": None}
    return report


def no_costs(report: Report) -> Report:
    for model in report["models"]:
        model |= dict.fromkeys(("parameters", "size_bytes", "flops_per_row", "pretraining"))
        model["latency_ms"] = {}
    return report


def no_scores(report: Report) -> Report:
    for score in report["scores"]:
        score |= {"mean": None, "std": None, "values": {"0": None}}
    report["averages"] = []
    return report


def only_names(report: Report) -> Report:
    return {"title": "t", "models": report["models"]}


def nulls(report: Report) -> Report:
    for part in ("tests", "distillations", "scores"):
        for entry in report[part]:
            entry |= {n: None for n in ("mean", "std", "p", "t", "difference") if n in entry}
    for grid in report["grids"]:
        grid["cells"][0] |= {"mean": None, "std": None}
    for curve in report["curves"]:
        curve["epochs"][0]["score"] = curve["train"][0]["loss"] = None
    return report


def empty_parts(report: Report) -> Report:
    parts = ("grids", "curves", "papers", "distillations", "failed", "tests", "notes", "averages")
    return report | dict.fromkeys(parts, [])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (one_model, "There is no student here to compare with the teacher."),
        (forty_models, "The best model is student 39"),
        (one_seed, "was not tested: no test of att-mse 6x384 and teacher was made."),
        (same_scores, "was not tested: identical scores."),
        (no_latency, "Score against size"),
        (no_costs, "No cost of a scored model is known."),
        (no_scores, "No model has finished a task yet"),
        (only_names, "No curves were logged."),
        (nulls, "–"),
        (empty_parts, "No grid: every model had one configuration."),
        (lambda report: {}, "No model has finished a task yet"),
    ],
)
def test_a_report_that_lacks_something_gives_a_page_that_says_so(
    change: Callable[[Report], Report], said: str
) -> None:
    shown = page(change(copy.deepcopy(sample_report())))
    checked(shown)
    assert said in words(shown)
    assert not re.search(r"\bNone\b|\bnan\b|NaN", words(shown))


def test_the_same_report_gives_the_same_page() -> None:
    assert page(sample_report()) == page(sample_report())
