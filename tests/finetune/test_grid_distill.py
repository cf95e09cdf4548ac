"""Distillations in a grid: which trials there are, and what a grid of them refuses."""

from pathlib import Path
from typing import Any

import pytest

from finetune.distillation.parts import read_taught
from finetune.grids.check import Survey
from finetune.grids.distillation import Distilling, survey_distillations
from finetune.grids.file import claim, describe
from finetune.grids.plan import Planned, plan
from finetune.grids.settings import GridSettings, parse
from finetune.reporting.selection import best_of_grid, read_trials
from potstill.errors import InputError
from potstill.files import write_json
from tests.finetune.distilled import write_pairs, write_scored, write_teacher


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher of six layers for each of two tasks, and their rows."""
    folder = tmp_path_factory.mktemp("place")
    write_teacher(folder / "mnli", "bert")
    write_teacher(folder / "stsb", "bert", labels=1)
    write_scored(write_pairs(folder / "data"))
    return folder


def grid(place: Path, output: Path, **flags: Any) -> tuple[GridSettings, Survey, list[Planned]]:
    """A grid of both tasks with small batches of one epoch, but for `flags`."""
    teachers = f"mnli={place / 'mnli'},stsb={place / 'stsb'}"
    given: dict[str, Any] = {
        "teacher": teachers,
        "tasks": "mnli,stsb",
        "objective": "att-mse",
        "init": "paper",
        "lr": "1e-3",
        "batch_size": "16",
        "epochs": "1",
        "seeds": 1,
        "max_length": 32,
    }
    settings = GridSettings(data=str(place / "data"), output=str(output), **(given | flags))
    found = survey_distillations(settings)
    return settings, found, plan(settings, found)


def test_every_objective_meets_every_layer_choice(place: Path, tmp_path: Path) -> None:
    _, _, trials = grid(place, tmp_path, objective="att-mse,att-kl+hid-seq", seeds=2)
    names = {trial.model for trial in trials}
    assert names == {
        f"{objective}@{init}"
        for objective in ("att-mse", "att-kl+hid-seq")
        for init in ("2-4-6", "1-4-6", "1-2-3")
    }
    assert len(trials) == 2 * 2 * 3 * 2
    teachers = {
        (trial.task, Path(trial.job.settings.folders.teacher).name)
        for trial in trials
        if isinstance(trial.job, Distilling)
    }
    assert teachers == {("mnli", "mnli"), ("stsb", "stsb")}


def test_vanilla_kd_costs_no_first_stage(place: Path, tmp_path: Path) -> None:
    _, _, trials = grid(place, tmp_path, objective="att-mse,vanilla-kd", init="1,2", tasks="mnli")
    costs = {trial.model: trial.cost for trial in trials}
    assert costs["att-mse@1-2"] == pytest.approx(2 * costs["vanilla-kd@1-2"])


def test_lists_of_layers_stand_between_semicolons(place: Path, tmp_path: Path) -> None:
    _, _, trials = grid(place, tmp_path, init="1,2;last")
    assert {trial.model for trial in trials} == {"att-mse@1-2", "att-mse@last"}


def test_with_a_teacher_htd_is_the_papers_distillation_on_tasks(place: Path) -> None:
    flags = ["--tasks", "mnli,stsb", "--data", str(place / "data"), "--max_length", "32"]
    flags += ["--output", "o"]
    teachers = f"mnli={place / 'mnli'},stsb={place / 'stsb'}"
    settings = parse([*flags, "--preset", "htd", "--teacher", teachers, "--objective", "att-mse"])
    trials = plan(settings, survey_distillations(settings))
    recipes = {(t.task, t.lr, t.batch_size, t.epochs) for t in trials}
    assert recipes == {("mnli", 1e-5, 32, 10), ("stsb", 2e-5, 16, 10)}
    assert {t.model for t in trials} == {"att-mse@2-4-6", "att-mse@1-4-6", "att-mse@1-2-3"}
    assert len(trials) == 2 * 3 * 4  # tasks, layer choices, seeds
    jobs = [trial.job.settings for trial in trials if isinstance(trial.job, Distilling)]
    assert {job.recipe.weight_decay for job in jobs} == {0.1}
    assert {job.recipe.intermediate_epochs for job in jobs} == {10}


def test_what_only_distillation_knows_is_refused_elsewhere(place: Path) -> None:
    flags = ["--data", str(place / "data"), "--output", "o"]
    with pytest.raises(
        InputError, match="--preset etd: none that goes with --teacher; give htd, or"
    ):
        parse([*flags, "--preset", "etd", "--teacher", str(place / "mnli")])
    with pytest.raises(InputError, match="--lr paper: give numbers"):
        parse([*flags, "--lr", "paper", "--model", str(place / "mnli")])


def test_a_teacher_is_read_once_for_all_of_its_students(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []

    def counted(folder: Path, *rest: Any) -> Any:
        read.append(folder.name)
        return read_taught(folder, *rest)

    monkeypatch.setattr("finetune.grids.distillation.read_taught", counted)
    grid(place, tmp_path, objective="att-mse,hid-seq")
    assert read == ["mnli", "stsb"]


def test_a_batch_is_cut_in_parts_that_divide_it(place: Path, tmp_path: Path) -> None:
    _, _, trials = grid(place, tmp_path, batch_size="15")
    smaller = trials[0].job.in_parts(2)
    assert isinstance(smaller, Distilling)
    assert smaller.settings.recipe.accumulation == 3


def test_trials_share_the_teachers_features_and_are_read_as_a_grids(
    place: Path, tmp_path: Path
) -> None:
    settings, found, trials = grid(place, tmp_path / "grid", init="1,2", tasks="mnli", seeds=2)
    with claim(tmp_path / "grid", describe(settings, found)):
        for trial in trials:
            trial.job.run(None)
    (best,) = best_of_grid(read_trials([tmp_path / "grid"]))
    assert (best.model, sorted(best.values)) == ("att-mse@1-2", [0, 1])
    assert (tmp_path / "grid/knowledge/mnli/key-2.json").exists()


def test_another_teacher_or_recipe_is_another_grid(place: Path, tmp_path: Path) -> None:
    settings, found, _ = grid(place, tmp_path / "grid", init="1,2")
    there = describe(settings, found)
    claim(tmp_path / "grid", there).release()
    wider, more, _ = grid(place, tmp_path / "grid", init="1,2;3,4", objective="att-mse,hid-seq")
    claim(tmp_path / "grid", describe(wider, more)).release()  # more of the same is welcome
    hotter, same, _ = grid(place, tmp_path / "grid", init="1,2", temperature=2.0)
    with pytest.raises(InputError, match="distill is"):
        claim(tmp_path / "grid", describe(hotter, same))
    other = there | {"teacher_sha256": {"mnli": "0"}}
    write_json(tmp_path / "other/grid.json", other)
    with pytest.raises(InputError, match="the teacher's weights of mnli are others"):
        claim(tmp_path / "other", there)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"objective": None}, "give --objective and --init too"),
        ({"model": ["a"]}, "leave --model"),
        ({"teacher": None, "model": ["."]}, "--objective is for distillation"),
        ({"objective": "kd"}, "learns from an MLM head"),
        ({"init": "1,9"}, "the teacher's layers are 1 to 6"),
        ({"teacher": "nowhere"}, "no such folder"),
    ],
)
def test_bad_usage_is_refused(
    place: Path, tmp_path: Path, flags: dict[str, Any], said: str
) -> None:
    with pytest.raises(InputError, match=said):
        grid(place, tmp_path / "grid", **flags)


def test_teachers_of_unequal_depth_never_share_a_name_of_layers(
    place: Path, tmp_path: Path
) -> None:
    deep = write_teacher(tmp_path / "deep", "bert", labels=1, layers=12)
    with pytest.raises(InputError, match=r"12 layers, as the teacher of stsb has, make it att-mse"):
        grid(place, tmp_path / "grid", teacher=f"mnli={place / 'mnli'},stsb={deep}")


def test_a_task_without_a_teacher_is_refused(place: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="none for stsb"):
        grid(place, tmp_path / "grid", teacher=f"mnli={place / 'mnli'}")
    with pytest.raises(InputError, match="two for mnli"):
        grid(place, tmp_path / "grid", teacher=f"mnli={place / 'mnli'},mnli={place / 'stsb'}")
