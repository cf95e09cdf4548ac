"""The search over cuts: its points, what is done for each and when, tables and curve."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from finetune import search_cuts
from finetune.search import runs
from finetune.search.curve import frontier, write_curve
from finetune.search.folder import claim
from finetune.search.points import points_of
from finetune.search.results import LOSS, measures_of, read_points, share_kept, summary
from finetune.search.settings import parse
from potstill.errors import InputError
from potstill.signals import Signalled, raised_signals
from tests.finetune.conftest import write_parquet
from tests.launch import (
    LAYERS,
    LENGTH,
    REPOSITORY,
    Materials,
    environment,
    flags,
    metrics,
    write_ds_config,
)
from tests.launch import materials_fixture as materials_fixture

STUB = """
import json, pathlib, signal, sys, time
def flag(name):
    return sys.argv[sys.argv.index(name) + 1]
here, output = pathlib.Path(__file__).parent, pathlib.Path(flag("--output"))
def stop(number, _):
    (here / "stopped").write_text(str(number))
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
name = output.name
stage = pathlib.Path(__file__).stem if "--max_steps" not in sys.argv else flag("--max_steps")
with open(here / "calls", "a") as calls:
    calls.write(json.dumps([stage, name, sys.argv[1:]]) + "\\n")
while (here / f"hang-{name}").exists():
    time.sleep(0.01)
if (here / f"fail-{name}").exists():
    print("preparing", "error: no room for it", "", sep="\\n")
    sys.exit(1)
output.mkdir(parents=True, exist_ok=True)
if stage == "cache_knowledge":
    (output / "train-00000-of-00001.bin").write_bytes(bytes(6400))
    (output / "validation-00000-of-00001.bin").write_bytes(bytes(999))
elif stage == "0":
    for number, student in enumerate(json.loads(pathlib.Path(flag("--students")).read_text())):
        (output / "students" / student).mkdir(parents=True, exist_ok=True)
        lines = [{"kind": "event"}, {"kind": "validation", "loss": 4.0 + number}]
        text = "".join(json.dumps(line) + "\\n" for line in lines)
        (output / "students" / student / "metrics.jsonl").write_text(text)
"""


class Programs:
    """Stand-ins for the programs of `pretrain/`, which are done in an instant."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        for name in ("run.py", "cache_knowledge.py"):
            (folder / name).write_text(STUB)

    def calls(self) -> list[tuple[str, str, list[str]]]:
        """Stage (cache_knowledge, or the number of steps), point and flags of each call."""
        path = self.folder / "calls"
        return [*map(json.loads, path.read_text().splitlines())] if path.exists() else []

    def told(self, stage: str, name: str) -> list[str]:
        """The flags of the one call for a stage of a point."""
        (words,) = (words for one, point, words in self.calls() if (one, point) == (stage, name))
        return words


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Programs:
    """Stand-ins that the search starts instead of the programs; no curve is drawn, for speed."""
    made = Programs(tmp_path / "programs")
    monkeypatch.setattr(runs, "PROGRAMS", made.folder)
    monkeypatch.setattr(search_cuts, "write_curve", lambda output, points: None)
    return made


@pytest.fixture
def given(materials: Materials, tmp_path: Path) -> Callable[..., list[str]]:
    """The flags of a search; those that are named change it, None leaves one out."""

    def make(**changes: Any) -> list[str]:
        values = {
            "data": materials.shards,
            "teacher": materials.teacher,
            "objective": "hid-seq",
            "ds_config": write_ds_config(tmp_path / "ds.json"),
            "student_layers": 2,
            "keeps": "1l_10t_0.25h,2t",
            "steps": 7,
            "output": tmp_path / "search",
        }
        return flags(**(values | changes))

    return make


def ended(arguments: Sequence[str]) -> int:
    """The exit status of a search."""
    try:
        search_cuts.main(arguments)
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def names(arguments: Sequence[str]) -> list[str]:
    """The points that flags ask for, in order."""
    return [point.name for point in points_of(parse(arguments), LAYERS, LENGTH)]


def test_cuts_come_cheapest_first_between_nothing_and_the_whole(
    given: Callable[..., list[str]],
) -> None:
    keeps = "0.5h,2l_4t_0.5h,1l,1l_4t_0.5h,4t"  # of 2 layers and 32 tokens: 32, 4, 32, 2, 8
    found = names(given(keeps=keeps))
    assert found == ["none", "1l_4t_0.5h", "2l_4t_0.5h", "4t", "0.5h", "1l", "whole"]


@pytest.mark.parametrize("page", ["knowledge.md", "knowledge-search.md"])
def test_the_commands_of_the_documentation_make_sense(page: str) -> None:
    text = (REPOSITORY / "docs" / page).read_text().replace("\\\n", " ")
    (command,) = re.findall(r"^python finetune/search_cuts\.py (.*)$", text, re.MULTILINE)
    assert len(points_of(parse(shlex.split(command)), teacher_layers=12, tokens=128)) > 5


def test_lists_stand_for_every_combination_of_them(given: Callable[..., list[str]]) -> None:
    found = names(given(keeps=None, lengths="2,all", widths="0.25,all"))
    assert found == ["none", "2t_0.25h", "2t", "0.25h", "whole"]


def test_choices_multiply_the_cuts_that_they_matter_to(given: Callable[..., list[str]]) -> None:
    found = names(
        given(keeps="1l,2t_0.5h", keep_length="left_first,attention", keep_width="importance")
    )
    assert found == [
        "none",
        "2t_0.5h-attention-importance",
        "2t_0.5h-left_first-importance",
        "1l",
        "whole",
    ]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"keeps": "10t_1l"}, "--keep '10t_1l'"),
        ({"keeps": "3l"}, "--student_layers"),
        ({"keeps": "1l", "keep_depth": "t_top9"}, "t_top9: the teacher has only 4"),
        ({"keeps": "1t", "keep_length": "right_first"}, "--keep_length 'right_first'"),
        ({"keeps": None}, "--keeps 1l_10t_0.1h,2l_50t"),
        ({"lengths": "10"}, "either --keeps"),
        ({"seeds": 0}, "--seeds 0"),
        ({"budget_hours": 0}, "--budget_hours 0"),
        ({"task_rows": 9}, "give --tasks"),
        ({"tasks": "sst2"}, "--max_length 128: students have the teacher's 64 positions"),
        ({"tasks": "sst3", "max_length": 32}, "--task sst3: unknown"),
        ({"student_hidden": 16}, "--yardstick"),
        ({"objective": "hid-cls-contrast"}, "hid-cls-contrast need learned maps"),
        ({"objective": "mlm"}, "--yardstick"),
        ({"objective": "hid-sequence"}, "hid-sequence"),
        ({"objective": "att-mse", "student_heads": 2}, "minilmv2"),
        ({"objective": "pearson-keys"}, "t: --objective pearson-keys compares whole rows"),
        ({"objective": "att-mse", "keeps": "0.1h"}, "--keep 0.1h cuts neurons"),
        ({"objective": "hid-cls", "keep_length": "attention"}, "--keep_length attention"),
        ({"logits_top_k": 9}, "--logits_top_k 9: --objective hid-seq"),
        ({"copies": 2, "mlm_probability": 0}, "--copies 2"),
        ({"dropout": 1.5}, "--dropout 1.5"),
        ({"init": "1,2,3"}, "--init 1,2,3 names 3 teacher layers"),
        ({"student_hidden": 30, "yardstick": "att-mse"}, "--student_hidden 30"),
        ({"lr": -1}, "--lr"),
        ({"teacher": "/no/model"}, "--teacher"),
        ({"ds_config": "/no/file"}, "--ds_config"),
    ],
)
def test_a_search_that_cannot_be_is_refused_before_anything_runs(
    given: Callable[..., list[str]],
    programs: Programs,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    said: str,
) -> None:
    arguments = given(**changes)
    assert ended(arguments) == 2
    (line,) = [one for one in capsys.readouterr().err.splitlines() if one.startswith("error:")]
    assert said in line
    assert not programs.calls()
    assert not Path(arguments[arguments.index("--output") + 1]).exists()


def test_predictions_of_a_teacher_without_a_trained_head_are_refused_before_anything_runs(
    given: Callable[..., list[str]],
    programs: Programs,
    materials: Materials,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert ended(given(teacher=materials.headless, yardstick="kd")) == 2
    assert "has no trained MLM head, and --objective kd" in capsys.readouterr().err
    assert not programs.calls()


def test_narrow_students_are_compared_by_a_yardstick_without_maps(
    given: Callable[..., list[str]], programs: Programs
) -> None:
    assert ended(given(student_hidden=16, yardstick="att-mse")) == 0
    told = programs.told("0", "2t")
    assert told[told.index("--objective") + 1] == "att-mse"
    told = programs.told("7", "2t")
    assert told[told.index("--objective") + 1] == "hid-seq"


def test_every_cut_is_stored_learnt_by_all_seeds_in_one_run_and_compared_alike(
    given: Callable[..., list[str]], programs: Programs, tmp_path: Path
) -> None:
    assert ended(given(keep_length="attention", mlm_probability=0, seeds=3)) == 0
    order = [(stage, name) for stage, name, _ in programs.calls()]
    in_order = [("0", "none")]
    for name in ["1l_10t_0.25h-attention", "2t-attention", "whole"]:
        in_order += [("cache_knowledge", name), ("7", name), ("0", name)]
    assert order == in_order

    stored = programs.told("cache_knowledge", "1l_10t_0.25h-attention")
    assert "--layers" not in stored
    for pair in [
        *(["--keep", "1l_10t_0.25h"], ["--keep_length", "attention"], ["--student_layers", "2"]),
        *(["--dtype", "int8"], ["--mlm_probability", "0.0"], ["--seed", "0"]),
    ]:
        assert pair in [list(two) for two in pairwise(stored)]
    whole = [list(two) for two in pairwise(programs.told("cache_knowledge", "whole"))]
    assert "--keep" not in programs.told("cache_knowledge", "whole")
    assert ["--layers", "uniform"] in whole

    trained = programs.told("7", "1l_10t_0.25h-attention")
    search = tmp_path / "search"
    assert trained[trained.index("--layers") + 1] == "last"
    knowledge = str(search / "knowledge" / "1l_10t_0.25h-attention")
    assert trained[trained.index("--knowledge") + 1] == knowledge
    students = json.loads((search / "students" / "1l_10t_0.25h-attention.json").read_text())
    assert students == {f"seed-{seed}": {"student_seed": seed} for seed in range(3)}

    for name in ("none", "1l_10t_0.25h-attention", "2t-attention", "whole"):
        compared = programs.told("0", name)
        assert compared[compared.index("--layers") + 1] == "uniform"
        assert "--knowledge" not in compared and "--student_layers" not in compared
    points = {point.name: point for point in read_points(search)}
    assert points["2t-attention"].values == {LOSS: {0: 4.0, 1: 5.0, 2: 6.0}}


def test_the_masked_form_is_of_cuts_that_leave_tokens_or_neurons_out(
    programs: Programs, given: Callable[..., list[str]]
) -> None:
    assert ended(given(keeps="1l,2t", cut_form="masked")) == 0
    told = {name: programs.told("7", name) for name in ("1l", "2t", "whole")}
    assert {name for name, words in told.items() if "--cut_form" in words} == {"2t"}


def test_bytes_per_token_are_those_of_all_training_rows_and_copies(
    given: Callable[..., list[str]], programs: Programs, materials: Materials, tmp_path: Path
) -> None:
    assert ended(given(keeps="2t", copies=3, seeds=1)) == 0
    rows = json.loads((materials.shards / "manifest.json").read_text())["splits"]["train"]["rows"]
    none, *stored = read_points(tmp_path / "search")
    assert none.bytes_per_token == 0
    assert {point.name for point in stored} == {"2t", "whole"}
    for point in stored:
        assert point.bytes == 6400
        assert point.bytes_per_token == pytest.approx(6400 / (rows * 3 * 32))


def test_a_search_that_goes_on_does_nothing_twice(
    given: Callable[..., list[str]], programs: Programs, tmp_path: Path
) -> None:
    assert ended(given(keeps="2t")) == 0
    before = programs.calls()
    assert ended(given(keeps="2t")) == 0
    assert programs.calls() == before
    assert ended(given(keeps="1l,2t")) == 0
    assert [name for _, name, _ in programs.calls()[len(before) :]] == ["1l"] * 3
    (tmp_path / "search" / "records" / "2t" / "validate.json").unlink()
    assert ended(given(keeps="1l,2t")) == 0
    assert [call[:2] for call in programs.calls()[len(before) + 3 :]] == [["0", "2t"]]


def test_a_cut_that_fails_is_told_the_others_go_on_and_it_is_tried_again(
    given: Callable[..., list[str]],
    programs: Programs,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (programs.folder / "fail-2t").touch()
    assert ended(given()) == 1
    assert "2t: failed: no room for it (exit status 1; see 2t-store.log)" in capsys.readouterr().out
    results = json.loads((tmp_path / "search" / "results.json").read_text())
    assert [one["name"] for one in results["failed"]] == ["2t"]
    assert [point["name"] for point in results["points"]] == ["none", "1l_10t_0.25h", "whole"]
    assert "| 2t | no room for it" in (tmp_path / "search" / "summary.md").read_text()

    (programs.folder / "fail-2t").unlink()
    assert ended(given()) == 0
    assert "failed" not in (tmp_path / "search" / "summary.md").read_text()
    assert len(read_points(tmp_path / "search")) == 4


def test_another_searchs_folder_is_refused_by_what_differs(
    given: Callable[..., list[str]],
    programs: Programs,
    materials: Materials,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert ended(given(keeps="2t")) == 0
    before, search = programs.calls(), (tmp_path / "search" / "search.json").read_bytes()
    others: list[tuple[dict[str, Any], str]] = [
        ({"steps": 8}, "steps is 7 there and 8 here"),
        ({"dtype": "fp16"}, 'dtype is "int8" there and "fp16" here'),
        ({"seeds": 1}, "seeds is 2 there and 1 here"),
        ({"data": materials.ragged}, "shards_sha256 is"),
        ({"teacher": materials.headless}, "teacher is"),
    ]
    for changes, said in others:
        for more in ([], ["--dry_run"]):
            assert ended([*given(keeps="2t", **changes), *more]) == 2
            assert f"another search's folder ({said}" in capsys.readouterr().err
    assert programs.calls() == before
    assert (tmp_path / "search" / "search.json").read_bytes() == search


def test_a_teacher_with_another_tokenizer_than_the_shards_is_refused(
    given: Callable[..., list[str]],
    programs: Programs,
    materials: Materials,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = shutil.copytree(materials.teacher, tmp_path / "other")
    path = other / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    words = tokenizer["model"]["vocab"]
    one, two = sorted(words)[-2:]
    words[one], words[two] = words[two], words[one]
    path.write_text(json.dumps(tokenizer))
    assert ended(given(teacher=other)) == 2
    assert "has another tokenizer than the shards" in capsys.readouterr().err
    assert not programs.calls()


def test_a_folder_that_holds_something_else_is_refused(
    given: Callable[..., list[str]], programs: Programs, tmp_path: Path
) -> None:
    (tmp_path / "search").mkdir()
    (tmp_path / "search" / "thesis.tex").touch()
    assert ended(given()) == 2
    assert [path.name for path in (tmp_path / "search").iterdir()] == ["thesis.tex"]


def test_no_cut_begins_that_the_budget_may_not_suffice_for(
    given: Callable[..., list[str]],
    programs: Programs,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert ended(given(keeps="2t")) == 0
    path = tmp_path / "search" / "records" / "2t" / "train.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"seconds": 7200.0}))
    before = programs.calls()
    assert ended(given(keeps="2t,1l", budget_hours=1.9)) == 1
    assert "--budget_hours is over with 1 points left" in capsys.readouterr().err
    assert programs.calls() == before
    assert ended(given(keeps="2t,1l", budget_hours=2.1)) == 0


def test_tasks_and_their_knobs_may_come_later_but_not_change(tmp_path: Path) -> None:
    def search(tasks: dict[str, str], **settings: int | None) -> dict[str, Any]:
        knobs: dict[str, Any] = {"max_length": 128, "task_rows": None, "epochs": 3, "steps": 7}
        knobs |= {"task_lr": 5e-5, "task_batch_size": 32, **settings}
        return {"settings": knobs, "teacher": "t", "tasks": tasks}

    first, tuned = search({}), search({"sst2": "a"}, task_rows=9)
    for asked in (first, tuned, first, search({"mrpc": "b"}, task_rows=9)):
        claim(tmp_path, asked).release()
    merged = json.loads((tmp_path / "search.json").read_text())
    assert merged["tasks"] == {"sst2": "a", "mrpc": "b"}
    assert merged["settings"]["task_rows"] == 9
    with pytest.raises(InputError, match="task_rows is 9 there and 8 here"):
        claim(tmp_path, search({"rte": "c"}, task_rows=8))
    with pytest.raises(InputError, match="steps is 7 there and 8 here"):
        claim(tmp_path, search({}, steps=8))


@pytest.mark.timeout(60)
def test_a_program_that_does_not_end_is_killed_by_a_second_signal(tmp_path: Path) -> None:
    deaf = "import os, signal, time; say = lambda *_: print(os.getpid(), flush=True); "
    deaf += "signal.signal(signal.SIGTERM, say); say(); time.sleep(300)"

    def interrupt() -> None:
        for lines in (1, 2):  # the second signal comes when the program has had the first
            while not (log.exists() and log.read_text().count("\n") == lines):
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGTERM)

    log, thread = tmp_path / "log", threading.Thread(target=interrupt, daemon=True)
    thread.start()
    with pytest.raises(Signalled), raised_signals():
        runs.execute([sys.executable, "-c", deaf], log)
    thread.join()
    with pytest.raises(ProcessLookupError):
        os.kill(int(log.read_text().split()[0]), 0)


@pytest.mark.timeout(60)
def test_a_signal_reaches_the_program_that_runs_and_the_search_goes_on_later(
    given: Callable[..., list[str]], programs: Programs
) -> None:
    (programs.folder / "hang-2t").touch()

    def interrupt() -> None:
        while not any(name == "2t" for _, name, _ in programs.calls()):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=interrupt, daemon=True)
    thread.start()
    assert ended(given(keeps="2t")) == 143
    thread.join()
    assert (programs.folder / "stopped").read_text() == str(int(signal.SIGTERM))
    (programs.folder / "hang-2t").unlink()
    assert ended(given(keeps="2t")) == 0


def write_point(
    search: Path, keep: str, size: float, losses: Sequence[float], scores: Sequence[float | None]
) -> None:
    """Records of a finished point, with scores on one task."""
    folder = search / "records" / keep
    folder.mkdir(parents=True)
    shared = {"keep": keep, "choices": {}, "seconds": 12.0}
    stages: dict[str, Any] = {
        "store": {"bytes": int(100 * size), "bytes_per_token": size},
        "train": {"students": {}},
        "validate": {"losses": {str(seed): loss for seed, loss in enumerate(losses)}},
    }
    for seed, score in enumerate(scores):
        own = {"task": "sst2", "metric": "accuracy", "score": score, "majority": 0.5}
        stages[f"sst2-{seed}"] = own
    for stage, record in stages.items():
        (folder / f"{stage}.json").write_text(json.dumps(shared | record))


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A finished search whose figures can be checked by hand."""
    write_point(tmp_path, "whole", 1536.0, [1.0, 1.2], [0.9, 0.92])
    write_point(tmp_path, "1l_1t", 6.0, [2.0, 2.2], [0.8, 0.84])
    write_point(tmp_path, "2t", 24.0, [2.5, 2.7], [0.7, None])
    write_point(tmp_path, "none", 0.0, [3.0, 3.2], [0.6, 0.6])
    return tmp_path


def test_tables_hold_mean_spread_and_the_share_of_the_gain(made: Path) -> None:
    points = read_points(made)
    assert [point.keep for point in points] == ["none", "1l_1t", "2t", "whole"]
    assert measures_of(points) == [LOSS, "sst2 accuracy, %"]
    assert [share_kept(point, points, LOSS) for point in points] == pytest.approx(
        [0.0, 0.5, 0.25, 1.0]
    )
    lines = summary(points, [{"name": "1l", "reason": "no room | at all"}]).splitlines()
    row = next(line for line in lines if line.startswith("| 1l_1t "))
    assert row == "| 1l_1t |  | 6 | 2.1 ± 0.14 | 82 ± 2.8 | 50% | 12 | 12 |"
    row = next(line for line in lines if line.startswith("| none "))
    assert row.split(" | ")[-3] == "0%"
    row = next(line for line in lines if line.startswith("| 2t "))
    assert row == "| 2t |  | 24 | 2.6 ± 0.14 | undefined | 25% | 12 | 12 |"
    assert lines[-1] == "| 1l | no room / at all |"


def test_the_scores_of_some_seeds_alone_have_no_mean(made: Path) -> None:
    (made / "records" / "1l_1t" / "sst2-1.json").unlink()
    points = {point.keep: point for point in read_points(made)}
    assert points["1l_1t"].mean("sst2 accuracy, %") is None
    assert "| 1l_1t |  | 6 | 2.1 ± 0.14 | 1 of 2 seeds | 50% |" in summary([*points.values()], [])


def test_the_frontier_is_the_best_of_all_that_costs_no_more(made: Path) -> None:
    points = [point for point in read_points(made) if point.bytes]
    sizes, best = frontier(points, LOSS)
    assert sizes == [6.0, 24.0, 1536.0]
    assert best == pytest.approx([2.1, 2.1, 1.1])
    scored = [point for point in points if point.mean("sst2 accuracy, %") is not None]
    assert frontier(scored, "sst2 accuracy, %")[1] == pytest.approx([82.0, 91.0])


def test_the_curve_is_drawn_the_same_each_time(made: Path, tmp_path: Path) -> None:
    points = read_points(made)
    drawn = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_curve(tmp_path / name, points)
        drawn.append([(tmp_path / name / f"curve.{kind}").read_bytes() for kind in ("svg", "png")])
    assert drawn[0] == drawn[1]
    svg = drawn[0][0].decode()
    for text in ("1l_1t", "2t", "whole", "bytes per token", "sst2 accuracy, %"):
        assert f"<!-- {text} -->" in svg
    assert "no knowledge (0 bytes)" in svg


def test_a_damaged_record_is_named(made: Path) -> None:
    (made / "records" / "2t" / "store.json").write_text("{")
    with pytest.raises(InputError, match=r"2t/store\.json: cannot be read"):
        read_points(made)


def write_rows(folder: Path) -> Path:
    """A tiny task whose label stands in its text."""
    for split, rows in (("train", 32), ("validation", 16)):
        labels = [row % 2 for row in range(rows)]
        texts = [f"{'no' if label else 'if'} line {row}" for row, label in enumerate(labels)]
        columns: dict[str, list[Any]] = {"sentence": texts, "label": labels}
        write_parquet(folder / "sst2" / f"{split}.parquet", columns, ["negative", "positive"])
    return folder


def test_students_of_a_real_search_stand_between_the_untrained_and_the_whole(
    given: Callable[..., list[str]], materials: Materials, tmp_path: Path
) -> None:
    search = tmp_path / "search"
    arguments = given(
        data=materials.ragged,
        keeps="1l_4t_0.25h",
        keep_width="importance",
        dtype="fp32",
        steps=12,
        lr=3e-3,
        tasks="sst2",
        task_data=write_rows(tmp_path / "tasks"),
        max_length=32,
        epochs=1,
    )
    done = subprocess.run(
        [sys.executable, "tests/finetune/forked_search.py", *arguments],
        cwd=REPOSITORY,
        env=environment(materials.folder) | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

    points = {point.keep: point for point in read_points(search)}
    assert list(points) == ["none", "1l_4t_0.25h", "whole"]  # by bytes per token
    assert all((search / f"curve.{kind}").stat().st_size > 1000 for kind in ("svg", "png"))
    for point in points.values():
        assert set(point.values) == {LOSS, "sst2 accuracy, %"}
        assert all(set(values) == {0, 1} for values in point.values.values())
    for seed in range(2):
        run = search / "students" / "whole" / "students" / f"seed-{seed}"
        first, *_, last = (line["loss"] for line in metrics(run, "validation"))
        assert points["none"].values[LOSS][seed] == pytest.approx(first, rel=1e-6)
        assert points["whole"].values[LOSS][seed] == pytest.approx(last, rel=1e-6)
        assert last < first
