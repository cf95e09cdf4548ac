"""Which rows a rank sees: permutations, slices, validation shares, loader workers."""

import hashlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

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
    VALIDATION_EPOCH,
    Batch,
    Slices,
    TrainingBatches,
    make_batch,
    shuffled,
    training_batches,
    validation_batches,
)
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
    ids = batch.input_ids.flatten().clone()
    ids[batch.masked] = batch.labels
    return ids.view_as(batch.input_ids)


def row_numbers(batch: Batch) -> list[int]:
    ids = original_ids(batch)
    return ((ids[:, 1] - SPECIAL) * 50 + ids[:, 2] - SPECIAL).tolist()


@settings(max_examples=25, deadline=None, derandomize=True)
@given(rows=st.integers(1, 1500), epoch=st.integers(0, 2**31), seed=st.integers(0, 2**63))
def test_every_epoch_is_a_permutation(rows: int, epoch: int, seed: int) -> None:
    epochs, order = shuffled(np.arange(rows, dtype=np.int64) + epoch * rows, rows, seed)
    assert (epochs == epoch).all()
    assert sorted(order.tolist()) == list(range(rows))


@pytest.mark.parametrize("rows", [*range(1, 18), 63, 64, 65, 255, 256, 257, 4096])
def test_sizes_around_powers_of_two_are_permuted(rows: int) -> None:
    _, order = shuffled(np.arange(3 * rows), rows, seed=1)
    for epoch in order.reshape(3, rows):
        assert sorted(epoch.tolist()) == list(range(rows))


def test_order_differs_between_epochs_and_seeds_and_looks_random() -> None:
    rows = 2000
    _, order = shuffled(np.arange(2 * rows), rows, seed=1)
    _, other = shuffled(np.arange(rows), rows, seed=2)
    first, second = order.reshape(2, rows)
    identity = np.arange(rows)
    for one, two in ((first, second), (first, other), (first, identity)):
        # Fixed points of a random permutation: 1 on average, Poisson.
        assert (one == two).sum() < 10
        assert abs(np.corrcoef(one, two)[0, 1]) < 5 / rows**0.5
    # Neighbours are as unrelated as any two rows.
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 5 / rows**0.5


def test_order_of_any_sample_needs_no_other() -> None:
    samples = np.array([5, 99, 100, 100_000_000_007])
    epochs, order = shuffled(samples, 100, seed=3)
    assert epochs.tolist() == [0, 0, 1, 1_000_000_000]
    for sample, epoch, row in zip(samples, epochs, order, strict=True):
        one_epoch, one_row = shuffled(np.array([sample]), 100, seed=3)
        assert (one_epoch[0], one_row[0]) == (epoch, row)


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
        for name in ("input_ids", "valid", "masked", "labels")
    )
    return tensors and one.full == two.full and one.counts == two.counts


def test_batches_hold_the_rows_of_the_order(shards: Path) -> None:
    """23 rows in steps of 4: over six epochs every row comes six times, in `shuffled`'s order."""
    batches = batches_of(shards, Slices(4, 1, 0, 1))
    seen = [number for step in range(23 * 6 // 4 + 1) for number in row_numbers(batches[step])]
    _, order = shuffled(np.arange(len(seen)), 23, seed=5)
    assert seen == order.tolist()
    assert set(np.bincount(seen[: 23 * 6])) == {6}


def test_masks_belong_to_epoch_and_row_whatever_the_cut(shards: Path) -> None:
    whole = batches_of(shards, Slices(12, 1, 0, 1))[3]
    parts = [batches_of(shards, Slices(2, 3, rank, 2))[9 + k] for k in range(3) for rank in (0, 1)]
    assert torch.equal(torch.cat([part.input_ids for part in parts]), whole.input_ids)
    assert torch.equal(torch.cat([part.labels for part in parts]), whole.labels)


@pytest.mark.parametrize("first_step", [0, 3])
def test_loader_workers_never_change_the_batches(shards: Path, first_step: int) -> None:
    batches = batches_of(shards, Slices(4, 2, 1, 2))
    alone = first_steps(batches, first_step, 6, workers=0)
    assert same(alone[0], batches[2 * first_step])
    helped = first_steps(batches, first_step, 6, workers=2)
    assert all(same(one, two) for one, two in zip(alone, helped, strict=True))
    assert not same(alone[0], alone[1])


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
    assert batch.counts["masked"] == 2 + 1 + 1 == len(batch.masked) == len(batch.labels)
    assert not batch.full and ragged_batch((4, 4)).full


def test_labels_are_the_original_tokens() -> None:
    ids = ragged_ids((9, 4, 7), 9, 0, seed=3)
    rows = np.arange(3)
    batch = make_batch(ids, np.zeros_like(rows), rows, tiny_masking(0.5), 0)
    assert np.array_equal(original_ids(batch).numpy(), ids)
    assert not np.array_equal(batch.input_ids.numpy(), ids)
    assert batch.valid.flatten()[batch.masked].all()


def test_moving_a_batch_keeps_what_is_in_it() -> None:
    batch = ragged_batch((5, 2))
    assert same(batch.to(torch.device("cpu")), batch)
