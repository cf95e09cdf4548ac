"""The papers' figures: complete, in range, and adding up where the papers themselves do."""

import json
from pathlib import Path
from typing import Any

import pytest

import finetune.reporting.papers
from finetune.reporting.papers import averages, own_average, paper_rows
from finetune.tasks import TASKS

FILE = Path(finetune.reporting.papers.__file__).with_name("papers.json")
DOES_NOT_ADD_UP = {  # printed average, and the mean of the row's own printed scores
    ("HTD", "1", "Hid-CLS (4,8,12)"): (73.2, 73.71),
    ("HTD", "1", "Att-MSE+Hid-Seq (4,8,12)"): (77.0, 76.69),
    ("HTD", "3", "Hid-CLS (4,8,12)"): (73.2, 73.71),
    ("HTD", "3", "Hid-Seq (1,8,12)"): (77.6, 76.93),
    ("DistilBERT", "1", "BERT-base"): (79.5, 79.72),
}
STEP = {"HTD": 0.1, "ETD": 0.01, "DistilBERT": 0.1}  # of a printed average; scores have 0.1


def _row(paper: str, table: str, model: str) -> dict[str, Any]:
    named = {"paper": paper, "table": table, "model": model}
    (row,) = [row for row in paper_rows() if named.items() <= row.items()]
    return row


def test_every_row_of_the_papers_tables_is_there() -> None:
    counts: dict[tuple[str, str], int] = {}
    for row in paper_rows():
        key = row["paper"], row["table"]
        counts[key] = counts.get(key, 0) + 1
    assert counts == {
        ("HTD", "1"): 9,
        ("HTD", "2"): 11,
        ("HTD", "3"): 18,
        ("HTD", "4"): 8,
        ("ETD", "1"): 15,
        ("ETD", "2"): 8,
        ("DistilBERT", "1"): 3,
        ("DistilBERT", "4"): 4,
    }


def test_printed_averages_are_the_means_of_the_printed_scores_but_for_the_rows_named() -> None:
    definitions = {average.name: average for average in averages()}
    differing = {}
    for row in paper_rows():
        average = definitions[row["average_name"]]
        scores = {(task, s["metric"]): s["mean"] for task, s in row["scores"].items()}
        ours = average.of(scores)
        if ours is None:  # ETD's Table 2 and DistilBERT's Table 4 print no tasks
            assert (row["paper"], row["table"]) in (("ETD", "2"), ("DistilBERT", "4"))
            continue
        rounding = 0.05 + STEP[row["paper"]] / 2
        if abs(100 * ours - 100 * row["average"]) > rounding + 1e-9:
            key = row["paper"], row["table"], row["model"]
            differing[key] = round(100 * row["average"], 2), round(100 * ours, 2)
            assert "average" in row["note"]
    assert differing == DOES_NOT_ADD_UP


def test_the_ablations_average_is_over_seven_glue_tasks_and_squad() -> None:
    tables = json.loads(FILE.read_text())["papers"][1]["tables"]
    for row in tables[1]["rows"]:
        mean = (7 * row["glue_score"] + row["scores"]["squad"]) / 8
        assert mean == pytest.approx(row["average"], abs=0.015)


def test_tables_repeat_the_same_figures() -> None:
    for objective in ("Vanilla KD", "Hid-CLS", "Hid-Seq", "Att-KL", "Att-MSE"):
        first, third = (_row("HTD", table, f"{objective} (4,8,12)") for table in "13")
        assert first["scores"] == third["scores"]
    for objective in ("Vanilla KD", "Hid-CLS", "Hid-Seq", "Att-MSE"):
        second, fourth = (_row("HTD", table, f"{objective} (random)") for table in "24")
        assert second["scores"] == fourth["scores"]
    distilled = _row("HTD", "2", "DistilBERT")["scores"]
    assert distilled["cola"] == _row("DistilBERT", "1", "DistilBERT")["scores"]["cola"]


def test_single_figures_are_as_printed() -> None:
    att_mse = _row("HTD", "3", "Att-MSE (1,2,3)")
    assert att_mse["scores"]["rte"] == {"metric": "accuracy", "mean": 0.603, "std": 0.0149}
    assert (att_mse["objective"], att_mse["init"]) == ("att-mse", "1,2,3")
    assert _row("HTD", "2", "Att-MSE (random)")["scores"]["cola"]["mean"] == 0.535
    impt = _row("ETD", "1", "ETD-Impt")
    assert (impt["average"], impt["exact_match"], impt["training_flops"]) == (0.817, 0.774, 1.55e19)


def test_two_columns_of_htds_task_specific_tables_are_read_as_accuracies() -> None:
    for row in paper_rows():
        if row["paper"] == "HTD":
            task_specific = row["table"] in "13"
            metrics = {task: score["metric"] for task, score in row["scores"].items()}
            assert metrics["cola"] == ("accuracy" if task_specific else "mcc")
            assert metrics["mrpc"] == ("accuracy" if task_specific else "f1")
            assert ("721 of 1043" in row["differences"]) == task_specific


def test_every_average_and_row_names_tasks_and_metrics_that_we_have() -> None:
    for average in averages():
        assert all(metric in TASKS[task].metrics for task, metric in average.metrics.items())
    for row in paper_rows():
        for task, score in row["scores"].items():
            assert score["metric"] in TASKS[task].metrics
            assert 0 < score["mean"] < 1
        assert row["citation"] and row["setting"] and row["differences"]


def test_an_average_needs_all_its_tasks() -> None:
    own = own_average({"rte": "accuracy", "cola": "mcc"})
    scores = {("rte", "accuracy"): 0.7, ("cola", "mcc"): 0.4, ("cola", "accuracy"): 0.9}
    assert own.of(scores) == pytest.approx(0.55)
    assert own.of({**scores, ("cola", "mcc"): None}) is None
    assert own.of({("rte", "accuracy"): 0.7}) is None


def test_the_averages_hold_the_tasks_that_their_papers_say() -> None:
    tasks = {average.name: set(average.metrics) for average in averages()}
    seven = {"qnli", "sst2", "mnli", "mrpc", "qqp", "rte", "cola"}
    assert tasks["HTD"] == tasks["HTD, task-specific"] == seven
    assert tasks["ETD"] == seven - {"rte"} | {"stsb", "squad"}
    assert tasks["DistilBERT"] == seven | {"stsb", "wnli"}
