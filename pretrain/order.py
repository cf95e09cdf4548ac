"""The order of rows: shuffled blocks, mixed within windows, computed for any step at once.

Rows lie on disk as documents do, so that neighbours are alike and single random rows are slow to
read from cold storage. An epoch therefore permutes blocks of `BLOCK` neighbouring rows, takes
`WINDOW` blocks of that sequence at a time, and permutes the rows of these blocks together. A block
is read as a whole while its window lasts, and two rows of a batch come from one block about once
in `WINDOW` pairs. A split of fewer than two windows is one window: a plain permutation of its rows.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from pretrain.masking import hash64

BLOCK = 256  # rows: 64 KiB at 128 tokens, what a disk or a file server reads at once
WINDOW = 1024  # blocks: 262,144 rows are mixed, 64 MiB at 128 tokens
ROUNDS = 4


@dataclass
class Order:
    """Epoch and row of each sample number of a run: every row once in every epoch.

    A pure function of (rows, seed, sample). The window in use is kept, since samples come in
    sequence: 8 bytes for each of its rows, at most two windows' worth. Any step is reached by
    computing its own window, whatever the size of the data.

    Attributes:
        rows: of the split. seed: of the run.
        expect: told the first rows (n,) of a window's blocks, and their length, when it begins.
    """

    rows: int
    seed: int
    expect: Callable[[NDArray[np.int64], int], None] | None = None
    _kept: tuple[tuple[int, int], NDArray[np.int64]] | None = field(default=None, repr=False)

    def __call__(self, samples: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Epochs and rows, int64 (n,) each, of sample numbers, int64 (n,)."""
        epochs, places = np.divmod(samples, self.rows)
        blocks = np.minimum(places // BLOCK, max(self._blocks - 1, 0))
        windows = ((blocks + 1) * self._windows - 1) // max(self._blocks, 1)
        found = np.empty_like(samples)
        for epoch, window in sorted(set(zip(epochs.tolist(), windows.tolist(), strict=True))):
            here = (epochs == epoch) & (windows == window)
            start = self._first_block(window) * BLOCK
            found[here] = self._window(epoch, window)[places[here] - start]
        return epochs, found

    @property
    def _blocks(self) -> int:
        """Whole blocks; the rows behind them belong to the last window of every epoch."""
        return self.rows // BLOCK

    @property
    def _windows(self) -> int:
        return max(1, self._blocks // WINDOW)

    def _first_block(self, window: int) -> int:
        """Windows are of equal size, give or take a block."""
        return window * self._blocks // self._windows

    def _window(self, epoch: int, window: int) -> NDArray[np.int64]:
        """The rows of a window in their order."""
        if self._kept is None or self._kept[0] != (epoch, window):
            sequence = np.arange(self._first_block(window), self._first_block(window + 1))
            firsts = permuted(sequence, self._blocks, hash64(self.seed, epoch, 0)) * BLOCK
            if self.expect is not None:
                self.expect(firsts, BLOCK)
            rows = (firsts[:, None] + np.arange(BLOCK)).reshape(-1)
            if window == self._windows - 1:
                rows = np.concatenate([rows, np.arange(self._blocks * BLOCK, self.rows)])
            key = hash64(self.seed, epoch, 1, window)
            draws = hash64(key, np.arange(len(rows), dtype=np.uint64))
            self._kept = (epoch, window), rows[np.argsort(draws, kind="stable")]
        return self._kept[1]


def permuted(places: NDArray[np.int64], size: int, key: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Where a permutation of `size` numbers takes `places`, int64 (n,) in [0, size).

    A Feistel network over the next even power of two, walked until it lands within `size`: O(1)
    memory and time for each place.
    """
    half = max((int(size - 1).bit_length() + 1) // 2, 1)
    low, shift = np.uint64((1 << half) - 1), np.uint64(half)
    value = places.astype(np.uint64)
    outside = np.ones(len(value), bool)
    while outside.any():
        left, right = value[outside] >> shift, value[outside] & low
        for number in range(ROUNDS):
            left, right = right, left ^ (hash64(key, number, right) & low)
        value[outside] = (left << shift) | right
        outside = value >= size
    return value.astype(np.int64)
