"""What tokenises: the `tokenizers` library, or `tokie`, which is faster and gives the same tokens.

Tokie (`pip install 'potstill[tokie]'`) is used only where it was found to agree with `tokenizers`:
version 0.1.4, BERT's WordPiece, characters of the table below. It differs in DEL, characters that
Unicode added lately or has not assigned, a block of rare ideographs, and literal special tokens,
which it always turns into their ids. Text with any other character or with such a literal goes to
`tokenizers`, and before a run both tokenise every character of the table and mixtures of them.
"""

import importlib.metadata
import json
import os
import random
import re
import tempfile
from typing import Any

from data_prep.tokenization import EncoderSettings, TextEncoder
from potstill.errors import InputError

ENGINES = ("tokenizers", "tokie")
TOKIE_VERSION = "0.1.4"
INSTALL_TOKIE = f"pip install tokie=={TOKIE_VERSION}, or use --engine tokenizers"
PROVEN_CHARACTERS = (
    (0x09, 0x0A),
    (0x0D, 0x0D),
    (0x20, 0x7E),  # printable ASCII
    (0xA0, 0x377),  # Latin, phonetic letters, combining accents; the first Greek
    (0x384, 0x38A),
    (0x38C, 0x38C),
    (0x38E, 0x3A1),
    (0x3A3, 0x52F),  # Greek, Cyrillic
    (0x2010, 0x2027),  # dashes, quotation marks, bullets
    (0x2030, 0x205E),
    (0x20A0, 0x20BF),  # currencies
)
CONTEXTS = ("{}", "a{}b", "É {} 1{}2", "{}\u0301.{}")
MIXTURES = 2000


class TokieEncoder(TextEncoder):
    """A `TextEncoder` that leaves usual text to tokie.

    Raises:
        InputError: the tokenizer is of a kind for which tokie is not proven.
    """

    def __init__(self, tokenizer_json: str, forbidden: dict[str, int]) -> None:
        import tokie

        super().__init__(tokenizer_json, forbidden)
        self._unusual = unusual_text(check_kind(tokenizer_json))
        with tempfile.NamedTemporaryFile("w", suffix=".json", encoding="utf-8") as file:
            file.write(tokenizer_json)
            file.flush()
            self._tokie = tokie.Tokenizer.from_json(file.name)
        self._tokie.no_truncation()
        self._tokie.no_padding()

    def is_usual(self, text: str) -> bool:
        """Whether tokie is trusted with this text."""
        return self._unusual.search(text) is None

    def ids(self, pieces: list[str]) -> list[list[int]]:
        """What tokie gives for usual pieces and `tokenizers` for the others."""
        usual = [self.is_usual(piece) for piece in pieces]
        trusted = [piece for piece, fast in zip(pieces, usual, strict=True) if fast]
        others = [piece for piece, fast in zip(pieces, usual, strict=True) if not fast]
        found = self._tokie.encode_batch(trusted, add_special_tokens=False)
        quick, slow = (one.ids for one in found), iter(super().ids(others))
        return [next(quick) if fast else next(slow) for fast in usual]


def build_encoder(settings: EncoderSettings, engine: str = "tokenizers") -> TextEncoder:
    """The encoder of an engine that `check_engine` has accepted; it uses one thread.

    Our processes are the parallelism. Tokie starts its threads once in a process, with the first
    text: the variables must be set before.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["RAYON_NUM_THREADS"] = "1"
    return TokieEncoder(*settings) if engine == "tokie" else TextEncoder(*settings)


def check_installed(engine: str) -> None:
    """Refuse an engine that is missing.

    Raises:
        InputError: tokie is not installed, or of another version than the proven one.
    """
    if engine != "tokie":
        return
    try:
        found = importlib.metadata.version("tokie")
    except importlib.metadata.PackageNotFoundError as error:
        raise InputError(f"--engine tokie is not installed; {INSTALL_TOKIE}") from error
    if found != TOKIE_VERSION:
        raise InputError(
            f"--engine tokie is proven for {TOKIE_VERSION}, not {found}; {INSTALL_TOKIE}"
        )


def check_engine(settings: EncoderSettings, engine: str) -> None:
    """Refuse an engine that gives other tokens for this tokenizer.

    Raises:
        InputError: the tokenizer is of a kind for which tokie is not proven, or a text came out
            differently.
    """
    if engine == "tokie":
        encoder = build_encoder(settings, engine)
        assert isinstance(encoder, TokieEncoder)
        compare(encoder, TextEncoder(*settings), samples())


def compare(encoder: TokieEncoder, reference: TextEncoder, texts: list[str]) -> None:
    """Refuse tokie where it differs from `tokenizers` in a text that it would be trusted with.

    Raises:
        InputError: it differs.
    """
    for text, ours, expected in zip(texts, encoder.ids(texts), reference.ids(texts), strict=True):
        if ours != expected:
            raise InputError(
                f"--engine tokie gives other tokens than tokenizers for {text!r} with this "
                "tokenizer; use --engine tokenizers"
            )


def check_kind(tokenizer_json: str) -> list[str]:
    """The added tokens of a tokenizer of the kind for which tokie is proven, as they are written.

    That is BERT's WordPiece with its normaliser and pre-tokenizer, cased or not, and no added
    tokens but special ones.

    Raises:
        InputError: it is of another kind.
    """
    fields = json.loads(tokenizer_json)
    model, normalizer = fields["model"], fields["normalizer"] or {}
    added = fields["added_tokens"]
    wanted: list[tuple[str, Any, Any]] = [
        ("model", model["type"], "WordPiece"),
        ("prefix of word parts", model.get("continuing_subword_prefix"), "##"),
        ("longest word", model.get("max_input_chars_per_word"), 100),
        ("normalizer", normalizer.get("type"), "BertNormalizer"),
        ("clean_text", normalizer.get("clean_text"), True),
        ("handle_chinese_chars", normalizer.get("handle_chinese_chars"), True),
        ("pre_tokenizer", (fields["pre_tokenizer"] or {}).get("type"), "BertPreTokenizer"),
        ("added tokens that are not special", _odd_words(added), []),
    ]
    lowercase = normalizer.get("lowercase")
    if normalizer.get("strip_accents") is not None:
        wanted.append(("strip_accents", normalizer["strip_accents"], lowercase))
    for name, found, proven in wanted:
        if found != proven:
            raise InputError(
                f"--engine tokie is not proven for this tokenizer ({name}: {found!r}, only "
                f"{proven!r} is); use --engine tokenizers"
            )
    return [token["content"] for token in added]


def _odd_words(added: list[dict[str, Any]]) -> list[str]:
    """Added tokens that are matched in any way but literally in raw text."""
    odd = ("single_word", "lstrip", "rstrip", "normalized")
    return [
        token["content"]
        for token in added
        if not token["special"] or any(token[name] for name in odd)
    ]


def unusual_text(literals: list[str]) -> re.Pattern[str]:
    """Finds a character outside the table, or one of the literals."""
    ranges = "".join(f"{re.escape(chr(a))}-{re.escape(chr(b))}" for a, b in PROVEN_CHARACTERS)
    return re.compile("|".join([f"[^{ranges}]", *map(re.escape, literals)]))


def samples() -> list[str]:
    """Texts for `compare`: every character of the table in several contexts, and mixtures."""
    letters = [chr(c) for first, last in PROVEN_CHARACTERS for c in range(first, last + 1)]
    draw = random.Random(0)
    mixtures = [
        "".join(draw.choices(draw.choice((letters, letters[:98])), k=draw.randrange(2, 60)))
        for _ in range(MIXTURES)
    ]
    long_words = [letter * count for letter in "aé'ж" for count in (99, 100, 101, 300)]
    return [c.format(x, x) for x in letters for c in CONTEXTS] + mixtures + long_words
