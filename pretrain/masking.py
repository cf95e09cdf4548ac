"""Masks for masked language modelling, made at load time.

A mask is a pure function of (seed, epoch, row): it does not depend on the batch, the rank, the
number of loader workers or what was drawn before. Draws come from a counter-based hash, so that
a whole batch is masked by a few vector operations.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers.models import WordPiece

from data_prep.shard_format import TOKENIZER_FOLDER, read_manifest
from data_prep.tokenization import load_tokenizer

KEEP_ORIGINAL, RANDOM_TOKEN = 0.1, 0.1  # of the chosen tokens (BERT, section 3.1); 0.8 get [MASK]
CHOICE, FATE, REPLACEMENT = 0, 1, 2  # what a draw is for
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_NEVER = np.uint32(2**31)  # above every draw of a token that can be chosen


class Masked(NamedTuple):
    """Masked rows: what the models see, and what was hidden."""

    input_ids: NDArray[np.int64]  # (B, L)
    positions: NDArray[np.int64]  # (P,), ascending, in the flattened (B*L) rows


def hash64(*parts: NDArray[np.uint64] | int) -> NDArray[np.uint64]:
    """Mix integers (broadcast together) into uniform 64-bit values (splitmix64's finaliser)."""
    with np.errstate(over="ignore"):
        state = np.zeros(1, np.uint64)
        for part in parts:
            state = (state ^ np.asarray(part, np.uint64)) + _GOLDEN
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return state


def draws32(
    keys: NDArray[np.uint64], columns: NDArray[np.uint32], purpose: int
) -> NDArray[np.uint32]:
    """Uniform 32-bit values of (key, column, purpose), broadcast together.

    Two multiplications and three shifts, after the "lowbias32" family of hashes; cheaper than
    `hash64`. Columns must lie below 2^24.
    """
    low, high = keys.astype(np.uint32), (keys >> np.uint64(32)).astype(np.uint32)
    state = (columns + np.uint32(purpose << 24)) * np.uint32(0x9E3779B9) + low
    state ^= state >> np.uint32(16)
    state *= np.uint32(0x21F0AAAD)
    state ^= (state >> np.uint32(15)) ^ high
    state *= np.uint32(0xD35A2D97)
    state ^= state >> np.uint32(15)
    return state


@dataclass(frozen=True)
class Masking:
    """BERT's masking: `round(probability * n)` of a row's n ordinary tokens, 80/10/10.

    At least one token is chosen. Whole words may leave a part of that number unused rather than
    cut a word; one long word alone may exceed it, up to `most` tokens.

    Attributes:
        probability: share of the ordinary (not special) tokens to choose; 0 masks nothing.
        mask_id, vocab_size: the [MASK] token, and the size for random tokens.
        special: bool (V,), True for tokens that are never chosen and never drawn.
        continues: bool (V,), True for tokens that continue the word before them; None masks
            single tokens, otherwise words are chosen whole.
        seed: of the run.
    """

    probability: float
    mask_id: int
    vocab_size: int
    special: NDArray[np.bool_]
    continues: NDArray[np.bool_] | None = None
    seed: int = 0
    ordinary: NDArray[np.int64] = field(init=False, repr=False)
    never: NDArray[np.uint32] = field(init=False, repr=False)  # (V,), 2^31 for special tokens

    def __post_init__(self) -> None:
        object.__setattr__(self, "ordinary", np.flatnonzero(~self.special))
        object.__setattr__(self, "never", self.special * _NEVER)

    def __call__(
        self, ids: NDArray[np.int64], epochs: NDArray[np.int64], rows: NDArray[np.int64]
    ) -> Masked:
        """Mask a batch.

        Args:
            ids: (B, L) token ids. epochs, rows: (B,) which pass over which row of the data.
        """
        if not self.probability:
            return Masked(ids, np.zeros(0, np.int64))
        keys = hash64(self.seed, epochs.astype(np.uint64), rows.astype(np.uint64))
        positions = np.flatnonzero(self._choose(ids, keys))
        row, columns = np.divmod(positions, ids.shape[1])
        own, columns32 = keys[row], columns.astype(np.uint32)
        fate = draws32(own, columns32, FATE)
        masked = fate < np.uint32((1 - KEEP_ORIGINAL - RANDOM_TOKEN) * 2**32)
        replaced = np.flatnonzero(fate >= np.uint32((1 - RANDOM_TOKEN) * 2**32))
        drawn = draws32(own[replaced], columns32[replaced], REPLACEMENT).astype(np.uint64)
        seen = ids.copy()
        seen.reshape(-1)[positions[masked]] = self.mask_id
        scaled = (drawn * np.uint64(len(self.ordinary))) >> np.uint64(32)
        seen.reshape(-1)[positions[replaced]] = self.ordinary[scaled.astype(np.int64)]
        return Masked(seen, positions)

    def most(self, length: int) -> int:
        """The most tokens that are chosen in a row of `length`."""
        return most_masked(self.probability, length)

    def _choose(self, ids: NDArray[np.int64], keys: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Bool (B, L): the tokens with the lowest draws, up to each row's budget.

        A draw ends in the number of its token or word, so that no two are equal and one comparison
        with the last draw within the budget finds all that are chosen.
        """
        never = self.never[ids]
        units = np.arange(ids.shape[1], dtype=np.uint32)[None, :]
        if self.continues is not None:  # all pieces of a word share one draw
            begins = ~self.continues[ids] | (never > 0)
            units = np.cumsum(begins, axis=1, dtype=np.uint32)
        number = np.uint32(2 ** ids.shape[1].bit_length() - 1)  # words are numbered from 1
        draws = draws32(keys[:, None], units, CHOICE)
        draws = ((draws & (_NEVER - np.uint32(1))) & ~number) | units | never
        ordinary = ids.shape[1] - np.count_nonzero(never, axis=1)
        budget = np.round(self.probability * ordinary).astype(np.int64)
        budget = np.minimum(np.maximum(budget, 1), ordinary)
        ranked = np.sort(draws, axis=1)
        last = np.take_along_axis(ranked, np.maximum(budget - 1, 0)[:, None], axis=1)
        chosen = (draws <= last) & (never == 0)
        if self.continues is not None:
            self._keep_whole(chosen, draws, ranked[:, 0], last[:, 0], budget)
        return chosen

    def _keep_whole(
        self,
        chosen: NDArray[np.bool_],
        draws: NDArray[np.uint32],
        first: NDArray[np.uint32],
        last: NDArray[np.uint32],
        budget: NDArray[np.int64],
    ) -> None:
        """Drop the word that the budget cuts in two, unless it is the only one of its row.

        Args:
            chosen: bool (B, L), with all pieces of the last word; changed in place.
            draws: (B, L). first, last: (B,), the lowest draw, and that at the end of the budget.
        """
        cut = np.count_nonzero(chosen, axis=1) > budget
        several = cut & (first != last)
        chosen[several] &= draws[several] != last[several, None]
        alone = np.flatnonzero(cut & ~several)
        chosen[alone] &= np.cumsum(chosen[alone], axis=1) <= self.most(chosen.shape[1])


def most_masked(probability: float, length: int) -> int:
    """The most tokens that are chosen in a row of `length`."""
    return max(1, round(probability * length)) if probability else 0


def word_continuations(tokenizer: Any) -> NDArray[np.bool_]:
    """Bool (V,): tokens that continue the word before them.

    WordPiece marks them with "##"; byte-level BPE and SentencePiece mark the *first* piece of a
    word, with "Ġ" and "▁".
    """
    tokens = [token or "" for token in tokenizer.convert_ids_to_tokens(range(len(tokenizer)))]
    if isinstance(tokenizer.backend_tokenizer.model, WordPiece):  # RoBERTa's BPE has "##" as a word
        return np.array([token.startswith("##") for token in tokens])
    return np.array([not token.startswith(("Ġ", "▁")) for token in tokens])


def shard_masking(
    folder: Path, probability: float, seed: int, whole_words: bool = False
) -> Masking:
    """The masking of a folder of shards, by its own tokenizer.

    Raises:
        InputError: it is no folder of shards, or has no tokenizer.
    """
    manifest, tokenizer = read_manifest(folder), load_tokenizer(folder / TOKENIZER_FOLDER)
    special = np.zeros(manifest.vocab_size, bool)
    special[list(tokenizer.all_special_ids)] = True
    return Masking(
        probability,
        manifest.special_ids["mask"],
        manifest.vocab_size,
        special,
        continues=word_continuations(tokenizer) if whole_words else None,
        seed=seed,
    )
