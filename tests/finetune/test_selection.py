"""Which trials are read, and which configuration stands for a model's grid."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finetune.reporting.selection import best_of_grid, cells, mean_and_std, read_trials
from potstill.errors import InputError
from tests.finetune.made_grid import result, write_grid, write_json, write_scores, write_trial


@pytest.fixture
def grid(tmp_path: Path) -> Path:
    """A grid of two models without trials."""
    return write_grid(tmp_path / "grid", ["a", "b"])


def test_the_best_configuration_has_the_highest_mean_of_the_last_epoch(grid: Path) -> None:
    write_scores(grid, "a", "rte", {1e-5: [0.6, 0.7], 3e-5: [0.8, 0.6], 5e-5: [0.9, 0.3]})
    (best,) = best_of_grid(read_trials([grid]))
    assert (best.lr, best.values) == (3e-5, {0: 0.8, 1: 0.6})
    assert best.mean == pytest.approx(0.7)
    assert best.std == pytest.approx(np.std([0.8, 0.6], ddof=1))


def test_of_equal_means_the_smaller_learning_rate_then_batch_then_epochs_count(grid: Path) -> None:
    for lr, batch_size, epochs in ((3e-5, 16, 2), (1e-5, 32, 2), (1e-5, 16, 3), (1e-5, 16, 2)):
        made = result("rte", {"accuracy": 0.7}, lr=lr, batch_size=batch_size, epochs=epochs)
        write_trial(grid, "a", made)
    (best,) = best_of_grid(read_trials([grid]))
    assert (best.lr, best.batch_size, best.epochs) == (1e-5, 16, 2)


def test_a_configuration_with_fewer_seeds_cannot_win(grid: Path) -> None:
    write_scores(grid, "a", "rte", {1e-5: [0.6, 0.6], 3e-5: [0.9]})
    (best,) = best_of_grid(read_trials([grid]))
    assert best.lr == 1e-5


def test_a_configuration_that_was_stopped_early_does_not_count(grid: Path) -> None:
    write_scores(grid, "a", "rte", {1e-5: [0.6]})
    stopped = result("rte", {"accuracy": 0.9}, lr=3e-5)
    write_trial(grid, "a", {**stopped, "last": stopped["epochs"][0]})
    trials = read_trials([grid])
    assert [trial.whole for trial in trials] == [True, False]
    assert [cell.lr for cell in cells(trials)] == [1e-5]


def test_an_undefined_score_leaves_the_mean_undefined_and_loses(grid: Path) -> None:
    write_scores(grid, "a", "cola", {1e-5: [None, 0.9], 3e-5: [0.1, 0.1]})
    assert best_of_grid(read_trials([grid]))[0].lr == 3e-5
    assert mean_and_std([None, 0.9]) == (None, None)


def test_one_seed_has_no_deviation() -> None:
    assert mean_and_std([0.25]) == (0.25, None)


def test_models_and_tasks_are_chosen_for_apart_and_sorted(grid: Path) -> None:
    for model, task in (("b", "rte"), ("a", "rte"), ("a", "cola")):
        write_scores(grid, model, task, {1e-5: [0.5]})
    best = best_of_grid(read_trials([grid]))
    assert [(one.task, one.model) for one in best] == [("cola", "a"), ("rte", "a"), ("rte", "b")]


def test_a_trial_without_result_is_left_out_and_a_folder_given_twice_counts_once(
    grid: Path,
) -> None:
    write_scores(grid, "a", "rte", {1e-5: [0.5]})
    (grid / "trials/rte/a/3e-05-16-2-0").mkdir()
    assert len(read_trials([grid, grid])) == 1


@pytest.mark.parametrize(("path", "name"), [("models/small", "small"), ("runs/r1/student", "r1")])
def test_a_single_run_is_called_by_its_models_folder(tmp_path: Path, path: str, name: str) -> None:
    write_json(tmp_path / "run/result.json", {**result("rte", {"accuracy": 0.5}), "model": path})
    (trial,) = read_trials([tmp_path / "run"])
    assert trial.model == name


def test_a_distilled_run_is_called_by_objective_and_layers(tmp_path: Path) -> None:
    how = {"objective": "att-mse", "init": "1,2,3"}
    write_json(tmp_path / "result.json", result("rte", {"accuracy": 0.5}, distillation=how))
    assert read_trials([tmp_path])[0].model == "att-mse (1,2,3)"


def test_other_folders_and_unfinished_runs_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"{tmp_path}: neither a grid .* nor a fine-tuning run"):
        read_trials([tmp_path])
    write_json(tmp_path / "config.json", {})
    with pytest.raises(InputError, match="no result.json; let the run finish"):
        read_trials([tmp_path])
    write_json(tmp_path / "result.json", {"loss": 1})
    with pytest.raises(InputError, match="not a result of fine-tuning"):
        read_trials([tmp_path])


@pytest.mark.parametrize("content", ["{", "[]", '{"models": {"a": {}}}', '{"models": 3}', "{}"])
def test_a_damaged_grid_file_is_refused_by_name(tmp_path: Path, content: str) -> None:
    (tmp_path / "grid.json").write_text(content)
    with pytest.raises(InputError, match="grid.json: "):
        read_trials([tmp_path])


def test_trials_on_other_rows_are_not_compared(grid: Path) -> None:
    write_scores(grid, "a", "rte", {1e-5: [0.5]})
    write_scores(grid, "b", "rte", {1e-5: [0.5]}, settings={"max_train_rows": 100})
    with pytest.raises(InputError, match="max_train_rows is 100 there and None in"):
        read_trials([grid])


def test_trials_of_one_model_that_differ_in_more_than_the_grid_are_not_mixed(grid: Path) -> None:
    write_scores(grid, "a", "rte", {1e-5: [0.5]})
    write_scores(grid, "a", "rte", {3e-5: [0.5]}, settings={"precision": "bf16"})
    with pytest.raises(InputError, match="precision is 'bf16' there and 'fp32' in"):
        read_trials([grid])


def test_seeds_of_one_model_share_its_settings_but_for_a_start_from_another_task(
    grid: Path,
) -> None:
    write_scores(grid, "a", "rte", {1e-5: [0.5]})
    second = result("rte", {"accuracy": 0.6}, seed=1, settings={"model_sha256": "tuned, seed 1"})
    write_trial(grid, "a", second)
    assert len(best_of_grid(read_trials([grid]))[0].values) == 2
    write_trial(grid, "a", result("rte", {"accuracy": 0.7}, seed=2, settings={"warmup": 0.5}))
    with pytest.raises(InputError, match="warmup is 0.5 there and None in"):
        read_trials([grid])


def _distilled(epochs: int, passes: int, **more: str) -> dict[str, Any]:
    """A distillation of `passes` in stage 1 and `epochs` in stage 2; `more` are settings."""
    how = {"objective": "att-mse", "init": "1,2,3"}
    settings = {"intermediate_epochs": passes, **more}
    return result("rte", {"accuracy": 0.5}, epochs=epochs, distillation=how, settings=settings)


def test_stage_1_may_be_as_long_as_a_stage_2_that_the_grid_varies(grid: Path) -> None:
    for epochs in (2, 3):
        write_trial(grid, "a", _distilled(epochs, epochs))
    assert [cell.epochs for cell in cells(read_trials([grid]))] == [2, 3]
    for epochs in (2, 3):
        write_trial(grid, "b", _distilled(epochs, 2))
    assert [cell.epochs for cell in cells(read_trials([grid]))] == [2, 3, 2, 3]
    write_trial(grid, "a", _distilled(4, 2))
    with pytest.raises(InputError, match="intermediate_epochs is 3 there and 2 in"):
        read_trials([grid])


def test_runs_distilled_from_the_teachers_of_two_tasks_are_one_model(tmp_path: Path) -> None:
    rte = _distilled(2, 2, model_sha256="teacher of rte")
    write_json(tmp_path / "rte/result.json", rte)
    mrpc = {**_distilled(2, 2, model_sha256="teacher of mrpc"), "task": "mrpc"}
    write_json(tmp_path / "mrpc/result.json", mrpc)
    trials = read_trials([tmp_path / "rte", tmp_path / "mrpc"])
    assert {trial.model for trial in trials} == {"att-mse (1,2,3)"}
    other = _distilled(2, 2, model_sha256="another teacher")
    other["settings"]["seed"] = 1
    write_json(tmp_path / "other/result.json", other)
    with pytest.raises(InputError, match="model_sha256 is 'another teacher' there"):
        read_trials([tmp_path / "rte", tmp_path / "other"])


def test_a_result_that_lacks_a_part_is_refused_by_name(tmp_path: Path) -> None:
    made = result("rte", {"accuracy": 0.5})
    del made["majority"]
    write_json(tmp_path / "result.json", made)
    with pytest.raises(InputError, match="not a result of fine-tuning .*majority"):
        read_trials([tmp_path])


def test_two_models_of_one_name_and_the_same_trial_twice_are_refused(
    grid: Path, tmp_path: Path
) -> None:
    other = write_grid(tmp_path / "other", ["a"])
    write_scores(grid, "a", "rte", {1e-5: [0.5]})
    write_scores(other, "a", "rte", {1e-5: [0.6]})
    with pytest.raises(InputError, match="the same trial as"):
        read_trials([grid, other])
    write_json(other / "grid.json", {"models": {"a": {"sha256": "another"}}})
    with pytest.raises(InputError, match="its model a is not the a of"):
        read_trials([grid, other])
