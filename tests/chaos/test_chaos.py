"""The short form of the chaos program, each part with few cases, and whether it sees what it seeks.

What happens to runs of the trainer is in test_runs.py; `python -m tests.chaos` does more of all.
"""

import json
import math
from dataclasses import replace
from pathlib import Path
from random import Random
from signal import SIGINT, SIGKILL
from types import ModuleType
from typing import Any

import pytest

from tests.chaos import kills, preemptions, sharder
from tests.chaos.__main__ import new_place, part_of
from tests.chaos.bad_input import Ended, Name, judge
from tests.chaos.chains import Struck, resumed_wrong
from tests.chaos.common import Case, Outcome
from tests.chaos.report import add, is_done, read_report, table
from tests.chaos.runs import Result, Seen, Setup, shares
from tests.chaos.worlds import COMPARED, Tally, Walk, walks

SHORT = {  # part: seed and count
    "sharder": (88, 2),  # killed at a write; a full disk
    "bad_input": (0, 50),
    "bad_input_processes": (0, 3),  # of the sharder, of the trainer, of extract.py
}
LAUNCHED, BARE = Setup(2, 1), Setup(2, 1, launcher=False)
WHOLE = Result([(1, 0.5, 1.0), (2, 0.25, 1.0)], [(0, 1.0), (2, 0.5)], {"student": "ab"})


@pytest.mark.slow
@pytest.mark.parametrize("part", SHORT)
def test_nothing_is_lost(part: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    seed, count = SHORT[part]
    folder = tmp_path_factory.getbasetemp() / f"chaos-{part}"
    folder.mkdir()
    outcome = part_of(part)(seed, count, folder)
    assert not outcome.failures, "\n".join(outcome.failures)
    assert (outcome.asked, outcome.passed) == (count, count)
    assert outcome.details.get("ended before their end", count) == count, "nothing was broken"


@pytest.mark.parametrize("part", [kills, preemptions])
def test_a_hundred_draws_reach_every_target_and_moment(part: ModuleType) -> None:
    draw = part.draw
    blows = [draw(0, case, LAUNCHED) for case in range(100)]
    assert blows == [draw(0, case, LAUNCHED) for case in range(100)], "no pure function"
    assert {blow.aim for blow in blows} == set(part.AIMS)
    assert {blow.target for blow in blows} >= {"rank", "launch.py", "deepspeed", "group"}
    assert {draw(0, case, BARE).target for case in range(100)} <= {"rank", "ranks", "group"}


@pytest.mark.parametrize(
    "broken",
    [
        replace(WHOLE, losses=WHOLE.losses[:1]),
        replace(WHOLE, losses=[*WHOLE.losses, WHOLE.losses[1]]),
        replace(WHOLE, losses=[WHOLE.losses[0], (2, 0.25, 1.0 + 2**-52)]),
        replace(WHOLE, held_out=WHOLE.held_out[1:]),
        replace(WHOLE, weights={"student": "ac"}),
        replace(WHOLE, weights={}),
    ],
)
def test_a_run_that_is_not_bitwise_the_unbroken_one_is_told(broken: Result) -> None:
    assert broken.differences(WHOLE) and not WHOLE.differences(WHOLE)


@pytest.mark.parametrize(
    "before, after, right",
    [
        (Seen(None, 0, ()), Seen(5, 7, ()), True),  # fresh
        (Seen(5, 7, ()), Seen(10, 12, (5,)), True),  # went on
        (Seen(5, 7, ()), Seen(5, 7, ()), True),  # ended before it got there
        (Seen(5, 7, ()), Seen(10, 12, ()), False),  # took steps, from scratch
        (Seen(5, 7, ()), Seen(10, 12, (0,)), False),  # from an older one
        (Seen(10, 12, (5,)), Seen(5, 7, ()), False),  # its metrics were cut away
    ],
)
def test_a_start_from_elsewhere_than_the_newest_checkpoint_is_told(
    before: Seen, after: Seen, right: bool
) -> None:
    assert bool(resumed_wrong(before, after)) is not right


def _struck(after: Seen, seconds: float | None, status: int) -> Struck:
    blow = replace(preemptions.draw(0, 0, BARE), number=SIGINT)
    before = Seen(5, 5, ())
    return Struck(blow, "rank", before, before, after, 0, 0, seconds, [status, status])


def test_a_preemption_without_its_checkpoint_or_status_is_told() -> None:
    def faults(after: Seen, seconds: float | None, status: int) -> int:
        return len(preemptions.judge(_struck(after, seconds, status), BARE))

    assert faults(Seen(9, 9, (5,)), 1.0, 130) == 0
    assert faults(Seen(8, 9, (5,)), 1.0, 130) == 1
    assert faults(Seen(9, 9, (5,)), None, 130) == 1
    assert faults(Seen(9, 9, (5,)), 1.0, 143) == 1


def test_a_kill_that_takes_a_checkpoint_or_leaves_processes_is_told() -> None:
    def faults(newest: int, seconds: float | None) -> int:
        struck = _struck(Seen(newest, 9, ()), seconds, -SIGKILL)
        return len(kills.judge(struck, LAUNCHED))

    assert (faults(5, 1.0), faults(0, 1.0), faults(5, None)) == (0, 1, 1)


@pytest.mark.parametrize("count", [1, 2, 6, 12])
def test_walks_have_as_many_changes_as_asked(count: int) -> None:
    planned = walks(0, count)
    assert sum(len(walk) - 1 for walk in planned) == count
    assert all(a != b for walk in planned for a, b in zip(walk, walk[1:], strict=False))


@pytest.mark.parametrize("wrong", [1.01, math.nan])
@pytest.mark.parametrize("step", [6, 7, 6 + COMPARED - 1, 6 + COMPARED])
def test_one_other_loss_behind_a_change_is_told(tmp_path: Path, wrong: float, step: int) -> None:
    walk = Walk([(1, 0), (2, 0)], tmp_path, tmp_path, Tally())
    losses = {n: 1.0 for n in range(1, 30)}
    write_losses(tmp_path / "unchanged" / "run", losses)
    write_losses(walk.changed, losses | {step: wrong})
    told = step < 6 + COMPARED
    assert (bool(walk.compare()), walk.tally.passed) == (told, not told)


def write_losses(run: Path, losses: dict[int, float]) -> None:
    """The metrics of a run that went on from step 5."""
    lines: list[dict[str, Any]] = [{"kind": "event", "event": "resume", "step": 5}]
    lines += [{"kind": "train", "step": n, "loss": loss} for n, loss in losses.items()]
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))


@pytest.mark.parametrize(
    "status, text, right",
    [
        (0, "", True),
        (1, "shard.py: error: the disk is full", True),
        (1, "Killed", False),
        (0, "Traceback (most recent call last):", False),
        (143, "Traceback (most recent call last):", False),
        (1, "Traceback (most recent call last):\nerror: x", False),
        (-SIGINT, "Traceback (most recent call last):\nKeyboardInterrupt", True),
        (
            0,
            "Exception ignored in atexit\nTraceback (most recent call last):\nKeyboardInterrupt: ",
            True,
        ),
        (130, "Traceback (most recent call last):\nKeyboardInterrupt\nerror: stopped", False),
        (3, "", False),
    ],
)
def test_a_traceback_of_the_sharder_is_told_whatever_its_status(
    tmp_path: Path, status: int, text: str, right: bool
) -> None:
    errors = tmp_path / "errors"
    errors.write_text(text)
    assert bool(sharder.said(status, (0, 1, 130, 143, -SIGINT), errors)) is not right


def test_a_machine_without_disks_to_mount_limits_files_instead(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sharder, "can_mount", lambda: False)
    ways = [sharder.draw_trial(0, number).way for number in range(len(sharder.WAYS))]
    assert ways == ["file limit" if way == "full disk" else way for way in sharder.WAYS]
    assert set(ways) == set(sharder.DISTURB) == set(sharder.RIGHT)


def test_a_refused_case_that_writes_to_its_working_folder_is_told(tmp_path: Path) -> None:
    def call(argv: list[str], place: Path) -> Ended:
        (place / argv[1]).write_text("x")
        return Ended(2, "", "error: x")

    def build(draw: Random, folder: Path) -> Case:
        folder.mkdir()
        return Case(["--output", "../../lost.txt"])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.chaos.shard_cases.build", build)
        done = judge(Name("data_prep/shard.py", 0), 0, tmp_path, call)
    assert done.failure is not None and "lost.txt" in done.failure


def test_the_folder_of_the_program_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    place = new_place(Path("a/b"))
    assert place.is_dir() and place.is_absolute() and place.parent == tmp_path / "a/b"


def test_the_report_goes_on_where_it_was(tmp_path: Path) -> None:
    path = tmp_path / "chaos.json"
    outcome = Outcome("kills", 1200, 1200, [], {"runs": 12, "targets": "rank 3"})
    add(path, read_report(path), "kills", 3, 61.2, outcome)
    report = read_report(path)
    assert is_done(report, "kills", 3, 1200)
    older = {**report["kills"]["machine"], "commit": "0" * 40}
    assert not is_done({"kills": report["kills"] | {"machine": older}}, "kills", 3, 1200)
    assert not is_done({"kills": report["kills"] | {"failures": ["x"]}}, "kills", 3, 1200)
    assert not is_done(report, "kills", 4, 1200) and not is_done(report, "flips", 3, 1200)
    commit = report["kills"]["machine"]["commit"][:10]
    row = f"| kills | 3 | 1,200 | 1,200 | 61 | {commit} | runs: 12; targets: rank 3 |"
    assert table(report, ["kills"]).splitlines()[2] == row
    assert path.with_suffix(".md").read_text().splitlines()[2] == row
    assert shares(["a", "b", "a"]) == "a 2, b 1"
