"""A run that was killed, preempted and given other ranks is the run to which nothing happened.

The short form of kills, preemptions, changed worlds and flips, and what else a resumed run is:
four starts of seven ranks do all of it. `python -m tests.chaos` strikes at many more moments.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.chaos import kills, preemptions
from tests.chaos.chains import Struck, resumed_wrong, strike
from tests.chaos.flips import copy_checkpoint, flip_checkpoint
from tests.chaos.runs import (
    SAVE_EVERY,
    VALIDATE_EVERY,
    WEIGHTS,
    Result,
    Seen,
    Setup,
    arguments,
    start,
    start_several,
)
from tests.chaos.shard_flips import flip_shards
from tests.chaos.starts import Started
from tests.chaos.worlds import COMPARED, Tally, Walk
from tests.launch import START_LIMIT, Materials, metrics
from tests.launch import materials_fixture as materials_fixture

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

LAUNCHED, BARE, ALONE = Setup(2, 1), Setup(2, 1, launcher=False), Setup(1, 0, launcher=False)
CUTS = ((1, 0), (2, 3))  # ranks and stage of ZeRO
STEPS = 65  # five whole parts, for markers; a multiple of SAVE_EVERY, none of VALIDATE_EVERY
KEPT = (STEPS - SAVE_EVERY, STEPS)
FLIPS = 30  # of a checkpoint, and of shards
KILL = replace(kills.draw(0, 0, LAUNCHED), steps=2 * SAVE_EVERY + 1)
"""All processes, while a checkpoint is written, when one before it is whole."""
INTERRUPT = replace(preemptions.draw(0, 0, BARE), steps=1)  # one rank, while a student is exported


@dataclass(frozen=True)
class Story:
    """What happened, in a folder with the runs `unbroken`, `struck` and `from-path`.

    Attributes:
        kill, interrupt: the blows to `struck`. walk: a run that went on on other ranks.
        stopped: what went wrong when its first leg was stopped. last: the start that ended all.
    """

    folder: Path
    kill: Struck
    interrupt: Struck
    walk: Walk
    stopped: Sequence[str]
    last: Started

    def run(self, name: str) -> Path:
        """The folder of a run."""
        return self.folder / name / "run"


@pytest.fixture(scope="module")
def story(materials: Materials) -> Story:
    """Kill, interrupt and end one run; stop another on one rank, and end it on two."""
    root = materials.folder.parent / "story"
    walk = Walk(CUTS, root / "walk", root, Tally())
    own: dict[str, Any] = {"max_steps": STEPS, "finetune_markers": "0.2,0.4,0.6,0.8"}

    def words(name: str, **more: Any) -> list[str]:
        place = root / name
        place.mkdir(parents=True, exist_ok=True)
        return arguments(BARE, materials, place / "run", **own, **more)

    run, before = root / "struck" / "run", Seen(None, 0, ())
    both = [words("unbroken"), words("struck")]
    started = start_several(LAUNCHED, materials, both, root / "killed.log")
    kill = struck(started, run, KILL, before, kills.LIMIT)
    leave_half_a_checkpoint(run)

    both = [walk.words(CUTS[0], name) for name in ("unchanged", "changed")]
    leg = start_several(ALONE, materials, both, root / "leg.log")
    stopped = walk.stop(leg, Seen(None, 0, ()))

    before = Seen.of(run)
    started = start(BARE, materials, run, "interrupted", **own)
    interrupt = struck(started, run, INTERRUPT, before, preemptions.LIMIT)

    path = root / "unbroken" / "run" / "checkpoints" / f"step-{KEPT[0]:08d}"
    last = [words("struck"), words("struck"), words("from-path", resume=path)]
    last.append(walk.words(CUTS[1], "changed"))
    ended = start_several(BARE, materials, last, root / "last.log")
    try:
        ended.wait_ended(START_LIMIT)
        assert ended.statuses() == [0, 0], ended.tail(5000)
    finally:
        ended.end()
    return Story(root, kill, interrupt, walk, stopped, ended)


def struck(started: Started, run: Path, blow: Any, before: Seen, limit: float) -> Struck:
    """A blow that fell."""
    try:
        fell = strike(started, run, blow, before, limit)
        assert fell is not None, f"the run ended before: {blow}: {started.tail(5000)}"
        return fell
    finally:
        started.end()


def leave_half_a_checkpoint(run: Path) -> None:
    """What a run that is killed while it saves leaves: files without the mark, and a torn line."""
    whole = min(run.glob("checkpoints/step-*/checkpoint.json")).parent
    half = whole.with_name(f"step-{STEPS - 1:08d}")
    shutil.copytree(whole, half)
    (half / "checkpoint.json").unlink()
    (half / "weights.safetensors").write_bytes(b"torn")
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "step": 9')


def numbers(run: Path, kind: str, *names: str) -> list[tuple[Any, ...]]:
    return [tuple(line[name] for name in ("step", *names)) for line in metrics(run, kind)]


# --- killed, preempted, and gone on


def test_a_kill_of_all_takes_no_checkpoint(story: Story) -> None:
    assert not kills.judge(story.kill, LAUNCHED)
    assert SAVE_EVERY <= story.kill.after.step < STEPS, "it was killed on its way"


def test_an_interrupted_rank_and_the_others_leave_together_with_a_checkpoint(story: Story) -> None:
    assert not preemptions.judge(story.interrupt, BARE)
    assert story.interrupt.statuses == [130, 130]


def test_each_start_goes_on_from_the_newest_whole_checkpoint(story: Story) -> None:
    ended = Seen.of(story.run("struck"))
    assert not resumed_wrong(story.interrupt.before, story.interrupt.after)
    assert not resumed_wrong(story.interrupt.after, ended)
    killed, interrupted = ended.resumes
    assert 0 < killed < interrupted < STEPS - 1, "the half-written checkpoint was not taken"


def test_in_the_end_a_struck_run_is_bitwise_the_unbroken_one(story: Story) -> None:
    """Losses, gradient norms, held-out losses, and the weights of the student at every marker."""
    unbroken = Result.of(story.run("unbroken"))
    assert not Result.of(story.run("struck")).differences(unbroken)
    assert len(unbroken.weights) == 5


@pytest.mark.parametrize("kind", ["train", "validation"])
def test_a_resumed_run_measures_bitwise_what_the_unbroken_one_does(story: Story, kind: str) -> None:
    names = ("loss", "terms", *(("lr", "grad_norm", "tokens", "flops") if kind == "train" else ()))
    resumed, unbroken = (numbers(story.run(run), kind, *names) for run in ("struck", "unbroken"))
    assert resumed == unbroken
    assert len({line[1] for line in unbroken}) == len(unbroken), "losses that do not change"


def test_each_step_stands_in_the_metrics_once(story: Story) -> None:
    regular = [*range(SAVE_EVERY, STEPS + 1, SAVE_EVERY)]
    for run in ("struck", "unbroken"):
        assert [step for (step,) in numbers(story.run(run), "train")] == [*range(1, STEPS + 1)]
        validated = [step for (step,) in numbers(story.run(run), "validation")]
        assert validated == [*range(0, STEPS + 1, VALIDATE_EVERY), STEPS]
        events = metrics(story.run(run), "event")
        saved = [line["step"] for line in events if line["event"] == "checkpoint"]
        expected = regular
        if run == "struck":  # maybe between a checkpoint and its line
            interrupted = story.interrupt.after.step
            expected = [step for step in sorted({*regular, interrupted}) if step in saved]
        assert saved == expected


def test_only_the_newest_checkpoints_stay(story: Story) -> None:
    for run in ("struck", "unbroken"):
        whole = sorted((story.run(run) / "checkpoints").glob("step-*/checkpoint.json"))
        assert [mark.parent.name for mark in whole] == [f"step-{step:08d}" for step in KEPT]
        assert json.loads(whole[-1].read_text())["world_size"] == 2


def test_a_finished_run_started_again_says_so_and_trains_nothing(story: Story) -> None:
    assert story.last.log.read_text().count("finished already") == 1


def test_a_run_goes_on_from_the_checkpoint_that_it_is_given(story: Story) -> None:
    names = ("loss", "lr", "grad_norm")
    ours, theirs = (numbers(story.run(run), "train", *names) for run in ("from-path", "unbroken"))
    assert ours == theirs[KEPT[0] :]
    ours, theirs = (
        load_file(story.run(run) / "student" / WEIGHTS) for run in ("from-path", "unbroken")
    )
    assert all(weight.equal(ours[name]) for name, weight in theirs.items())


# --- other worlds, and changed bytes


def test_a_run_goes_on_on_other_ranks_and_under_another_stage_with_the_same_losses(
    story: Story,
) -> None:
    assert not story.stopped
    assert not story.walk.compare()
    assert (story.walk.tally.passed, len(story.walk.tally.differences)) == (1, COMPARED)


def test_every_changed_byte_of_a_checkpoint_is_noticed(story: Story, tmp_path: Path) -> None:
    failures, flipped = flip_checkpoint(0, FLIPS, copy_checkpoint(story.run("unbroken"), tmp_path))
    assert not failures and len(flipped) == FLIPS and len(set(flipped)) > 2


def test_every_changed_byte_of_shards_is_noticed(tmp_path: Path) -> None:
    assert not flip_shards(0, FLIPS, tmp_path)
