"""Masks: a pure function of (seed, epoch, row), of exact size, on whole words where wanted."""

import pydoc_data.topics
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from pretrain.masking import Masking, word_continuations

SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
PAD, UNK, CLS, SEP, MASK = range(5)
ROWS, LENGTH = 300, 64
PROSE = sorted(pydoc_data.topics.topics.values())  # real text that every Python carries
MARKDOWN = ["## Heading\n\n#### Deeper\n"] * 400


def wordpiece() -> Any:
    """BERT's kind of tokenizer: pieces that continue a word begin with `##`."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=1000, special_tokens=SPECIAL_TOKENS, show_progress=False
    )
    return _trained(tokenizer, trainer)


def byte_level() -> Any:
    """RoBERTa's kind of tokenizer: pieces that begin a word begin with `Ġ`.

    Its vocabulary has an ordinary token `##`, as RoBERTa's own has (from Markdown headings).
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1000, special_tokens=SPECIAL_TOKENS, show_progress=False
    )
    return _trained(tokenizer, trainer)


def _trained(tokenizer: Tokenizer, trainer: Any) -> Any:
    tokenizer.train_from_iterator(PROSE[:15] + MARKDOWN, trainer)
    names = ("pad", "unk", "cls", "sep", "mask")
    tokens = {f"{n}_token": token for n, token in zip(names, SPECIAL_TOKENS, strict=True)}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **tokens)


@pytest.fixture(scope="module", params=[wordpiece, byte_level], ids=["wordpiece", "byte_level"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return request.param()


@pytest.fixture(scope="module")
def rows(tokenizer: Any) -> np.ndarray:
    """Real text in rows of [CLS] … [SEP], the last tenth of them short and padded."""
    ids = np.concatenate([tokenizer(text)["input_ids"] for text in PROSE[40:70]])
    packed = np.full((ROWS, LENGTH), PAD, np.int64)
    lengths = np.full(ROWS, LENGTH)
    lengths[-ROWS // 10 :] = np.arange(ROWS // 10) % 12 + 3
    start = 0
    for row, length in zip(packed, lengths, strict=True):
        row[:length] = [CLS, *ids[start : start + length - 2], SEP]
        start += length - 2
    assert start < len(ids)
    return packed


def masking_of(tokenizer: Any, probability: float = 0.15, words: bool = False) -> Masking:
    special = np.zeros(len(tokenizer), bool)
    special[tokenizer.all_special_ids] = True
    continues = word_continuations(tokenizer) if words else None
    return Masking(probability, MASK, len(tokenizer), special, continues, seed=7)


def apply(masking: Masking, rows: np.ndarray, epoch: int = 0) -> tuple[np.ndarray, np.ndarray]:
    return marked(masking, rows, epoch, np.arange(len(rows)))


def marked(
    masking: Masking, rows: np.ndarray, epoch: int, numbers: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """What the models see, and True (B, L) where a token was chosen."""
    seen, positions = masking(rows, np.full_like(numbers, epoch), numbers)
    assert (np.diff(positions) > 0).all()
    chosen = np.zeros(rows.shape, bool)
    chosen.reshape(-1)[positions] = True
    return seen, chosen


@pytest.mark.parametrize("words", [False, True])
def test_mask_of_a_row_never_depends_on_its_batch(
    tokenizer: Any, rows: np.ndarray, words: bool
) -> None:
    masking = masking_of(tokenizer, words=words)
    seen, chosen = apply(masking, rows)
    order = np.random.default_rng(0).permutation(ROWS)
    for part in np.split(order, [1, 2, 17, 100]):
        seen_part, chosen_part = marked(masking, rows[part], 0, part)
        assert np.array_equal(seen_part, seen[part])
        assert np.array_equal(chosen_part, chosen[part])


def test_seed_epoch_and_row_each_change_the_mask(tokenizer: Any, rows: np.ndarray) -> None:
    masking = masking_of(tokenizer)
    full = rows[:200]
    _, chosen = apply(masking, full)
    _, other_epoch = apply(masking, full, epoch=1)
    _, other_seed = apply(replace(masking, seed=8), full)
    _, other_row = marked(masking, full, 0, np.arange(1, 201))
    for other in (other_epoch, other_seed, other_row):
        # Two independent choices of 15 % share 2.25 % of the positions.
        assert 0.012 < (chosen & other).mean() < 0.034
    assert np.array_equal(other_row[:-1].mean(), chosen[1:].mean())


def test_budget_is_exact(tokenizer: Any, rows: np.ndarray) -> None:
    """Every row hides round(0.15 n) of its n ordinary tokens, at least one."""
    ordinary = rows > MASK
    _, chosen = apply(masking_of(tokenizer), rows)
    expected = [max(round(0.15 * int(n)), 1) if n else 0 for n in ordinary.sum(1)]
    assert chosen.sum(1).tolist() == expected
    # By hand: 62 ordinary tokens, 9.3.
    assert expected[0] == 9 and ordinary[0].sum() == 62


@pytest.mark.parametrize("words", [False, True])
def test_special_tokens_are_never_chosen_and_never_drawn(
    tokenizer: Any, rows: np.ndarray, words: bool
) -> None:
    masking = masking_of(tokenizer, 0.9, words)
    for epoch in range(5):
        seen, chosen = apply(masking, rows, epoch)
        assert not chosen[rows <= MASK].any()
        assert np.array_equal(seen[~chosen], rows[~chosen])
        replaced = seen[chosen & (seen != rows)]
        assert not np.isin(replaced, [PAD, UNK, CLS, SEP]).any()


def test_chosen_tokens_are_80_10_10(tokenizer: Any, rows: np.ndarray) -> None:
    """About 2,500 choices in each of 10 epochs; bounds of 5 sigma (0.005 and 0.0038 of n)."""
    masking = masking_of(tokenizer)
    seen, chosen = zip(*(apply(masking, rows, epoch) for epoch in range(10)), strict=True)
    hidden, where = np.stack(seen), np.stack(chosen)
    original = np.broadcast_to(rows, hidden.shape)
    total = where.sum()
    assert total > 20_000
    sigma_mask, sigma_other = (0.8 * 0.2 / total) ** 0.5, (0.1 * 0.9 / total) ** 0.5
    masked = (hidden[where] == MASK).mean()
    kept = (hidden[where] == original[where]).mean()  # includes random draws of the same token
    assert abs(masked - 0.8) < 5 * sigma_mask
    assert abs(kept - 0.1 - 0.1 / len(tokenizer)) < 5 * sigma_other
    random = hidden[where & (hidden != MASK) & (hidden != original)]
    # Uniform over the ordinary tokens: the mean id of n draws is that of all, within 5 sigma.
    spread = (len(tokenizer) - 5) / 12**0.5
    assert abs(random.mean() - (len(tokenizer) + 4) / 2) < 5 * spread / len(random) ** 0.5


def test_every_position_is_equally_likely(tokenizer: Any, rows: np.ndarray) -> None:
    masking = masking_of(tokenizer)
    full = rows[:200]
    count = sum(apply(masking, full, epoch)[1].sum(0) for epoch in range(20))[1:-1]
    share = 9 / 62
    expected, sigma = 4000 * share, (4000 * share * (1 - share)) ** 0.5
    assert (abs(count - expected) < 5 * sigma).all()


def test_continuations_are_the_pieces_inside_a_word(tokenizer: Any) -> None:
    """By hand, through the tokenizer's own offsets: a continuation follows without a space."""
    continues = word_continuations(tokenizer)
    # Both vocabularies hold tokens that begin with "##": that alone does not tell them apart.
    assert any(token.startswith("##") for token in tokenizer.get_vocab())
    text = " The interpreter disambiguates supercalifragilistic identifiers unequivocally"
    encoded = tokenizer(text, return_offsets_mapping=True)
    assert len(encoded["input_ids"]) > 12
    for token, (start, _) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
        starts_word = text[start] == " " or text[start - 1] == " "
        assert continues[token] == (not starts_word), tokenizer.convert_ids_to_tokens(token)


def words_of(rows: np.ndarray, continues: np.ndarray) -> np.ndarray:
    """Number of the word that each token belongs to, by a loop; -1 for special tokens."""
    words = np.full(rows.shape, -1)
    for number, row in enumerate(rows):
        word = -1
        for position, token in enumerate(row):
            if token <= MASK:
                continue
            word += not (continues[token] and row[position - 1] > MASK)
            words[number, position] = word
    return words


def test_words_are_chosen_whole_within_the_budget(tokenizer: Any, rows: np.ndarray) -> None:
    masking = masking_of(tokenizer, words=True)
    words = words_of(rows, masking.continues)
    budget = [max(round(0.15 * int(n)), 1) for n in (rows > MASK).sum(1)]
    parts = whole = cut = 0
    for epoch in range(3):
        _, chosen = apply(masking, rows, epoch)
        for row in range(ROWS):
            hit = set(words[row][chosen[row]])
            whole_words = np.isin(words[row], list(hit))
            too_long = len(hit) == 1 and chosen[row].sum() == masking.most(LENGTH)
            assert too_long or np.array_equal(whole_words, chosen[row]), (epoch, row)
            assert chosen[row].sum() <= budget[row] or len(hit) == 1
            assert hit and -1 not in hit
            cut += int(whole_words.sum() > chosen[row].sum())
            parts, whole = parts + int(chosen[row].sum()), whole + len(hit)
    assert cut < 0.02 * 3 * ROWS  # lines of dashes
    assert parts > 1.1 * whole  # words of several pieces were among them
    share = parts / 3 / (rows > MASK).sum()
    assert 0.12 < share <= 0.155  # a word that does not fit is left out


def test_all_ordinary_tokens_can_be_chosen(tokenizer: Any, rows: np.ndarray) -> None:
    """A budget of everything takes everything, words or not."""
    for words in (False, True):
        _, chosen = apply(masking_of(tokenizer, 0.9999, words), rows)
        assert np.array_equal(chosen, rows > MASK)


def test_probability_0_changes_nothing(tokenizer: Any, rows: np.ndarray) -> None:
    seen, chosen = apply(masking_of(tokenizer, 0.0), rows)
    assert np.array_equal(seen, rows) and not chosen.any()


@pytest.mark.parametrize("words", [False, True])
def test_short_rows_hide_one_token_and_empty_rows_none(tokenizer: Any, words: bool) -> None:
    rows = np.array([[CLS, 50, SEP, PAD], [CLS, SEP, PAD, PAD], [50, 51, PAD, PAD]])
    for epoch in range(20):
        _, chosen = apply(masking_of(tokenizer, words=words), rows, epoch)
        assert chosen[0].tolist() == [False, True, False, False]
        assert not chosen[1].any()
        assert chosen[2].sum() in ((1, 2) if words else (1,)) and not chosen[2, 2:].any()


def test_a_word_longer_than_a_row_may_hide_is_cut_there() -> None:
    """One word of 40 pieces in a row of 42: of 0.15 * 42 tokens only 6 slots are there."""
    special = np.arange(10) <= MASK
    continues = np.arange(10) == 6
    masking = Masking(0.15, MASK, 10, special, continues, seed=3)
    row = np.array([[CLS, 5, *[6] * 39, SEP]])
    assert masking.most(42) == 6
    for epoch in range(5):
        _, chosen = apply(masking, row, epoch)
        assert np.flatnonzero(chosen).tolist() == [1, 2, 3, 4, 5, 6]
    short = np.where(np.arange(42) < 5, row, PAD)  # 4 pieces, budget 1: the word stays whole
    assert apply(masking, short)[1].sum() == 4


@pytest.mark.parametrize("words", [False, True])
def test_no_row_has_more_chosen_tokens_than_slots(tokenizer: Any, words: bool) -> None:
    """Rows of any content: only continuations, only ordinary tokens, some special ones."""
    draw = np.random.default_rng(1)
    for probability in (0.01, 0.15, 0.5, 0.9):
        masking = masking_of(tokenizer, probability, words)
        rows = draw.integers(PAD, len(tokenizer), (200, 33))
        rows[:100] = np.flatnonzero(word_continuations(tokenizer)[5:])[:1] + 5
        assert apply(masking, rows)[1].sum(1).max() <= masking.most(33)


@pytest.mark.parametrize("words", [False, True])
def test_masks_are_those_of_the_definition(tokenizer: Any, rows: np.ndarray, words: bool) -> None:
    """Integer by integer, in Python's own numbers, for rows full and short."""
    masking = masking_of(tokenizer, words=words)
    part = np.r_[0:10, ROWS - 25 : ROWS]
    seen, chosen = marked(masking, rows[part], 3, part)
    for place, number in enumerate(part.tolist()):
        expected_seen, expected = masked_by_hand(masking, rows[number].tolist(), 3, number)
        assert np.flatnonzero(chosen[place]).tolist() == expected
        assert seen[place].tolist() == expected_seen


def masked_by_hand(
    masking: Masking, row: list[int], epoch: int, number: int
) -> tuple[list[int], list[int]]:
    """A row as the models see it, and its chosen positions, by the definition."""
    key = splitmix(masking.seed, epoch, number)
    word, words = 0, []
    for token in row:
        word += masking.continues is None or bool(
            not masking.continues[token] or masking.special[token]
        )
        words.append(word if masking.continues is not None else word - 1)
    ordinary = [p for p, token in enumerate(row) if not masking.special[token]]
    units: dict[int, list[int]] = {}
    for position in ordinary:
        units.setdefault(words[position], []).append(position)
    low = 2 ** len(row).bit_length()
    ranked = sorted(units, key=lambda u: (lowbias(key, u, 0) % 2**31 // low, u))
    budget = min(max(round(masking.probability * len(ordinary)), 1), len(ordinary))
    chosen: list[int] = []
    for unit in ranked:
        if len(chosen) + len(units[unit]) > budget and chosen:
            break
        chosen += units[unit][: max(budget, masking.most(len(row)))]
        if len(chosen) >= budget:
            break
    seen = list(row)
    for position in chosen:
        fate = lowbias(key, position, 1) / 2**32
        if fate < 0.8:
            seen[position] = MASK
        elif fate >= 0.9:
            drawn = lowbias(key, position, 2) * len(masking.ordinary) >> 32
            seen[position] = int(masking.ordinary[drawn])
    return seen, sorted(chosen)


def splitmix(*parts: int) -> int:
    """The 64-bit key of a row."""
    state, whole = 0, 2**64
    for part in parts:
        state = ((state ^ part) + 0x9E3779B97F4A7C15) % whole
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % whole
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB % whole
        state ^= state >> 31
    return state


def lowbias(key: int, column: int, purpose: int) -> int:
    """A 32-bit draw for a column of the row with that key."""
    whole = 2**32
    state = ((column + (purpose << 24)) * 0x9E3779B9 + key) % whole
    state = (state ^ (state >> 16)) * 0x21F0AAAD % whole
    state = (state ^ (state >> 15) ^ (key >> 32)) * 0xD35A2D97 % whole
    return state ^ (state >> 15)
