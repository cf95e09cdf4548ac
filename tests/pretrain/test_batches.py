"""Which rows a rank sees: permutations, slices, validation shares, loader workers."""

import copy
import hashlib
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_prep.shard_format import (
    FORMAT_VERSION,
    Manifest,
    ShardFile,
    ShardReader,
    SplitSize,
    shard_image,
    write_manifest,
)
from pretrain.batches import (
    NO_LABEL,
    VALIDATION_EPOCH,
    Batch,
    Slices,
    TrainingBatches,
    make_batch,
    training_batches,
    validation_batches,
)
from pretrain.order import Order
from tests.pretrain.tiny import SPECIAL, VOCAB, ragged_batch, ragged_ids, tiny_masking

LENGTH, ROWS = 8, {"train": [13, 10], "validation": [11]}
"""Rows of every shard; the row's number stands in it, as two tokens behind the first."""


def numbered_rows(first: int, count: int) -> np.ndarray:
    """Rows that begin with a special token and their own number in base 50, with ragged ends."""
    ids = ragged_ids([LENGTH - number % 4 for number in range(count)], LENGTH, 0, seed=first)
    numbers = np.arange(first, first + count)
    ids[:, 0], ids[:, 1], ids[:, 2] = 2, SPECIAL + numbers // 50, SPECIAL + numbers % 50
    return ids


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    files, sizes = [], {}
    for split, counts in ROWS.items():
        start = 0
        for number, count in enumerate(counts):
            image = shard_image(numbered_rows(start, count).astype("<u2"))
            name = f"{split}-{number:05d}-of-{len(counts):05d}.h5"
            (folder / name).write_bytes(image)
            files.append(ShardFile(name, split, count, hashlib.sha256(image).hexdigest()))
            start += count
        sizes[split] = SplitSize(start, start * LENGTH, 0)
    special = {"pad": 0, "cls": 2, "sep": 3, "mask": 4}
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        seq_length=LENGTH,
        seed=0,
        vocab_size=VOCAB,
        tokenizer_fingerprint="",
        special_ids=special,
        documents=2,
        splits=sizes,
        files=files,
        tokenizer_files=[],
        sources=[],
        packing="",
        validation_fraction=0.5,
        rows_per_shard=13,
        skipped_texts=0,
    )
    write_manifest(folder, manifest)
    return folder


def original_ids(batch: Batch) -> torch.Tensor:
    """The rows before masking, put together again from the labels."""
    ids, used = batch.input_ids.flatten().clone(), batch.counts["masked"]
    ids[batch.masked[:used]] = batch.labels[:used]
    return ids.view_as(batch.input_ids)


def row_numbers(batch: Batch) -> list[int]:
    ids = original_ids(batch)
    return ((ids[:, 1] - SPECIAL) * 50 + ids[:, 2] - SPECIAL).tolist()


@pytest.mark.parametrize("step", [0, 1, 7])
@pytest.mark.parametrize(
    ("world", "accumulation", "micro"),
    [(1, 1, 12), (1, 3, 4), (2, 1, 6), (2, 3, 2), (3, 2, 2), (4, 3, 1), (12, 1, 1), (1, 12, 1)],
)
def test_ranks_together_take_the_rows_of_the_step(
    world: int, accumulation: int, micro: int, step: int
) -> None:
    taken: list[int] = []
    for rank in range(world):
        slices = Slices(micro, accumulation, rank, world)
        assert slices.global_batch == 12
        for micro_step in range(step * accumulation, (step + 1) * accumulation):
            taken += slices.samples(micro_step).tolist()
    assert sorted(taken) == list(range(12 * step, 12 * step + 12))


def batches_of(shards: Path, slices: Slices, seed: int = 5) -> TrainingBatches:
    return TrainingBatches(ShardReader(shards, "train"), tiny_masking(seed=seed), 0, slices, seed)


def first_steps(batches: TrainingBatches, step: int, count: int, workers: int) -> list[Batch]:
    loader: Iterator[Batch] = training_batches(batches, step, workers, pin=False)
    return list(islice(loader, count))


def same(one: Batch, two: Batch) -> bool:
    tensors = all(
        torch.equal(getattr(one, name), getattr(two, name))
        for name in ("input_ids", "valid", "masked", "labels", "positions")
    )
    return tensors and one.full == two.full and one.counts == two.counts


def test_batches_hold_the_rows_of_the_order(shards: Path) -> None:
    """23 rows in steps of 4: over six epochs every row comes six times, in that order."""
    batches = batches_of(shards, Slices(4, 1, 0, 1))
    steps = range(23 * 6 // 4 + 1)
    seen = [number for step in steps for number in row_numbers(batches[step][0])]
    _, order = Order(23, seed=5)(np.arange(len(seen)))
    assert seen == order.tolist()
    assert set(np.bincount(seen[: 23 * 6])) == {6}


def test_masks_belong_to_epoch_and_row_whatever_the_cut(shards: Path) -> None:
    whole = batches_of(shards, Slices(12, 1, 0, 1))[3][0]
    cut = [batches_of(shards, Slices(2, 3, rank, 2)) for rank in (0, 1)]
    parts = [rank[9 + k][0] for k in range(3) for rank in cut]
    assert torch.equal(torch.cat([part.input_ids for part in parts]), whole.input_ids)
    labels = torch.cat([part.labels for part in parts])
    assert torch.equal(labels[labels != NO_LABEL], whole.labels[: whole.counts["masked"]])


@pytest.mark.parametrize("first_step", [0, 3])
def test_loader_workers_never_change_the_batches(shards: Path, first_step: int) -> None:
    batches = batches_of(shards, Slices(4, 2, 1, 2))
    alone = first_steps(batches, first_step, 6, workers=0)
    assert same(alone[0], batches[2 * first_step][0])
    helped = first_steps(batches, first_step, 6, workers=2)
    assert all(same(one, two) for one, two in zip(alone, helped, strict=True))
    assert not same(alone[0], alone[1])


def test_groups_never_change_the_batches(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of one micro-batch, of three, and of more than an epoch."""
    taken = []
    for rows in (1, 12, 1024):
        monkeypatch.setattr("pretrain.batches.GROUP_ROWS", rows)
        batches = batches_of(shards, Slices(4, 2, 1, 2))
        assert len(batches[0]) == batches.group == max(1, rows // 4)
        taken.append([first_steps(batches, step, 7, workers=0) for step in (0, 3)])
    for other in taken[1:]:
        for found, expected in zip(other, taken[0], strict=True):
            assert all(same(one, two) for one, two in zip(found, expected, strict=True))


def test_workers_hold_no_more_than_their_groups(
    shards: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Two workers that nobody takes from make 2 groups each, and one for what was taken."""
    made = tmp_path / "made"
    read = ShardReader.read

    def noted(self: ShardReader, rows: np.ndarray) -> np.ndarray:
        with made.open("a") as file:
            file.write(".")
        return read(self, rows)

    monkeypatch.setattr(ShardReader, "read", noted)
    loader = training_batches(batches_of(shards, Slices(512, 1, 0, 1)), 0, 2, pin=False)
    next(loader)
    time.sleep(0.5)
    assert 1 <= len(made.read_text()) <= 5


@pytest.mark.parametrize("limit", [None, 1, 5, 11, 99])
@pytest.mark.parametrize("world", [1, 2, 3, 5, 16])
@pytest.mark.parametrize("micro", [1, 2, 4, 16])
def test_validation_covers_every_row_once_in_file_order(
    shards: Path, world: int, micro: int, limit: int | None
) -> None:
    reader = ShardReader(shards, "validation")
    ranks = [
        list(validation_batches(reader, tiny_masking(), 0, Slices(micro, 1, rank, world), limit))
        for rank in range(world)
    ]
    assert len({len(batches) for batches in ranks}) == 1 and ranks[0]
    counted = [
        row_numbers(batch)
        for turn in zip(*ranks, strict=True)
        for batch, is_counted in turn
        if is_counted
    ]
    total = min(limit or 11, 11)
    assert [number for numbers in counted for number in numbers] == list(range(total))
    assert all(len(batch.input_ids) for batches in ranks for batch, _ in batches)


def test_validation_masks_never_change(shards: Path) -> None:
    reader = ShardReader(shards, "validation")
    masking = tiny_masking(seed=5)
    whole, _ = next(validation_batches(reader, masking, 0, Slices(11, 1, 0, 1), None))
    again = validation_batches(reader, masking, 0, Slices(3, 4, 0, 1), None)
    assert torch.equal(torch.cat([batch.input_ids for batch, _ in again]), whole.input_ids)
    rows = np.arange(11)
    trained = make_batch(original_ids(whole).numpy(), np.zeros_like(rows), rows, masking, 0)
    assert not torch.equal(trained.input_ids, whole.input_ids)
    assert VALIDATION_EPOCH > 2**31  # no training epoch


def test_counts_are_those_of_a_loop() -> None:
    batch = ragged_batch((5, 1, 3), length=6, probability=0.4)
    assert batch.counts["sequences"] == 3
    assert batch.counts["tokens"] == 9 == int(batch.valid.sum())
    assert batch.counts["pairs"] == 25 + 1 + 9
    assert batch.counts["masked"] == 2 + 1 + 1 == (batch.labels != NO_LABEL).sum()
    assert not batch.full and ragged_batch((4, 4)).full


def test_labels_are_the_original_tokens() -> None:
    ids = ragged_ids((9, 4, 7), 9, 0, seed=3)
    rows = np.arange(3)
    batch = make_batch(ids, np.zeros_like(rows), rows, tiny_masking(0.5), 0)
    assert np.array_equal(original_ids(batch).numpy(), ids)
    assert not np.array_equal(batch.input_ids.numpy(), ids)
    assert batch.valid.flatten()[batch.masked].all()


def test_slots_are_fixed_by_the_size_and_unused_ones_stand_at_the_end() -> None:
    """Rows of 8 at 30 %: 2 of 8 at most, whatever is in them; 3 rows have 6 slots."""
    for lengths in ((8, 8, 8), (8, 1, 3), (1, 1, 1)):
        batch = ragged_batch(lengths, length=8)
        used = batch.counts["masked"]
        assert len(batch.masked) == len(batch.labels) == 6 >= used
        assert (batch.labels[:used] >= SPECIAL).all()
        assert (batch.labels[used:] == NO_LABEL).all() and (batch.masked[used:] == 0).all()
    assert len(ragged_batch((8, 3), probability=0.0).masked) == 0


def test_positions_are_those_of_valid_tokens_and_left_out_of_full_rows() -> None:
    batch = ragged_batch((3, 1), length=4)
    assert batch.positions.tolist() == [0, 1, 2, 4]
    assert ragged_batch((4, 4)).positions.tolist() == []


def test_moving_a_batch_keeps_what_is_in_it() -> None:
    batch = ragged_batch((5, 2))
    assert same(batch.to(torch.device("cpu")), batch)


@pytest.mark.parametrize("copies", [1, 2, 3])
def test_copies_of_a_row_are_the_first_epochs_masks_again_and_again(
    shards: Path, copies: int
) -> None:
    """The order stays that of a run without copies; epoch e has the masks of e modulo copies."""
    slices, steps = Slices(4, 1, 0, 1), range(23 * 5 // 4)
    plain = batches_of(shards, slices)
    reader, masking = plain.reader, plain.masking
    counted = TrainingBatches(reader, masking, 0, slices, 5, copies)
    differing = 0
    for step in steps:
        found, before = counted[step][0], plain[step][0]
        assert found.rows is not None and found.epochs is not None and before.epochs is not None
        assert found.rows.tolist() == row_numbers(found) == row_numbers(before)
        assert found.epochs.tolist() == (before.epochs % copies).tolist()
        ids = original_ids(before).numpy()
        assert same(found, make_batch(ids, before.epochs % copies, found.rows, masking, 0))
        differing += not same(found, before)
    assert differing > (5 - copies) * 23 // 4 / 2


class Stored:
    """What is stored of a row: its number, and the copy."""

    def __init__(self, row_bytes: int) -> None:
        self.row_bytes = row_bytes

    def attach(self, batch: Batch) -> Batch:
        assert batch.rows is not None and batch.epochs is not None
        fields = {
            "number": torch.from_numpy(batch.rows * 10 + batch.epochs),
            "bits": torch.from_numpy(batch.rows[:, None].astype(np.uint8)),
        }
        kept = {"kept_tokens": len(batch.rows)}
        return replace(batch, knowledge=fields, counts={**batch.counts, **kept})


def with_knowledge(shards: Path, row_bytes: int = 8) -> TrainingBatches:
    plain, slices = batches_of(shards, Slices(4, 1, 0, 1)), Slices(4, 1, 0, 1)
    stored: Any = Stored(row_bytes)
    return TrainingBatches(plain.reader, plain.masking, 0, slices, 5, 2, stored)


@pytest.mark.parametrize("workers", [0, 2])
def test_knowledge_comes_with_its_rows_through_any_workers(shards: Path, workers: int) -> None:
    found = first_steps(with_knowledge(shards), 3, 20, workers)
    seen = set()
    for batch in found:
        assert batch.knowledge is not None and batch.epochs is not None
        numbers = batch.knowledge["number"].tolist()
        assert [number // 10 for number in numbers] == row_numbers(batch)
        assert [number % 10 for number in numbers] == batch.epochs.tolist()
        assert batch.knowledge["bits"].dtype == torch.uint8
        assert batch.counts["kept_tokens"] == 4
        seen |= set(batch.epochs.tolist())
    assert seen == {0, 1}


def test_a_group_holds_no_more_knowledge_than_fits(
    shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of 10 bytes, 125 bytes at once: 12 rows, 3 micro-batches of 4."""
    monkeypatch.setattr("pretrain.batches.GROUP_BYTES", 125)
    assert with_knowledge(shards, 10).group == 3
    assert with_knowledge(shards, 10**6).group == 1


def test_a_pickled_batch_keeps_its_knowledge_rows_and_epochs(shards: Path) -> None:
    batch = with_knowledge(shards)[7][0]
    for moved in (copy.copy(batch), batch.to(torch.device("cpu"))):
        assert same(moved, batch)
        assert np.array_equal(moved.rows, batch.rows)
        assert np.array_equal(moved.epochs, batch.epochs)
        assert batch.knowledge is not None and moved.knowledge.keys() == batch.knowledge.keys()
        assert all(torch.equal(moved.knowledge[n], v) for n, v in batch.knowledge.items())
    alone = copy.copy(ragged_batch((5, 2)))
    assert alone.knowledge is None and same(alone, ragged_batch((5, 2)))
