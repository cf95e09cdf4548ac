"""`benchmarks/step.py` and `memory.py`: fair, right in small, and what they refuse."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import common
import memory
import numpy as np
import pytest
import step
import torch
from bare_step import BareStep, Learning, MasterWeights, Pair, random_batch, shard_batch
from cases import TINY, Case, Rival, agree
from naive import LOSSES, NaiveStep
from torch import nn

from data_prep.shard_format import TRAIN, ShardReader
from potstill.errors import InputError, PotstillError
from pretrain.config import ScheduleConfig
from tests.launch import LENGTH, VOCABULARY, Materials
from tests.launch import materials_fixture as materials_fixture

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """The programs set the number of threads of their process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("positions", ["masked", "all"])
@pytest.mark.parametrize("objective", LOSSES)
def test_the_naive_step_learns_what_ours_learns(objective: str, positions: str) -> None:
    case = Case(TINY, objective, flags={"kd_positions": positions})
    assert agree(case, Rival("naive", NaiveStep), 16, CPU) < 1e-5


def test_the_naive_loss_is_ours() -> None:
    batch = random_batch(TINY.vocab, 3, 16)
    for objective in LOSSES:
        learning = Learning(TINY, objective, dropout=0.0)
        ours = BareStep(learning, "fp32", 3, 16).loss(batch)
        naive = NaiveStep(learning, False, CPU).loss(batch)
        torch.testing.assert_close(ours, naive, rtol=1e-5, atol=1e-7)


def test_a_rival_that_learns_something_else_is_refused() -> None:
    class Half(NaiveStep):
        def loss(self, batch: object) -> torch.Tensor:
            return super().loss(batch) / 2  # type: ignore[arg-type]

    with pytest.raises(PotstillError, match=r"half learns something else under att-mse .* 0\.5"):
        agree(Case(TINY, "att-mse"), Rival("half", Half), 16, CPU)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_steps_of_ours_lower_the_loss(precision: str) -> None:
    batch = random_batch(TINY.vocab, 2, 16)
    bare = BareStep(Learning(TINY, "hid-seq", dropout=0.0), precision, 2, 16)  # type: ignore[arg-type]
    losses = [float(bare.step(batch)) for _ in range(5)]
    assert losses[-1] < 0.95 * losses[0]


def test_a_step_of_micro_batches_has_the_loss_and_gradient_of_the_whole_batch() -> None:
    parts = [random_batch(TINY.vocab, 2, 16, seed) for seed in (0, 1)]
    learning = Learning(TINY, "att-mse", dropout=0.0)
    whole = BareStep(learning, "fp32", 4, 16)
    cut = BareStep(learning, "fp32", 2, 16)
    loss = torch.stack([whole.loss(part, whole.scale(*parts)) for part in parts]).sum()
    loss.backward()
    torch.testing.assert_close(cut.step(*parts), loss.detach())
    whole.optimizer.step()
    for ours, other in zip(cut.student.parameters(), whole.student.parameters(), strict=True):
        torch.testing.assert_close(ours, other)


def test_half_precision_weights_follow_float32_copies() -> None:
    torch.manual_seed(0)
    layer, reference = nn.Linear(3, 2).bfloat16(), nn.Linear(3, 2)
    reference.load_state_dict(layer.state_dict())
    settings = ScheduleConfig(max_steps=1, lr=1e-4)
    masters = MasterWeights([{"params": list(layer.parameters()), "weight_decay": 0.1}], settings)
    optimizer = torch.optim.AdamW(
        reference.parameters(), 1e-4, (settings.adam_beta1, settings.adam_beta2), 1e-6, 0.1
    )
    for _ in range(20):  # steps that bfloat16 alone would round away
        for weight, other in zip(layer.parameters(), reference.parameters(), strict=True):
            weight.grad = torch.randn_like(weight)
            other.grad = weight.grad.float()
        masters.step()
        masters.zero_grad()
        optimizer.step()
    for weight, master, other in zip(
        layer.parameters(), masters.masters, reference.parameters(), strict=True
    ):
        torch.testing.assert_close(master, other)
        assert torch.equal(weight, other.bfloat16())


def test_each_turn_begins_with_another_step() -> None:
    seen: list[str] = []
    steps = {n: SimpleNamespace(student=None, step=lambda b, n=n: seen.append(n)) for n in "abc"}
    batch = random_batch(TINY.vocab, 1, 8)
    turns = [step.take_turn(steps, turn, batch, CPU) for turn in range(4)]  # type: ignore[arg-type]
    assert "".join(seen) == "abcbcacababc"
    assert all(sorted(turn) == ["a", "b", "c"] for turn in turns)


def test_quartiles_lie_within_the_values() -> None:
    assert common.quartiles([3.0, 1.0]) == {"median": 2.0, "low": 1.5, "high": 2.5}
    numbers = [5.0, 1.0, 4.0, 2.0, 3.0]
    low, median, high = np.percentile(numbers, [25, 50, 75])  # interpolates as `inclusive` does
    found = common.quartiles(numbers, unit=1e3)
    assert found == {"median": 1e3 * median, "low": 1e3 * low, "high": 1e3 * high}


def test_the_step_program_writes_figures_table_and_chart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures, chart = tmp_path / "step.json", tmp_path / "step.svg"
    words = ["step.py", "--tiny", "--turns", "2", "--only", "att-mse"]
    monkeypatch.setattr(sys, "argv", [*words, "--json", str(figures), "--chart", str(chart)])
    step.main()
    report = json.loads(figures.read_text())
    (row,) = report["rows"]
    assert list(row["steps"]) == ["naive fp32", "naive autocast", "ours fp32", "ours bf16"]
    naive, ours = row["steps"]["naive fp32"], row["steps"]["ours bf16"]
    assert set(naive["times"]) == {"ours fp32", "ours bf16"} > set(ours["times"])
    peak = max(report["gemm"]["bf16"].values())
    assert ours["share_of_peak"] == pytest.approx(
        row["flops_per_token"] * ours["tokens_per_second"] / peak
    )
    assert ours["tokens_per_second"] == pytest.approx(2 * 16 / ours["ms"]["median"] * 1e3)
    assert figures.with_suffix(".md").read_text().count("att-mse 2x48-1x48") == 4
    assert "<svg" in chart.read_text()


def test_the_memory_program_finds_less_for_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = tmp_path / "memory.json"
    words = ["memory.py", "--tiny", "--only", "att-mse", "--json", str(figures)]
    monkeypatch.setattr(sys, "argv", words)
    memory.main()
    (row,) = json.loads(figures.read_text())["rows"]
    assert row["bytes"]["ours fp32"] < 0.5 * row["bytes"]["naive fp32"]
    assert row["bytes"]["ours bf16"] < 0.5 * row["bytes"]["naive autocast"]
    head, _, line = figures.with_suffix(".md").read_text().splitlines()
    assert "| ours bf16, checkpointing |" in head and head.count("|") == line.count("|")


def test_checkpointing_keeps_less_of_a_deep_student() -> None:
    learning = Learning(Pair((4, 48), (4, 48), heads=4, vocab=211), "hid-seq")
    batch = random_batch(211, 4, 64)
    plain, lean = (
        memory.needed(BareStep(learning, "bf16", 4, 64, checkpointing=on), batch, batch, CPU)
        for on in (False, True)
    )
    assert lean < 0.6 * plain


def test_peak_bytes_counts_what_lives_at_one_time() -> None:
    start = torch.randn(1000, 1000)

    def act() -> None:
        first = start + 1
        second = first * 2
        del first
        second.exp_()

    assert memory.peak_bytes(act, CPU) == pytest.approx(2 * start.nbytes, rel=1e-3)


def test_gradients_and_optimiser_state_do_not_count_as_memory_of_a_step() -> None:
    """A bias has activations of no size beside its own: only one temporary gradient is left."""
    bias = nn.Parameter(torch.zeros(1_000_000))
    optimizer = torch.optim.AdamW([bias], fused=True)

    def step_() -> torch.Tensor:
        loss = bias.sum()
        loss.backward()
        optimizer.step()
        return loss.detach()

    fake = SimpleNamespace(student=None, step=lambda batch: step_(), loss=lambda batch: bias.sum())
    batch = random_batch(TINY.vocab, 1, 8)
    assert memory.needed(fake, batch, batch, CPU) < 1.1 * bias.nbytes


def test_random_rows_are_full_and_masked_as_in_training() -> None:
    batch = random_batch(30522, 4, 128)
    assert batch.full and batch.counts["tokens"] == 4 * 128
    assert batch.counts["masked"] == 4 * round(0.15 * 128)


def test_rows_from_shards_are_those_without_padding(materials: Materials) -> None:
    batch = shard_batch(materials.ragged, 3, LENGTH, VOCABULARY)
    assert batch.full and batch.input_ids.shape == (3, LENGTH)
    rows = ShardReader(materials.ragged, TRAIN).read(np.arange(100))
    full = rows[(rows != 0).all(axis=1)][:3]
    unmasked = np.delete(full.ravel(), batch.masked)
    np.testing.assert_array_equal(
        np.delete(batch.input_ids.numpy().ravel(), batch.masked), unmasked
    )


def test_shards_that_do_not_fit_are_refused(materials: Materials) -> None:
    with pytest.raises(InputError, match="rows of 32 tokens from 400, but 128 from 400"):
        shard_batch(materials.shards, 2, 128, VOCABULARY)
    with pytest.raises(InputError, match="rows without padding among the first .* --batch is 9999"):
        shard_batch(materials.ragged, 9999, LENGTH, VOCABULARY)


@pytest.mark.parametrize(
    ("program", "words", "message"),
    [
        (step, ["--only", "nothing"], "--only 'nothing' is in no case's name"),
        (step, ["--turns", "1"], "--turns 1 has no spread"),
        (step, ["--minilmv2", "nowhere"], "--minilmv2 nowhere: minilmv2/minilmv2.py is not there"),
        (memory, ["--distilbert", "nowhere"], "--distilbert nowhere: distiller.py is not there"),
        (step, ["--tiny", "--only", "12x768"], "--only '12x768' is in no case's name"),
    ],
)
def test_bad_flags_are_one_line(
    program: object,
    words: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["program", *words])
    with pytest.raises(SystemExit) as stopped:
        program.main()  # type: ignore[attr-defined]
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_a_pair_is_read_and_a_mistake_is_named() -> None:
    assert Pair.parse("12x768-6x384") == Pair((12, 768), (6, 384))
    assert str(Pair((12, 768), (6, 384))) == "12x768-6x384"
    with pytest.raises(InputError, match="pair '12x768' is not TEACHER-STUDENT"):
        Pair.parse("12x768")
