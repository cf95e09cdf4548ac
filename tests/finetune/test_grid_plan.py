"""A grid before it runs: names, flags, presets, order, what is refused, early stopping, tables."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from finetune.grid import main, run
from finetune.grids.check import ModelFacts, Survey, TaskFacts
from finetune.grids.early_stop import Rungs, rungs
from finetune.grids.file import claim, describe, withdraw
from finetune.grids.loop import Loop
from finetune.grids.plan import FineTuning, Planned, plan, short
from finetune.grids.settings import GridSettings, named_models, parse
from finetune.grids.tables import write_tables
from finetune.settings import DataSettings, RunSettings, TrainSettings
from potstill.errors import InputError
from potstill.lock import hold
from pretrain.signals import Signals
from tests.finetune.conftest import write_parquet

GRID: dict[str, Any] = {
    "models": {"tiny": {"path": "tiny", "sha256": "a"}},
    "tasks": ["rte"],
    "data_sha256": {"rte": "b"},
    "lr": [1e-5],
    "batch_size": [16],
    "epochs": [2],
    "seeds": 1,
    "distill": None,
    "max_length": 128,
    "max_train_rows": None,
    "max_validation_rows": None,
    "warmup": 0.06,
    "weight_decay": 0.01,
    "precision": "fp32",
    "save_models": "none",
    "start_from_task": None,
    "early_stop": False,
}


def rte(folder: Path, rows: int = 32) -> Path:
    """A folder with RTE's files in it."""
    columns: dict[str, list[Any]] = {
        "sentence1": [f"line {row}" for row in range(rows)],
        "sentence2": [("yes", "no")[row % 2] for row in range(rows)],
        "label": [row % 2 for row in range(rows)],
    }
    for split in ("train", "validation"):
        names = ["entailment", "not_entailment"]
        write_parquet(folder / f"rte/{split}.parquet", columns, names)
    return folder


def settings(tmp_path: Path, **changes: Any) -> GridSettings:
    """A grid of two models that need not be there for a plan."""
    (tmp_path / "a").mkdir(exist_ok=True)
    (tmp_path / "b").mkdir(exist_ok=True)
    given = {"data": "glue", "output": str(tmp_path / "grid"), "lr": "3e-5", "seeds": 2}
    return GridSettings(**(given | {"model": [f"{tmp_path}/a", f"{tmp_path}/b"]} | changes))


def survey(tmp_path: Path, **rows: int) -> Survey:
    """Facts about models of 100 and 900 parameters and tasks of so many rows of 10 tokens."""
    models = {
        name: ModelFacts(tmp_path / name, name, size) for name, size in (("a", 100), ("b", 900))
    }
    tasks = {
        task: TaskFacts({"train": count, "validation": 1}, 10.0, task)
        for task, count in rows.items()
    }
    return Survey(models, tasks)


def test_a_model_is_named_by_its_folder_or_by_the_one_above_a_student(tmp_path: Path) -> None:
    for place in ("small", "run/student", "other/model"):
        (tmp_path / place).mkdir(parents=True)
    flags = [f"{tmp_path}/{place}" for place in ("small", "run/student", "other/model")]
    assert list(named_models(flags)) == ["small", "run", "other"]
    assert named_models([f"x={tmp_path}/small"]) == {"x": tmp_path / "small"}


def test_the_presets_are_the_grids_of_the_papers_and_flags_win(tmp_path: Path) -> None:
    flags = ["--model", str(tmp_path), "--data", "d", "--output", "o", "--preset"]
    htd, etd = parse([*flags, "htd"]), parse([*flags, "etd", "--lr", "1e-5"])
    assert {lr for lr, _, _ in htd.combinations} == {1e-5, 3e-5, 5e-5, 8e-5}
    assert {(size, epochs) for _, size, epochs in htd.combinations} == {(16, 10), (32, 10)}
    assert htd.seeds == 4
    assert etd.combinations == [(1e-5, 32, 4), (1e-5, 32, 5), (1e-5, 32, 10)]


def test_a_users_preset_may_hold_numbers_lists_and_whatever_a_grid_needs(tmp_path: Path) -> None:
    values = {"lr": 1e-5, "epochs": [2, 3], "seeds": 2, "early_stop": True, "max_length": None}
    values |= {"model": [str(tmp_path)], "data": "d", "output": "o"}
    (tmp_path / "own.json").write_text(json.dumps(values))
    read = parse(["--preset", str(tmp_path / "own.json"), "--seeds", "3"])
    assert read.combinations == [(1e-5, size, epochs) for size in (16, 32) for epochs in (2, 3)]
    assert (read.seeds, read.early_stop, read.max_length) == (3, True, None)
    assert (read.data, read.model) == ("d", [str(tmp_path)])


@pytest.mark.parametrize(
    ("preset", "said"),
    [
        ('{"precision": "fp8"}', "argument --precision: invalid choice: 'fp8'"),
        ('{"seeds": 2.5}', "argument --seeds: invalid int value: '2.5'"),
        ('{"lr": {"from": 1}}', "lr is {'from': 1}; give text, a number or a list"),
        ('{"preset": "htd"}', "preset is no flag"),
        ('{"learning_rate": 1}', "learning_rate is no flag"),
        ("[1]", "is no flag"),
        ("{", "cannot be read"),
    ],
)
def test_a_preset_is_checked_as_the_command_line_is(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, bert: Path, preset: str, said: str
) -> None:
    (tmp_path / "own.json").write_text(preset)
    flags = ["--model", str(bert), "--data", str(tmp_path), "--output", str(tmp_path / "grid")]
    with pytest.raises(SystemExit) as stop:
        main([*flags, "--preset", str(tmp_path / "own.json")])
    assert stop.value.code == 2
    assert said in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "grid").exists()


def test_the_longest_trials_come_first_in_folders_named_by_their_settings(tmp_path: Path) -> None:
    trials = plan(settings(tmp_path), survey(tmp_path, rte=10, qqp=1000))
    assert [trial.cost for trial in trials] == sorted((t.cost for t in trials), reverse=True)
    # parameters x (6 x training rows + 2 x validation rows) x tokens x epochs
    assert trials[0].cost == 900 * (6 * 1000 + 2) * 10 * 10
    first = Path("trials/qqp/b/3e-5-16-10-0")
    assert trials[0].folder == tmp_path / "grid" / first
    assert len({trial.folder for trial in trials}) == len(trials) == 2 * 2 * 2 * 2


def test_what_starts_from_mnli_waits_for_all_mnli_trials_of_its_model(tmp_path: Path) -> None:
    chosen = settings(tmp_path, tasks="rte,mnli,cola", start_from_task="mnli")
    trials = plan(chosen, survey(tmp_path, rte=5000, mnli=10, cola=5000))
    mnli = {trial.folder for trial in trials if trial.task == "mnli" and trial.model == "a"}
    waiting = {frozenset(t.after) for t in trials if t.task == "rte" and t.model == "a"}
    assert waiting == {frozenset(mnli)}
    assert {trial.task for trial in trials[:8]} == {"mnli"}  # others wait for them
    assert not any(trial.after for trial in trials if trial.task != "rte")
    assert all(t.job.where.save_model is (t.task == "mnli") for t in trials)  # type: ignore[attr-defined]


def test_with_early_stopping_other_seeds_wait_for_the_first(tmp_path: Path) -> None:
    trials = plan(settings(tmp_path, early_stop=True), survey(tmp_path, rte=10))
    for trial in trials:
        first = trial.folder.with_name(f"3e-5-{trial.batch_size}-10-0")
        assert trial.after == (() if trial.seed == 0 else (first,))


@pytest.mark.parametrize(("rows", "parts", "then"), [(16, 2, 2), (16, 4, 4), (15, 2, 3), (1, 4, 1)])
def test_a_batch_is_computed_in_parts_that_divide_it(rows: int, parts: int, then: int) -> None:
    train = TrainSettings(batch_size=rows)
    job = FineTuning(RunSettings("m", "o"), DataSettings("rte"), train).in_parts(parts)
    assert job.train.accumulation == then
    assert job.train.batch_size == rows


@pytest.mark.parametrize("lr", [1e-5, 3e-5, 1.5e-6, 0.0001, 0.1, 3.3333333333333335e-05])
def test_a_learning_rate_in_a_name_is_read_back_exactly(lr: float) -> None:
    assert float(short(lr)) == lr
    assert "e-0" not in short(lr)


def test_the_rungs_are_behind_1_3_9_epochs_but_never_the_last() -> None:
    assert rungs(10) == [1, 3, 9]
    assert rungs(9) == [1, 3]
    assert rungs(1) == []


def test_a_rung_lets_the_best_third_so_far_go_on() -> None:
    judge, key = Rungs(), ("rte", "a", 10)
    scores = [0.5, 0.4, 0.6, 0.5, None, 0.55, 0.56, 0.7]
    # kept of those that came: 1 1 1 1 1 2 2 2; by hand the best and the best two
    expected = [True, False, True, False, False, True, True, True]
    names = map(str, range(len(scores)))
    assert [
        judge.goes_on(key, *one) for one in zip(names, [1] * 8, scores, strict=True)
    ] == expected
    assert judge.goes_on(key, "8", 2, 0.0)  # no rung
    assert judge.goes_on(("rte", "b", 10), "0", 1, 0.0)  # another model's


def test_a_trial_that_died_and_runs_again_counts_once_in_its_rung() -> None:
    judge, key = Rungs(), ("rte", "a", 10)
    for score in (0.7, 0.6, 0.6, 0.6, 0.6, 0.6):  # after the first the same trial, over and over
        judge.goes_on(key, str(score), 1, score)
    assert not judge.goes_on(key, "x", 1, 0.65)  # one of three goes on; of seven it were two


def test_refilled_rungs_judge_as_if_the_grid_had_not_been_stopped() -> None:
    entries = [{"epoch": epoch, "scores": {"validation": {"f1": 0.6}}} for epoch in (1, 2, 3)]
    result = {"main": {"split": "validation", "metric": "f1"}, "epochs": entries}
    judge, key = Rungs(), ("mrpc", "a", 10)
    judge.refill(key, "a", result)
    assert not judge.goes_on(key, "b", 1, 0.5)
    assert not judge.goes_on(key, "b", 3, 0.5)


def test_a_grid_may_grow_in_its_own_folder(tmp_path: Path) -> None:
    claim(tmp_path / "grid", GRID).release()
    more = GRID | {"tasks": ["cola"], "data_sha256": {"cola": "c"}, "lr": [3e-5], "seeds": 4}
    claim(tmp_path / "grid", more).release()
    grid = json.loads((tmp_path / "grid/grid.json").read_text())
    assert (grid["tasks"], grid["lr"], grid["seeds"]) == (["cola", "rte"], [1e-5, 3e-5], 4)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"max_length": 64}, "max_length is 128 there and 64 here"),
        ({"early_stop": True}, "early_stop is false there and true here"),
        ({"models": {"tiny": {"path": "x", "sha256": "z"}}}, "tiny has other weights"),
        ({"data_sha256": {"rte": "z"}}, "the rows of rte are others"),
    ],
)
def test_another_grids_folder_is_refused(tmp_path: Path, change: dict, said: str) -> None:
    claim(tmp_path / "grid", GRID).release()
    before = (tmp_path / "grid/grid.json").read_bytes()
    with pytest.raises(InputError, match=said):
        claim(tmp_path / "grid", GRID | change)
    assert (tmp_path / "grid/grid.json").read_bytes() == before


def test_what_a_killed_grid_left_half_written_is_removed(tmp_path: Path) -> None:
    half = tmp_path / "grid/from_mnli/.tiny.1.part"
    claim(tmp_path / "grid", GRID).release()
    half.mkdir(parents=True)
    claim(tmp_path / "grid", GRID).release()
    assert not half.exists()


def test_a_grid_that_began_behind_our_back_is_seen_under_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def begin_another(path: Path, message: str) -> Any:
        monkeypatch.undo()
        claim(tmp_path / "grid", GRID).release()
        return hold(path, message)

    monkeypatch.setattr("finetune.grids.file.hold", begin_another)
    with pytest.raises(InputError, match="max_length is 128 there and 64 here"):
        claim(tmp_path / "grid", GRID | {"max_length": 64})


def test_a_grid_that_goes_on_does_not_look_finished(tmp_path: Path) -> None:
    with claim(tmp_path / "grid", GRID):
        write_tables(tmp_path / "grid")
        withdraw(tmp_path / "grid")
        assert sorted(path.name for path in (tmp_path / "grid").iterdir()) == [".lock", "grid.json"]


def survey_of_a(tmp_path: Path) -> Survey:
    """Facts about one small model and four rows of RTE."""
    return Survey({"a": ModelFacts(tmp_path / "a", "a", 9)}, survey(tmp_path, rte=4).tasks)


@pytest.fixture
def stopped(tmp_path: Path) -> tuple[Path, GridSettings, list[Planned]]:
    """A grid whose only configuration's first seed was stopped after an epoch of two."""
    changes = {"early_stop": True, "batch_size": "16", "epochs": "2", "model": [f"{tmp_path}/a"]}
    (tmp_path / "a").mkdir()
    chosen = settings(tmp_path, **changes)
    there = survey_of_a(tmp_path)
    trials = plan(chosen, there)
    claim(tmp_path / "grid", describe(chosen, there)).release()
    assert [trial.seed for trial in trials] == [0, 1]
    trials[0].folder.mkdir(parents=True)
    content = json.dumps(result("rte", 3e-5, 0, 0.5, epochs=1))
    (trials[0].folder / "result.json").write_text(content)
    return tmp_path / "grid", chosen, trials


def test_the_other_seeds_of_what_was_stopped_early_need_no_worker(
    stopped: tuple[Path, GridSettings, list[Planned]],
) -> None:
    _, chosen, trials = stopped
    assert Loop(trials, chosen, lambda: None).open == 0


def test_a_result_that_is_none_is_named_before_anything_runs(
    stopped: tuple[Path, GridSettings, list[Planned]],
) -> None:
    _, chosen, trials = stopped
    (trials[0].folder / "result.json").write_text("{}")
    with pytest.raises(InputError, match="not a result of fine-tuning"):
        Loop(trials, chosen, lambda: None)


def test_a_folder_with_other_files_is_no_place_for_a_grid(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="not empty and no grid"):
        claim(tmp_path, GRID)


def result(task: str, lr: float, seed: int, score: float, epochs: int = 2) -> dict[str, Any]:
    """A result.json with what the tables read of it."""
    last = {"epoch": epochs, "scores": {"validation": {"accuracy": score}}}
    chosen = {"lr": lr, "batch_size": 16, "epochs": 2, "seed": seed, "data_sha256": "b"}
    return {
        "model": "m",
        "task": task,
        "settings": chosen | {"model_sha256": "a"},
        "main": {"split": "validation", "metric": "accuracy"},
        "parameters": 9,
        "rows": {"train": 8, "validation": 4},
        "majority": {"validation": {"accuracy": 0.5}},
        "last": last,
        "epochs": [last],
    }


def test_the_tables_hold_every_trial_the_best_configuration_and_what_failed(
    tmp_path: Path,
) -> None:
    claim(tmp_path / "grid", GRID | {"early_stop": True}).release()
    scores = [(1e-5, 0, 0.5, 2), (1e-5, 1, 0.7, 2), (3e-5, 0, 0.9, 1), (5e-5, 0, 0.4, 2)]
    for lr, seed, score, epochs in scores:
        folder = tmp_path / f"grid/trials/rte/tiny/{short(lr)}-16-2-{seed}"
        folder.mkdir(parents=True)
        content = json.dumps(result("rte", lr, seed, score, epochs))
        (folder / "result.json").write_text(content)
    failed = tmp_path / "grid/trials/rte/tiny/8e-5-16-2-0"
    failed.mkdir()
    (failed / "failed.json").write_text(json.dumps({"reason": "died|here", "attempts": 3}))
    write_tables(tmp_path / "grid")

    lines = (tmp_path / "grid/results.csv").read_text().splitlines()
    assert len(lines) == 1 + 4
    assert lines[3] == "rte,tiny,3e-05,16,2,0,validation,accuracy,0.9,8,1,"  # stopped after 1
    summary = (tmp_path / "grid/summary.md").read_text()
    # mean of 50 and 70, sample standard deviation 14.14; 90 was stopped, so it does not count
    assert "| rte | accuracy | tiny | 60.00 ± 14.14 | 1e-5 | 16 | 2 | 2 |" in summary
    assert "Configurations stopped early, and so in none of these rows: 1." in summary
    assert "| rte | tiny | 8e-5-16-2-0 | 3 | died/here |" in summary
    tables = json.loads((tmp_path / "grid/results.json").read_text())
    assert tables["best"][0]["values"] == {"0": 0.5, "1": 0.7}


Refused = Callable[..., str]


@pytest.fixture
def grid_refusal(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, bert: Path
) -> Callable[..., str]:
    """Run the program in this process, expecting status 2 and one line, which it gives."""

    def run(*flags: str) -> str:
        base = ["--data", str(rte(tmp_path / "data")), "--output", str(tmp_path / "grid")]
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([*base, "--max_length", "32", *map(str, flags)])
        assert stop.value.code == 2
        assert not (tmp_path / "grid").exists()
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
        assert len(lines) == 1
        return lines[0]

    return run


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--model", "{bert}", "x={bert}", "--lr", "x"], "--lr x: give numbers with commas"),
        (["--model", "{bert}", "--lr", "7"], "--lr 7"),
        (["--model", "{bert}", "--epochs", "0"], "--epochs 0: give numbers from 1 on"),
        (["--model", "{bert}", "--seeds", "0"], "--seeds 0"),
        (["--model", "nowhere"], "no such folder"),
        ([], "no model"),
        (["--model", "a={bert}", "a={bert}"], "two models are called a"),
        (["--model", "a/b={bert}"], "cannot name a folder"),
        (["--model", "{bert}", "--tasks", "mrpc"], "no folder mrpc/"),
        (["--model", "{bert}", "--tasks", "rtee"], "did you mean rte"),
        (["--model", "{bert}", "--tasks", "rte", "--start_from_task", "mnli"], "must have mnli"),
        (["--model", "{bert}", "--preset", "bert"], "give etd, htd"),
        (["--model", "{bert}", "--workers", "1", "--address", "auto"], "leave one out"),
        (["--model", "{bert}", "--address", "ray://x:1"], "no Ray client"),
        (["--model", "{bert}", "--address", "local"], "no running cluster"),
        (["--model", "{bert}", "--output", "{bert}/config.json/grid"], "is no folder"),
        (["--model", "{bert}", "--max_length", "500"], "500"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_written(
    grid_refusal: Refused, bert: Path, flags: list[str], said: str
) -> None:
    assert said in grid_refusal(*(flag.replace("{bert}", str(bert)) for flag in flags))


def test_a_grid_that_cannot_go_on_keeps_its_tables(
    monkeypatch: pytest.MonkeyPatch,
    stopped: tuple[Path, GridSettings, list[Planned]],
) -> None:
    output, chosen, trials = stopped
    write_tables(output)
    before = {path.name: path.read_bytes() for path in output.iterdir() if path.is_file()}
    (trials[0].folder / "result.json").unlink()

    def connected(*_: Any) -> Any:
        raise InputError("--address far: no cluster could be joined")

    monkeypatch.setattr("finetune.grid.connected", connected)
    with Signals() as signals, pytest.raises(InputError, match="no cluster could be joined"):
        run(chosen, survey_of_a(output.parent), trials, signals)
    assert {path.name: path.read_bytes() for path in output.iterdir() if path.is_file()} == before


def test_a_dry_run_prints_trials_and_rows_and_writes_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, bert: Path
) -> None:
    flags = ["--model", f"tiny={bert}", "--data", rte(tmp_path / "data"), "--seeds", "2"]
    grid = ["--lr", "1e-5", "--batch_size", "16", "--epochs", "2", "--max_length", "32"]
    main([*map(str, flags), *grid, "--output", str(tmp_path / "grid"), "--dry_run"])
    said = capsys.readouterr().out
    assert "rte: train 32, validation 32 rows" in said
    assert "rte tiny: lr 1e-5, batch 16, 2 epochs, seed 1" in said
    assert "2 trials, together about" in said
    assert not (tmp_path / "grid").exists()


def test_without_a_data_folder_the_tasks_load_from_the_hub(
    bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The hub's answer is stood in; nothing else is."""
    place = rte(tmp_path) / "rte"
    files = {split: str(place / f"{split}.parquet") for split in ("train", "validation")}
    asked: list[tuple[str, ...]] = []

    def load_dataset(*names: str) -> Any:
        asked.append(names)
        return datasets.load_dataset("parquet", data_files=files)

    grid = ["--tasks", "rte", "--max_length", "32", "--output", str(tmp_path / "grid")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("finetune.tasks.load_dataset", load_dataset)
        main(["--model", f"tiny={bert}", *grid, "--seeds", "1", "--dry_run"])
    assert asked == [("nyu-mll/glue", "rte")]
    assert "rte: train 32, validation 32 rows" in capsys.readouterr().out
