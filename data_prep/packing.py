"""Packing: a split's documents become full rows `[CLS] tokens [SEP]`."""

import hashlib

import numpy as np

PACKING = (
    "the documents of a split form one stream of tokens with one separator between documents; "
    "the stream is cut into rows [CLS] + (seq_length - 2) tokens + [SEP]; "
    "only a split's last row is padded"
)


def is_validation(seed: int, document: int, fraction: float) -> bool:
    """Whether the document with that number (from 0, in input order) belongs to validation.

    A pure function of its arguments. Document 0 is always for training and document 1, unless
    `fraction` is 0, for validation, so that each side of two documents or more has at least one.
    """
    if document < 2:
        return document == 1 and fraction > 0
    digest = hashlib.blake2b(f"{seed}/{document}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2.0**64


class RowPacker:
    """The stream of one split, cut into blocks of rows.

    Tokens wait as content, without [CLS] and [SEP]: at most one block's and one batch's.
    """

    def __init__(
        self, seq_length: int, rows_per_block: int, special_ids: dict[str, int], dtype: np.dtype
    ) -> None:
        self.seq_length = seq_length
        self.rows_per_block = rows_per_block
        self._ids = special_ids
        self._dtype = dtype
        self._parts: list[np.ndarray] = []
        self._waiting = 0
        self.begun = False  # the stream has a document: the next one comes behind a separator

    def begin_document(self) -> None:
        """Separate the document that follows from the one before it."""
        if self.begun:
            self.add(np.array([self._ids["sep"]], dtype=self._dtype))
        self.begun = True

    def add(self, ids: np.ndarray) -> None:
        """Append token ids (n,) to the stream."""
        self._parts.append(ids.astype(self._dtype))  # a copy: a view would hold its whole batch
        self._waiting += len(ids)

    def full_block(self) -> np.ndarray | None:
        """The next `rows_per_block` rows (n, seq_length), or None while there are too few."""
        size = self.rows_per_block * (self.seq_length - 2)
        if self._waiting < size:
            return None
        content = self.waiting()
        self.restore(content[size:], self.begun)
        return self._rows(content[:size])

    def last_block(self) -> tuple[np.ndarray, int]:
        """The rows that are left (n, seq_length), the last one padded, and the padding in it."""
        content = self.waiting()
        self.restore(content[:0], self.begun)
        return self._rows(content), -len(content) % (self.seq_length - 2)

    def waiting(self) -> np.ndarray:
        """The content (n,) that is in no block yet."""
        return np.concatenate([np.empty(0, self._dtype), *self._parts])

    def restore(self, content: np.ndarray, begun: bool) -> None:
        """Go on where a packer with that content waiting stood."""
        self._parts = [content.copy()]  # a copy, so that a view does not hold a whole block
        self._waiting = len(content)
        self.begun = begun

    def _rows(self, content: np.ndarray) -> np.ndarray:
        width = self.seq_length - 2
        count = -(-len(content) // width)
        rows = np.full((count, self.seq_length), self._ids["pad"], dtype=self._dtype)
        rows[:, 0] = self._ids["cls"]
        whole = len(content) // width
        rows[:whole, 1:-1] = content[: whole * width].reshape(whole, width)
        rows[:whole, -1] = self._ids["sep"]
        if whole < count:
            rest = content[whole * width :]
            rows[-1, 1 : len(rest) + 1] = rest
            rows[-1, len(rest) + 1] = self._ids["sep"]
        return rows
