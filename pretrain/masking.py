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
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class Masked(NamedTuple):
    """Masked rows: what the models see, and where and what was hidden."""

    input_ids: NDArray[np.int64]  # (B, L)
    chosen: NDArray[np.bool_]  # (B, L)


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


def uniform(*parts: NDArray[np.uint64] | int) -> NDArray[np.float64]:
    """Numbers in [0, 1) from the same hash."""
    return (hash64(*parts) >> np.uint64(11)).astype(np.float64) * 2.0**-53


@dataclass(frozen=True)
class Masking:
    """BERT's masking: `round(probability * n)` of a row's n ordinary tokens, 80/10/10.

    At least one token is chosen. Whole words may leave a part of that number unused rather than
    cut a word; one long word alone may exceed it.

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

    def __post_init__(self) -> None:
        object.__setattr__(self, "ordinary", np.flatnonzero(~self.special))

    def __call__(
        self, ids: NDArray[np.int64], epochs: NDArray[np.int64], rows: NDArray[np.int64]
    ) -> Masked:
        """Mask a batch.

        Args:
            ids: (B, L) token ids. epochs, rows: (B,) which pass over which row of the data.
        """
        if not self.probability:
            return Masked(ids, np.zeros(ids.shape, bool))
        key = hash64(self.seed, epochs.astype(np.uint64), rows.astype(np.uint64))[:, None]
        columns = np.arange(ids.shape[1], dtype=np.uint64)[None, :]
        chosen = self._choose(ids, key, columns)
        draw = uniform(key, columns, 1)
        random_tokens = self.ordinary[
            (uniform(key, columns, 2) * len(self.ordinary)).astype(np.int64)
        ]
        masked = np.where(chosen & (draw < 1 - KEEP_ORIGINAL - RANDOM_TOKEN), self.mask_id, ids)
        replaced = chosen & (draw >= 1 - RANDOM_TOKEN)
        return Masked(np.where(replaced, random_tokens, masked), chosen)

    def _choose(
        self, ids: NDArray[np.int64], key: NDArray[np.uint64], columns: NDArray[np.uint64]
    ) -> NDArray[np.bool_]:
        """Bool (B, L): the tokens with the lowest draws, up to each row's budget."""
        eligible = ~self.special[ids]
        units = columns
        if self.continues is not None:  # all pieces of a word share one draw
            units = np.cumsum(~self.continues[ids] | ~eligible, axis=1).astype(np.uint64)
        draws = np.where(eligible, uniform(key, units, 0), 2.0)
        order = np.argsort(draws, axis=1, kind="stable")
        budget = np.round(self.probability * eligible.sum(axis=1)).astype(np.int64)
        budget = np.minimum(np.maximum(budget, 1), eligible.sum(axis=1))[:, None]
        first = np.arange(ids.shape[1])[None, :] < budget
        if self.continues is not None:
            first = _whole_units(np.take_along_axis(draws, order, axis=1), first)
        chosen = np.zeros(ids.shape, bool)
        np.put_along_axis(chosen, order, first, axis=1)
        return chosen & eligible


def _whole_units(draws: NDArray[np.float64], first: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Drop the word that the budget would cut in two, unless it is the only one.

    Args:
        draws: (B, L) sorted, equal within a word. first: (B, L), True for a leading run.
    """
    taken = first.sum(axis=1)
    rows = np.arange(len(draws))
    last = draws[rows, np.maximum(taken - 1, 0)]
    following = draws[rows, np.minimum(taken, draws.shape[1] - 1)]
    cut = (last == following) & (taken < draws.shape[1])
    kept = first & ~(cut[:, None] & (draws == last[:, None]))
    only_word = cut & ~kept.any(axis=1)
    return np.where(only_word[:, None], draws == last[:, None], kept)


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
