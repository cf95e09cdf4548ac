"""The loss does not depend on how a step's batch is cut: ranks, micro-batches, ZeRO stages.

All runs see the same global batch of 8 ragged rows for 20 steps; one start does them all.
"""

from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.launch import Materials, flags, losses, metrics, runs, write_ds_config
from tests.launch import materials_fixture as materials_fixture

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

STEPS = 20
# The memory of hid-cls-contrast holds the same vectors on any number of ranks, in another order.
OBJECTIVES = ("att-mse", "mlm", "0.5*kd+mlm+att-mse+hid-cls+hid-cls-contrast")
SUM = OBJECTIVES[-1]
BF16 = {"bf16": {"enabled": True}, "communication_data_type": "fp32"}
FP32_SUMS = {"data_types": {"grad_accum_dtype": "fp32"}}


def zero(stage: int) -> dict[str, object]:
    """The section of a ZeRO stage; buckets no larger than these models need."""
    bucket = {"reduce_bucket_size": 100_000, "allgather_bucket_size": 100_000}
    return {"zero_optimization": {"stage": stage, **(bucket if stage else {})}}


@pytest.fixture(scope="module")
def folder(materials: Materials) -> Path:
    """The folder of all runs, named RANKSxACCUMULATION-WHAT."""
    root = materials.folder / "cuts"
    root.mkdir()

    def run(
        name: str,
        micro: int,
        accumulation: int,
        objective: str,
        acceleration: Mapping[str, object] | None = None,
        **sections: object,
    ) -> list[str]:
        config = write_ds_config(root / f"{name}.json", micro, accumulation, **sections)
        return flags(
            **(acceleration or {}),
            ds_config=config,
            data=materials.ragged,
            teacher=None if objective == "mlm" else materials.teacher,
            student_layers=2,
            student_hidden=32 if objective == "mlm" else None,
            student_heads=4 if objective == "mlm" else None,
            objective=objective,
            dropout=0,
            max_steps=STEPS,
            lr=3e-3,
            log_every=1,
            output=root / name,
        )

    one, two = [], []
    for number, objective in enumerate(OBJECTIVES):
        one.append(run(f"1x1-{number}", 8, 1, objective))
        one.append(run(f"1x2-{number}", 4, 2, objective))
        two.append(run(f"2x1-{number}", 4, 1, objective))
    for stage in (1, 2, 3):
        two.append(run(f"2x2-zero{stage}", 2, 2, SUM, **zero(stage)))
    two.append(run("2x1-checkpointing", 4, 1, SUM, {"gradient_checkpointing": True}))
    one.append(run("1x1-compiled", 8, 1, "att-mse", {"compile": "on"}))
    one.append(run("1x1-bf16", 8, 1, "att-mse", **BF16, **zero(1), **FP32_SUMS))
    one.append(run("1x4-bf16", 2, 4, "att-mse", **BF16, **zero(1), **FP32_SUMS))
    two.append(run("2x2-bf16", 2, 2, "att-mse", **BF16, **zero(1), **FP32_SUMS))
    for done in runs(materials, "cuts", (0, one), (2, two)):
        assert set(done.statuses) == {0}, done.output[-3000:] + done.errors[-5000:]
    return root


def test_gradient_checkpointing_changes_no_bit(folder: Path) -> None:
    number = OBJECTIVES.index(SUM)
    assert losses(folder / "2x1-checkpointing") == losses(folder / f"2x1-{number}")


def test_a_compiled_run_learns_the_same(folder: Path) -> None:
    assert losses(folder / "1x1-compiled") == pytest.approx(losses(folder / "1x1-0"), rel=1e-4)


@pytest.mark.parametrize("number", range(len(OBJECTIVES)), ids=OBJECTIVES)
@pytest.mark.parametrize("cut", ["1x2", "2x1"])
def test_losses_do_not_depend_on_ranks_and_accumulation(
    folder: Path, cut: str, number: int
) -> None:
    whole, pieces = losses(folder / f"1x1-{number}"), losses(folder / f"{cut}-{number}")
    assert len(whole) == STEPS
    assert pieces == pytest.approx(whole, rel=1e-5)
    assert whole[-1] != pytest.approx(whole[0], rel=1e-2), "the run learned nothing to compare"


@pytest.mark.parametrize("number", range(len(OBJECTIVES)), ids=OBJECTIVES)
def test_held_out_loss_and_gradient_norm_do_not_depend_on_the_cut(
    folder: Path, number: int
) -> None:
    runs_ = [folder / f"{cut}-{number}" for cut in ("1x1", "1x2", "2x1")]
    held_out = [[line["loss"] for line in metrics(run, "validation")] for run in runs_]
    norms = [[line["grad_norm"] for line in metrics(run, "train")] for run in runs_]
    rows = {line["rows"] for run in runs_ for line in metrics(run, "validation")}
    assert len(rows) == 1
    assert len(held_out[0]) == 2
    for other in (1, 2):
        assert held_out[other] == pytest.approx(held_out[0], rel=1e-5)
        assert norms[other] == pytest.approx(norms[0], rel=1e-4)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_stages_agree_with_plain_training(folder: Path, stage: int) -> None:
    plain, run = folder / f"1x1-{OBJECTIVES.index(SUM)}", folder / f"2x2-zero{stage}"
    assert losses(run) == pytest.approx(losses(plain), rel=1e-5)
    norms = [line["grad_norm"] for line in metrics(run, "train")]
    assert norms == pytest.approx([line["grad_norm"] for line in metrics(plain, "train")], rel=1e-4)


@pytest.mark.parametrize("cut", ["1x4", "2x2"])
def test_no_micro_batch_is_lost_in_bf16(folder: Path, cut: str) -> None:
    """A lost micro-batch (DeepSpeed 0.18.6 to 0.18.10) changes the gradient's norm by a quarter."""
    whole, pieces = (metrics(folder / f"{name}-bf16", "train") for name in ("1x1", cut))
    for key, tolerance in (("loss", 2e-2), ("grad_norm", 5e-2)):
        ours, theirs = ([line[key] for line in lines] for lines in (pieces, whole))
        assert ours == pytest.approx(theirs, rel=tolerance), key
    assert whole[-1]["loss"] < 0.95 * whole[0]["loss"]


def test_every_run_says_how_far_it_went(folder: Path) -> None:
    """Tokens count every rank's rows, taken as full; steps stand in the file once."""
    for name in ("1x1-0", "1x2-0", "2x1-0", "2x2-zero3"):
        lines = metrics(folder / name, "train")
        assert [line["tokens"] for line in lines] == [8 * 32 * step for step in range(1, STEPS + 1)]


@pytest.mark.parametrize("name", ["2x1-0", "2x2-zero1", "2x2-zero2", "2x2-zero3"])
def test_what_ranks_send_is_told_apart_under_every_zero_stage(folder: Path, name: str) -> None:
    (summary,) = (line for line in metrics(folder / name, "event") if line["event"] == "summary")
    assert 0.02 < summary["shares"]["communication"] < 0.98, "models so small mostly talk"
    assert sum(summary["shares"].values()) == pytest.approx(1)
