"""The report: what it says of made grids and of a real run, what it refuses, what it writes."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import ttest_rel

from finetune.classifier import fingerprint
from finetune.report import main
from finetune.reporting.tables import cell
from tests.finetune.conftest import QUICK, mnli_rows, write_parquet
from tests.finetune.made_grid import result, write_grid, write_json, write_scores, write_trial

BIG = [0.70, 0.72, 0.71]
SMALL = [0.66, 0.69, 0.65]
Reporter = Callable[..., dict[str, Any]]


@pytest.fixture
def grid(tmp_path: Path) -> Path:
    """A finished grid of two models on two tasks, two learning rates, three seeds."""
    grid = write_grid(tmp_path / "grid", ["big", "small"])
    for model, scores in (("big", BIG), ("small", SMALL)):
        lower = [score - 0.1 for score in scores]
        write_scores(grid, model, "rte", {1e-5: lower, 3e-5: scores})
        for seed, score in enumerate(scores):
            two = {"f1": score + 0.1, "accuracy": score}
            write_trial(grid, model, result("mrpc", two, seed=seed))
    write_json(grid / "results.json", {})
    return grid


@pytest.fixture
def report(tmp_path: Path) -> Reporter:
    """Run the program in this process without timing; gives report.json."""

    def run(*flags: object, output: Path = tmp_path / "report") -> dict[str, Any]:
        main([*map(str, flags), "--output", str(output), "--no_latency"])
        content: dict[str, Any] = json.loads((output / "report.json").read_text())
        return content

    return run


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., str]:
    """Run the program expecting status 2 and one line, which it gives, and nothing written."""

    def run(*flags: object, output: Path = tmp_path / "report") -> str:
        with pytest.raises(SystemExit) as stop:
            main([*map(str, flags), "--output", str(output), "--no_latency"])
        assert stop.value.code == 2
        assert not (output / "report.json").exists()
        (line,) = capsys.readouterr().err.splitlines()
        return line

    return run


def _score(report: dict[str, Any], model: str, task: str, metric: str) -> dict[str, Any]:
    named = {"model": model, "task": task, "metric": metric}
    (score,) = [score for score in report["scores"] if named.items() <= score.items()]
    return score


def test_scores_are_mean_and_deviation_of_the_best_configuration(
    grid: Path, report: Reporter
) -> None:
    score = _score(report(grid), "big", "rte", "accuracy")
    assert score["values"] == {"0": 0.70, "1": 0.72, "2": 0.71}
    assert score["mean"] == pytest.approx(np.mean(BIG))
    assert score["std"] == pytest.approx(np.std(BIG, ddof=1))
    assert (score["lr"], score["batch_size"], score["epochs"]) == (3e-5, 16, 2)


def test_all_metrics_are_there_the_main_one_first(grid: Path, report: Reporter) -> None:
    found = report(grid)
    metrics = [s["metric"] for s in found["scores"] if (s["task"], s["model"]) == ("mrpc", "big")]
    assert metrics == ["f1", "accuracy"]
    assert _score(found, "small", "mrpc", "accuracy")["mean"] == pytest.approx(np.mean(SMALL))


def test_the_mismatched_set_of_mnli_has_its_own_rows(tmp_path: Path, report: Reporter) -> None:
    scores = {"validation_matched": {"accuracy": 0.8}, "validation_mismatched": {"accuracy": 0.7}}
    last = {"epoch": 1, "step": 1, "loss": {"validation_matched": 1.0}, "scores": scores}
    made = result("mnli", {"accuracy": 0.8}, epochs=1) | {
        "main": {"split": "validation_matched", "metric": "accuracy"},
        "last": last,
        "epochs": [last],
        "rows": {"train": 9, "validation_matched": 5, "validation_mismatched": 6},
        "majority": {split: {"accuracy": 0.3} for split in scores},
    }
    write_json(tmp_path / "run/result.json", made)
    found = report(tmp_path / "run")
    assert [(s["metric"], s["mean"]) for s in found["scores"]] == [
        ("accuracy", 0.8),
        ("accuracy (validation_mismatched)", 0.7),
    ]
    assert found["tasks"][0]["rows"] == {"train": 9, "validation": 5}


def test_every_test_equals_scipys_and_their_number_is_said(grid: Path, report: Reporter) -> None:
    found = report(grid)
    (test,) = [test for test in found["tests"] if test["task"] == "rte"]
    expected = ttest_rel(BIG, SMALL)
    assert test["p"] == pytest.approx(expected.pvalue)
    assert test["t"] == pytest.approx(expected.statistic)
    assert (test["a"], test["b"], test["seeds"]) == ("big", "small", 3)
    assert any("Of 4 tests" in note for note in found["notes"])  # rte, f1, accuracy, all tasks


def test_a_paper_average_is_null_where_a_task_is_missing(grid: Path, report: Reporter) -> None:
    averages = {average["name"]: average["values"] for average in report(grid)["averages"]}
    assert averages["HTD"] == averages["ETD"] == {"big": None, "small": None}
    mean = (np.mean(BIG) + np.mean(BIG) + 0.1) / 2
    assert averages["All tasks here"]["big"] == pytest.approx(mean)


def test_htds_average_takes_its_seven_tasks_and_their_metrics(
    tmp_path: Path, report: Reporter
) -> None:
    grid = write_grid(tmp_path / "grid", ["big"])
    for task in ("qnli", "sst2", "mnli", "rte"):
        write_trial(grid, "big", result(task, {"accuracy": 0.8}))
    write_trial(grid, "big", result("qqp", {"accuracy": 0.8, "f1": 0.1}))
    write_trial(grid, "big", result("mrpc", {"f1": 0.9, "accuracy": 0.7}))
    write_trial(grid, "big", result("cola", {"mcc": 0.3, "accuracy": 0.6}))
    averages = {average["name"]: average["values"]["big"] for average in report(grid)["averages"]}
    assert averages["HTD"] == pytest.approx((5 * 0.8 + 0.9 + 0.3) / 7)
    assert averages["HTD, task-specific"] == pytest.approx((5 * 0.8 + 0.7 + 0.6) / 7)
    assert averages["ETD"] is None  # no stsb, no squad


def test_fewer_rows_seeds_and_other_starts_are_said(grid: Path, report: Reporter) -> None:
    write_grid(grid, ["big", "small"], start_from_task="mnli")
    write_trial(grid, "big", result("cola", {"mcc": 0.2}))
    notes = report(grid)["notes"]
    fewer = next(note for note in notes if note.startswith("Trained on fewer rows"))
    assert "rte 2,000 of 2,490" in fewer and "cola" in fewer
    assert "cola, big: 1 of 3 seeds." in notes
    assert "grid, rte: every model started from itself tuned on mnli." in notes
    assert not any("cola: every model started" in note for note in notes)


def test_an_unfinished_grid_and_failed_trials_are_reported(grid: Path, report: Reporter) -> None:
    (grid / "results.json").unlink()
    failed = grid / "trials/rte/big/8e-5-16-2-0/failed.json"
    write_json(failed, {"reason": "out of | memory", "attempts": 3})
    found = report(grid)
    assert "The grid in grid is not finished: 18 trials are in." in found["notes"]
    (entry,) = found["failed"]
    assert entry["configuration"] == "8e-5-16-2-0"
    assert "out of \\| memory" in (grid.parent / "report/report.md").read_text()


def test_a_folder_given_twice_is_reported_once(grid: Path, report: Reporter) -> None:
    failed = grid / "trials/rte/big/8e-5-16-2-0/failed.json"
    write_json(failed, {"reason": "out of memory", "attempts": 3})
    assert len(report(grid, f"{grid}/")["failed"]) == 1


@pytest.mark.parametrize("content", ["{", "[]", '{"attempts": 3}'])
def test_a_damaged_failed_json_is_refused_by_name(
    grid: Path, refused: Callable[..., str], content: str
) -> None:
    failed = grid / "trials/rte/big/8e-5-16-2-0/failed.json"
    failed.parent.mkdir()
    failed.write_text(content)
    assert f"{failed}: cannot be read" in refused(grid)


def test_a_baseline_is_tested_against_the_others_only(grid: Path, report: Reporter) -> None:
    write_grid(grid, ["big", "small", "third"])
    write_scores(grid, "third", "rte", {1e-5: BIG})
    tests = report(grid, "--baseline", "small")["tests"]
    assert {test["b"] for test in tests} == {"small"}
    assert len([test for test in tests if test["task"] == "rte"]) == 2


def test_the_page_measures_the_others_by_the_teacher_that_is_named(
    grid: Path, report: Reporter
) -> None:
    shown = grid.parent / "report/report.html"
    report(grid)
    assert "The best model is" in shown.read_text()  # nothing says that one is the teacher
    report(grid, "--teacher", "big")
    assert "The best student is <b>small</b>" in shown.read_text()
    assert "of what the teacher, big, has" in shown.read_text()


def test_a_sum_of_objectives_stands_beside_htds_table_1(tmp_path: Path, report: Reporter) -> None:
    grid = write_grid(tmp_path / "grid", ["sum"])
    how = {"objective": "att-kl+val-kl", "init": "2,4,6", "teacher": "t"}
    write_trial(grid, "sum", result("rte", {"accuracy": 0.6}, distillation=how))
    report(grid)
    text = (tmp_path / "report/report.md").read_text()
    assert "| att-kl+val-kl | 2,4,6 | 60.0 | 1 | 57.5 ± 0.7 (4,8,12) |" in text


def test_distillations_stand_beside_htds_table_3(tmp_path: Path, report: Reporter) -> None:
    grid = write_grid(tmp_path / "grid", ["att-mse-1"])
    for seed, score in enumerate(BIG):
        how = {"objective": "att-mse", "init": "1,2,3", "teacher": "t", "layers": [], "stages": {}}
        two = {"f1": score, "accuracy": score - 0.1}
        more = {"distillation": how, "potstill": {"tokens": 1}}
        write_trial(grid, "att-mse-1", result("mrpc", two, seed=seed, **more))
    found = report(grid)
    (entry,) = found["distillations"]
    assert (entry["objective"], entry["init"], entry["seeds"]) == ("att-mse", "1,2,3", 3)
    assert found["models"][0]["pretraining"] is None  # the facts in a result are the teacher's
    text = (tmp_path / "report/report.md").read_text()
    assert "| att-mse | 1,2,3 | 71.0 ± 1.0 | 61.0 ± 1.0 | 3 | 72.4 ± 0.5 (1,2,3) |" in text


def test_markdown_and_csv_hold_the_same_figures(grid: Path, report: Reporter) -> None:
    found = report(grid, "--title", "Ours & <others>")
    text = (grid.parent / "report/report.md").read_text()
    assert text.startswith("# Ours &amp; &lt;others>\n")
    assert "| big | 81.0 ± 1.0 | 71.0 ± 1.0 |" in text
    assert "| training rows | 2,000 of 3,668 | 2,000 of 2,490 |" in text
    assert "| **big** (here) |" in text and "| Att-MSE (random) |" in text
    with open(grid.parent / "report/report.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == sum(len(score["values"]) for score in found["scores"])
    assert {"task": "rte", "model": "small", "seed": "1", "score": "0.69"}.items() <= rows[
        -2
    ].items()


def test_no_text_can_end_its_cell() -> None:
    assert cell("a|b\n<c>") == "a\\|b &lt;c>"


def test_a_second_report_replaces_the_first(grid: Path, report: Reporter) -> None:
    assert report(grid)["title"] != report(grid, "--title", "again")["title"]


def test_pretraining_comes_with_its_tokens_and_flops(tmp_path: Path, report: Reporter) -> None:
    student = tmp_path / "distilled/student"
    student.parent.mkdir()  # the student itself moved away
    lines = [{"kind": "train", "step": step, "flops": 1e9 * step} for step in (10, 20, 30)]
    (student.parent / "metrics.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines)
    )
    facts = {"objective": "att-mse", "steps": 20, "tokens": 2560, "teacher": "the teacher"}
    there = facts | {"teacher": "/models/of mine/the teacher"}
    made = result("rte", {"accuracy": 0.5}, potstill=there) | {"model": str(student)}
    write_json(tmp_path / "run/result.json", made)
    (model,) = report(tmp_path / "run")["models"]
    assert model["name"] == "distilled"
    assert model["pretraining"] == {"flops": 2e10, **facts}
    write_json(tmp_path / "run/result.json", made | {"potstill": facts | {"FLOPs": 7e12}})
    assert report(tmp_path / "run")["models"][0]["pretraining"]["flops"] == 7e12


def test_costs_are_of_the_model_as_told_else_as_the_grid_says(
    grid: Path, bert: Path, roberta: Path, report: Reporter
) -> None:
    paths = {"big": str(bert), "small": "models/moved"}
    prints = {"big": fingerprint(bert), "small": fingerprint(roberta)}
    models = {name: {"path": path, "sha256": prints[name]} for name, path in paths.items()}
    write_json(grid / "grid.json", {"models": models})
    found = {m["name"]: m for m in report(grid, "--models", f"small={roberta}")["models"]}
    for name, folder in (("big", bert), ("small", roberta)):
        assert found[name]["size_bytes"] == (folder / "model.safetensors").stat().st_size


def test_costs_are_never_those_of_another_model_than_was_fine_tuned(
    grid: Path, bert: Path, report: Reporter, refused: Callable[..., str]
) -> None:
    models = {name: {"path": str(bert), "sha256": "of before"} for name in ("big", "small")}
    write_json(grid / "grid.json", {"models": models})
    assert "another model than the one that was" in refused(grid, "--models", f"big={bert}")
    found = report(grid)
    assert [model["size_bytes"] for model in found["models"]] == [None, None]
    assert any("holds other files than were fine-tuned: big, small" in n for n in found["notes"])


def test_a_model_that_is_gone_has_no_costs_and_the_notes_say_so(
    grid: Path, report: Reporter
) -> None:
    found = report(grid)
    assert found["models"][0]["size_bytes"] is None
    assert any("folder is not there" in note and "big, small" in note for note in found["notes"])


def test_wrong_folders_names_and_outputs_are_refused_in_a_line(
    grid: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    assert f"{other}: neither a grid" in refused(other)
    assert "no such folder" in refused(tmp_path / "nowhere")
    assert "--baseline teacher: no such model; there are big, small" in refused(
        grid, "--baseline", "teacher"
    )
    assert "--teacher bert: no such model; there are big, small" in refused(
        grid, "--teacher", "bert"
    )
    assert "--models big=nowhere: no such folder" in refused(grid, "--models", "big=nowhere")
    assert "--models x: no such model" in refused(grid, "--models", f"x={other}")
    assert "--threads 0" in refused(grid, "--threads", "0")
    (other / "precious.txt").write_text("mine")
    assert "not empty and no report" in refused(grid, output=other)
    assert "no folder; give another one" in refused(grid, output=other / "precious.txt")
    assert (other / "precious.txt").read_text() == "mine"
    empty = write_grid(tmp_path / "empty", ["big"])
    assert "no configuration was trained to its end yet" in refused(empty)


@pytest.fixture
def real_run(bert: Path, tmp_path: Path, fine_tune: Callable[..., dict[str, Any]]) -> Path:
    """A real fine-tuning of the tiny BERT on MNLI-like rows."""
    names = ["entailment", "neutral", "contradiction"]
    for split in ("train", "validation_matched", "validation_mismatched"):
        write_parquet(tmp_path / f"glue/mnli/{split}.parquet", mnli_rows(48, names), names)
    flags = ["--model", bert, "--task", "mnli", "--data", tmp_path / "glue", "--epochs", 2]
    fine_tune(*map(str, flags), *QUICK, output=tmp_path / "real")
    return tmp_path / "real"


def test_a_real_run_is_reported_as_its_result_says(
    real_run: Path, bert: Path, report: Reporter
) -> None:
    result = json.loads((real_run / "result.json").read_text())
    found = report(real_run)
    scores = result["last"]["scores"]
    assert [s["mean"] for s in found["scores"]] == [v["accuracy"] for v in scores.values()]
    (task,), (model,), (curve,) = found["tasks"], found["models"], found["curves"]
    assert task["rows"] == {"train": 48, "validation": 48}
    assert (task["full_train_rows"], task["majority"]) == (392702, 1 / 3)
    assert model["size_bytes"] == (bert / "model.safetensors").stat().st_size
    assert [entry["epoch"] for entry in curve["epochs"]] == [1, 2]
    assert curve["train"] and all(line["loss"] > 0 for line in curve["train"])
    assert (real_run.parent / "report/report.html").read_text().startswith("<!")


def test_a_report_that_goes_to_others_names_no_folder_of_this_machine(
    grid: Path, report: Reporter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["finetune/report.py", str(grid)])
    failed = grid / "trials/rte/big/8e-5-16-2-0/failed.json"
    reason = f"{grid}/tokenised/rte.bin: no room; see {grid}/log and file://{grid}/more"
    write_json(failed, {"reason": reason, "attempts": 3})
    found = report(grid)
    assert found["failed"][0]["reason"] == "rte.bin: no room; see log and more"
    assert "machine" not in found["environment"]  # the host's name
    pages = [path for path in tmp_path.rglob("report.*") if path.is_file()]
    assert len(pages) == 4
    for page in pages:
        assert str(tmp_path) not in page.read_text(), page.name
