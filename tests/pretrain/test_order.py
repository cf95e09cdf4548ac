"""The order of rows: permutations of shuffled blocks, the same for any cut of the samples."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain import order
from pretrain.order import Order, permuted


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 8 rows, 16 to a window: many windows in few rows."""
    monkeypatch.setattr(order, "BLOCK", 8)
    monkeypatch.setattr(order, "WINDOW", 16)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(rows=st.integers(1, 1500), epoch=st.integers(0, 2**31), seed=st.integers(0, 2**63))
def test_every_epoch_is_a_permutation(rows: int, epoch: int, seed: int) -> None:
    epochs, found = Order(rows, seed)(np.arange(rows, dtype=np.int64) + epoch * rows)
    assert (epochs == epoch).all()
    assert sorted(found.tolist()) == list(range(rows))


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(
    "rows", [*range(1, 18), 127, 128, 255, 256, 257, 263, 264, 391, 1000, 4096]
)
def test_windows_of_any_number_make_a_permutation(rows: int) -> None:
    """Fewer rows than a block, one window, rows behind the last block, uneven windows."""
    _, found = Order(rows, seed=1)(np.arange(3 * rows))
    for epoch in found.reshape(3, rows):
        assert sorted(epoch.tolist()) == list(range(rows))


@pytest.mark.parametrize("size", [*range(1, 18), 63, 64, 65, 255, 256, 257, 4096])
def test_permuted_blocks_are_a_permutation(size: int) -> None:
    key = np.array([size], np.uint64)
    assert sorted(permuted(np.arange(size), size, key).tolist()) == list(range(size))


@pytest.mark.parametrize("rows", [2_000, 3_000])
def test_order_differs_between_epochs_and_seeds_and_looks_random(rows: int) -> None:
    _, found = Order(rows, 1)(np.arange(2 * rows))
    _, other = Order(rows, 2)(np.arange(rows))
    first, second = found.reshape(2, rows)
    identity = np.arange(rows)
    for one, two in ((first, second), (first, other), (first, identity)):
        # Fixed points of a random permutation: 1 on average, Poisson.
        assert (one == two).sum() < 10
        assert abs(np.corrcoef(one, two)[0, 1]) < 5 / rows**0.5
    # Neighbours are as unrelated as any two rows.
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 5 / rows**0.5


@pytest.mark.usefixtures("small_blocks")
def test_a_window_reads_its_blocks_whole_and_mixes_them() -> None:
    """1,024 rows are 128 blocks, 8 windows of 16: 128 samples in a row read 16 whole blocks."""
    _, found = Order(1024, seed=3)(np.arange(1024))
    taken = []
    for window in found.reshape(8, 128):
        blocks, counts = np.unique(window // 8, return_counts=True)
        assert len(blocks) == 16 and set(counts) == {8}
        taken += blocks.tolist()
        # 8 samples in a row come from 8 of 16 blocks drawn at random: at least 3 different ones.
        assert min(len(set(part // 8)) for part in window.reshape(16, 8)) >= 3
        assert np.ptp(blocks) > 64  # of the whole split
    assert sorted(taken) == list(range(128))


@pytest.mark.usefixtures("small_blocks")
def test_order_of_any_sample_needs_no_other() -> None:
    samples = np.array([5, 999, 1000, 777, 1_000_000_000_007])
    epochs, found = Order(1000, seed=3)(samples)
    assert epochs.tolist() == [0, 0, 1, 0, 1_000_000_000]
    for sample, epoch, row in zip(samples, epochs, found, strict=True):
        one_epoch, one_row = Order(1000, seed=3)(np.array([sample]))
        assert (one_epoch[0], one_row[0]) == (epoch, row)


def test_memory_is_that_of_two_windows_at_most() -> None:
    """A billion rows: a far step keeps the numbers of one window."""
    rows = 10**9 + 7
    far = Order(rows, seed=0)
    epochs, found = far(np.arange(1000) + 5 * rows + rows // 2)
    assert (epochs == 5).all() and len(set(found.tolist())) == 1000 and found.max() < rows
    assert far._kept is not None and far._kept[1].nbytes <= 2 * 8 * order.BLOCK * order.WINDOW


@pytest.mark.usefixtures("small_blocks")
def test_the_blocks_of_a_window_are_told_when_it_begins() -> None:
    told: list[list[int]] = []
    found = Order(1000, 3, lambda firsts, count: told.append([*firsts.tolist(), count]))
    rows = found(np.arange(100))[1]
    assert len(told) == 1 and told[0][-1] == 8
    assert set((rows // 8 * 8).tolist()) <= set(told[0][:-1])
    found(np.arange(100, 110))
    assert len(told) == 1  # the same window
    found(np.arange(110, 200))
    assert len(told) == 2 and not set(told[0][:-1]) & set(told[1][:-1])
