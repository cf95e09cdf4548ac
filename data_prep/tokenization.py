"""Tokenizers: loading one, training one on the corpus, telling two apart, tokenising text."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import accumulate, chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from potstill.errors import InputError
from potstill.files import whole_folder, write_json
from potstill.text import means_a_folder

BERT_SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LARGEST_VOCABULARY = 10_000_000
EncoderSettings = tuple[str, dict[str, int]]  # tokenizer.json, forbidden ids by token


def load_tokenizer(name_or_dir: str | Path, revision: str | None = None) -> Any:
    """A Hugging Face *fast* tokenizer by hub name or folder; never runs the folder's own code.

    A `Path` is always a folder, of a `str` the form decides (`potstill.text.means_a_folder`).
    `revision` is a branch, tag or commit on the hub; None is its main branch.

    Raises:
        InputError: not found, no fast version, nothing in it but special tokens, or without those
            that rows need.
    """
    if means_a_folder(name_or_dir) and not Path(name_or_dir).is_dir():
        raise InputError(
            f"the tokenizer folder {name_or_dir!s} does not exist; give one, or a name"
        )
    from transformers import AutoTokenizer  # seconds to import: only when a tokenizer is loaded

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(name_or_dir), revision=revision or "main", trust_remote_code=False
        )
    except Exception as error:  # a damaged tokenizer.json raises a bare Exception
        reason = str(error).strip().partition("\n")[0]
        raise InputError(
            f"no tokenizer could be loaded from {name_or_dir!s}: {reason} "
            "(give a hub name, or a folder with tokenizer.json)"
        ) from error
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(
            f"the tokenizer {name_or_dir!s} ({type(tokenizer).__name__}) has no fast version; "
            "give one with a tokenizer.json"
        )
    # From a config.json alone the library makes a tokenizer of nothing but special tokens.
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise InputError(
            f"{name_or_dir!s}: no tokenizer in it; copy the model's tokenizer (tokenizer.json, "
            "tokenizer_config.json) into the folder"
        )
    special_ids(tokenizer)
    return tokenizer


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write a tokenizer's files into a folder.

    Raises:
        OSError: they cannot be written.
    """
    # Where it was looked for is of this machine: the files must be the same on and off line.
    for name in ("local_files_only", "is_local"):
        tokenizer.init_kwargs.pop(name, None)
    try:
        tokenizer.save_pretrained(folder)
    except OSError:
        raise
    except Exception as error:  # a full disk: the library raises a bare Exception
        raise OSError(str(error)) from error


def special_ids(tokenizer: Any) -> dict[str, int]:
    """The ids of pad, cls, sep and mask, whatever the tokenizer calls them (`<s>`, `</s>` …).

    Raises:
        InputError: one of them is missing.
    """
    ids = {name: getattr(tokenizer, f"{name}_token_id") for name in ("pad", "cls", "sep", "mask")}
    missing = [f"{name}_token" for name, token_id in ids.items() if token_id is None]
    if missing:
        raise InputError(
            f"the tokenizer {tokenizer.name_or_path} has no {', '.join(missing)}; "
            "give the tokenizer of a BERT-like encoder"
        )
    return {name: int(token_id) for name, token_id in ids.items()}


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """SHA-256 of what decides the ids: equal for the same tokenizer in two folders.

    That is the vocabulary, the special ids, a BPE model's merges, and the ids of `PROBE`, which
    stand for normaliser and pre-tokenizer: their settings can be written in several ways.
    """
    settings = encoder_settings(tokenizer)
    known = {
        "vocab": sorted(tokenizer.get_vocab().items()),
        "special": special_ids(tokenizer),
        "merges": json.loads(settings[0])["model"].get("merges"),
        "probe": TextEncoder(*settings).encode([PROBE])[0].tolist(),
    }
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


class TextEncoder:
    """Turns pieces of text into token ids, without special tokens; built from `settings`.

    A literal `[SEP]` in the text stays text: it never becomes the special id.
    """

    def __init__(self, tokenizer_json: str, forbidden: dict[str, int]) -> None:
        self._tokenizer = Tokenizer.from_str(tokenizer_json)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        self._forbidden = forbidden
        self._forbidden_ids = np.array(sorted(forbidden.values()))

    def ids(self, pieces: list[str]) -> list[list[int]]:
        """What the tokenizer itself gives for each piece.

        Raises:
            InputError: it cannot, as one that lacks its own unknown token.
        """
        try:
            found = self._tokenizer.encode_batch_fast(pieces, add_special_tokens=False)
        except Exception as error:  # the library raises a bare one
            reason = str(error).partition("\n")[0]
            raise InputError(f"the tokenizer is damaged ({reason}); fetch it again") from error
        return [one.ids for one in found]

    def encode(self, pieces: list[str]) -> list[np.ndarray]:
        """The ids, int32, of each piece: views of one array."""
        found = self.ids(pieces)
        ends = list(accumulate(map(len, found), initial=0))
        together = np.fromiter(chain.from_iterable(found), np.int32, ends[-1])
        encoded = [together[start:end] for start, end in pairwise(ends)]
        if np.isin(together, self._forbidden_ids).any():
            for place, ids in enumerate(encoded):
                if np.isin(ids, self._forbidden_ids).any():
                    encoded[place] = self._encode_apart(pieces[place])
        return encoded

    def _encode_apart(self, piece: str) -> np.ndarray:
        """A model whose own vocabulary matches the literal: a blank inside it keeps it text.

        The literal may appear only in normalised text (full-width under NFKC). What a normaliser
        joins again in spite of the blank is left out.
        """
        ids = self._encode_broken(piece)
        if np.isin(ids, self._forbidden_ids).any() and self._tokenizer.normalizer is not None:
            ids = self._encode_broken(self._tokenizer.normalizer.normalize_str(piece))
        return ids[~np.isin(ids, self._forbidden_ids)]

    def _encode_broken(self, piece: str) -> np.ndarray:
        for token in sorted(self._forbidden, key=len, reverse=True):
            piece = piece.replace(token, f"{token[:1]} {token[1:]}")
        ids = self._tokenizer.encode(piece, add_special_tokens=False).ids
        return np.array(ids, dtype=np.int32)


PARAGRAPHS = "A first paragraph, short.\n\n Another one:\nits second line, and a longword. The end."
PROBE = (
    f"{PARAGRAPHS} MiXeD Case, naïve Été, e\u0301 and ẞ; don't… 1,234.50 — (x_y) ＦＵＬＬ ﬁn "
    "日本語 한국어 русский 😀\u00a0tab\there  two\r\n"
)


def pieces_change_tokens(encoder: TextEncoder) -> bool:
    """Whether paragraphs tokenised apart differ from the whole text, as with a prefixed blank."""
    pieces = re.split(r"(?<=\S)(?=\s)", PARAGRAPHS)
    whole = encoder.encode([PARAGRAPHS])[0]
    return np.concatenate(encoder.encode(pieces)).tolist() != whole.tolist()


def vocabulary_size(tokenizer: Any) -> int:
    """The number of rows an embedding needs: the largest id plus one (ids may have gaps)."""
    return max(len(tokenizer), max(tokenizer.get_vocab().values()) + 1)


def encoder_settings(tokenizer: Any) -> EncoderSettings:
    """What a `TextEncoder` is built from, in any process.

    The unknown token is not forbidden: it is what unknown text becomes.
    """
    tokens = set(tokenizer.all_special_tokens) - {tokenizer.unk_token}
    forbidden = {token: tokenizer.convert_tokens_to_ids(token) for token in tokens}
    return tokenizer.backend_tokenizer.to_str(), forbidden


def train_tokenizer(texts: Callable[[], Iterable[str]], vocab_size: int, folder: Path) -> Any:
    """Learn a lower-case BERT WordPiece tokenizer and keep it in `folder`.

    `texts` is read twice, in order, in constant memory. The library numbers the letters of a
    vocabulary, and so breaks ties, in an order that changes from run to run; counting them first
    and giving them to it in order makes the vocabulary a function of the text.

    Raises:
        InputError: `vocab_size` is too small for the letters alone, or there is no text.
    """
    if not 200 <= vocab_size <= LARGEST_VOCABULARY:
        raise InputError(
            f"--train_tokenizer is {vocab_size}; give 200 or more, at most {LARGEST_VOCABULARY} "
            "(BERT has 30522)"
        )
    model = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    model.normalizer = normalizers.BertNormalizer(lowercase=True)
    model.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    letters = _frequent_letters(
        model.normalizer, texts(), limit=max(60, min(1000, vocab_size // 16))
    )
    if not letters:
        raise InputError("--train_tokenizer found no text; the corpus is empty: give documents")
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=BERT_SPECIAL_TOKENS + [f"##{letter}" for letter in letters],
        initial_alphabet=letters,
        limit_alphabet=len(letters),
        show_progress=False,
    )
    model.train_from_iterator(texts(), trainer)
    vocabulary = model.get_vocab()
    with whole_folder(folder) as beside:
        lines = "".join(f"{token}\n" for token in sorted(vocabulary, key=vocabulary.__getitem__))
        (beside / "vocab.txt").write_text(lines, encoding="utf-8")
        config = {"tokenizer_class": "BertTokenizer", "do_lower_case": True}
        write_json(beside / "tokenizer_config.json", config | {"model_max_length": 512})
    return load_tokenizer(folder)


def _frequent_letters(normalizer: Any, texts: Iterable[str], limit: int) -> list[str]:
    """The most frequent characters of normalised text, sorted; BERT too keeps 1,000."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(normalizer.normalize_str(text))
    letters = [letter for letter in counts if not letter.isspace()]
    return sorted(sorted(letters, key=lambda letter: (-counts[letter], letter))[:limit])
