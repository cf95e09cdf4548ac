"""Numbers of a few bits each in bytes, and ascending numbers as gaps with a code of Golomb's kind.

Gaps are cut into low bits, stored as they are, and the rest, stored in unary: a marked bit for
every number, after as many zeros as its gap has of `2^width`. However they fall, the marks and
zeros of `count` gaps below `limit` in all fit in `count + limit / 2^width` bits: a fixed size, half
a bit a number above what the least code of a random set takes.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def pack(values: NDArray[np.int64], bits: int) -> NDArray[np.uint8]:
    """The lowest `bits` of every value (N,), highest bit first, in ceil(N * bits / 8) bytes."""
    shifts = np.arange(bits - 1, -1, -1)
    return np.packbits((values[:, None] >> shifts & 1).astype(np.uint8))


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """What `pack` took, from uint8 (B, bytes): int64 (B, count)."""
    if bits == 8:
        return packed[:, :count].long()
    eight = torch.arange(7, -1, -1, device=packed.device, dtype=torch.uint8)
    single = (packed[:, :, None] >> eight & 1).flatten(1)[:, : count * bits]
    weights = 2 ** torch.arange(bits - 1, -1, -1, device=packed.device, dtype=torch.int32)
    return (single.view(len(packed), count, bits) * weights).sum(-1)


@dataclass(frozen=True)
class Gaps:
    """The code of up to `count` ascending numbers in range(limit), with `width` low bits a gap."""

    count: int
    limit: int
    width: int

    @property
    def marks(self) -> int:
        """Bits of the unary part."""
        return self.count + (self.limit >> self.width)

    def encode(self, numbers: NDArray[np.int64]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """Bytes of the unary part, and the low bits (N,) of numbers (N,), N <= count."""
        gaps = np.diff(numbers, prepend=-1) - 1
        marked = np.zeros(self.marks, np.uint8)
        marked[np.cumsum(gaps >> self.width) + np.arange(len(gaps))] = 1
        return np.packbits(marked), gaps & (2**self.width - 1)

    def decode(self, marked: Tensor, low: Tensor) -> tuple[Tensor, Tensor]:
        """The numbers, int64 (B, count), and which of them exist, bool (B, count).

        Args:
            marked: uint8 (B, bytes). low: int64 (B, count).
        """
        ones = unpack(marked, 1, self.marks).bool()
        ranks = torch.arange(self.count, device=low.device)
        target = torch.where(ones, ones.cumsum(1) - 1, self.count)  # zeros go to one place too many
        places = torch.arange(self.marks, device=low.device).expand_as(target)
        place = low.new_zeros(len(low), self.count + 1).scatter_(1, target, places)[:, :-1]
        numbers = ((place - ranks) << self.width) + low.cumsum(1) + ranks
        return numbers, ranks < ones.sum(1, keepdim=True)


def best_gaps(count: int, limit: int) -> Gaps:
    """The shortest code, of those whose low bits fill a byte: whole bytes are what zstd finds."""
    codes = [Gaps(count, limit, width) for width in range(8, 24)]
    return min(codes, key=lambda code: code.marks + count * code.width)
