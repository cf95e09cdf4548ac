"""The demo's labelled task: from which library does the first sentence of a docstring come?

Three modules in ten of the libraries in LABELS are kept for the task. No module is in two of the
three parts (pretraining, training rows, validation rows), and no sentence either.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

from examples.demo.prose import Document, first_sentence
from potstill.files import write_text

LABELS = ("matplotlib", "pandas", "python", "scipy", "torch", "transformers")
TRAIN_ROWS, VALIDATION_ROWS = 20, 150  # a label; few rows, where pretraining matters
WORDS = range(5, 41)  # of a sentence


def part_of(document: Document) -> str:
    """What a document is for: `pretraining`, `train` or `validation`; a function of its path."""
    if document.source not in LABELS:
        return "pretraining"
    bucket = int(hashlib.sha1(document.id.encode()).hexdigest(), 16) % 10
    return {0: "train", 1: "train", 2: "validation"}.get(bucket, "pretraining")


def split(documents: Iterable[Document]) -> dict[str, list[Document]]:
    """The documents by what they are for."""
    parts: dict[str, list[Document]] = {"pretraining": [], "train": [], "validation": []}
    for document in documents:
        parts[part_of(document)].append(document)
    return parts


def corpus_lines(documents: Iterable[Document]) -> str:
    """The pretraining documents as JSON lines with `id`, `title` and `text`."""
    rows = ({"id": d.id, "title": d.source, "text": d.text} for d in documents)
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def task_rows(
    documents: Iterable[Document], taken: set[str], rows_per_label: int
) -> list[dict[str, str]]:
    """Balanced rows `{"sentence": …, "label": library}`; adds their sentences to `taken`.

    Rows are chosen by the hash of the sentence, which spreads them over the modules; there are
    fewer than asked for if the poorest library has fewer.
    """
    sentences: dict[str, list[str]] = defaultdict(list)
    for label, sentence in candidates(documents):
        if sentence not in taken:
            taken.add(sentence)
            sentences[label].append(sentence)
    count = min(rows_per_label, *(len(sentences[label]) for label in LABELS))
    rows = [
        {"sentence": sentence, "label": label}
        for label in LABELS
        for sentence in sorted(sentences[label], key=shuffled)[:count]
    ]
    return sorted(rows, key=lambda row: shuffled(row["sentence"]))


def candidates(documents: Iterable[Document]) -> Iterator[tuple[str, str]]:
    """(label, sentence) of every docstring; a library that a sentence names is taken out of it."""
    for document in documents:
        for text in document.docstrings:
            words = first_sentence(text).split()
            kept = " ".join(word for word in words if document.source not in word.lower())
            if len(words) in WORDS:
                yield document.source, kept


def shuffled(sentence: str) -> str:
    """A sort key without meaning, the same on every machine."""
    return hashlib.sha1(sentence.encode()).hexdigest()


def write_task(documents: Iterable[Document], folder: Path) -> dict[str, int]:
    """Write corpus.jsonl, train.jsonl and validation.jsonl; returns their numbers of rows."""
    parts = split(documents)
    taken = {sentence for _, sentence in candidates(parts["pretraining"])}
    write_text(folder / "corpus.jsonl", corpus_lines(parts["pretraining"]))
    counts = {"corpus": len(parts["pretraining"])}
    for part, rows_per_label in (("train", TRAIN_ROWS), ("validation", VALIDATION_ROWS)):
        rows = task_rows(parts[part], taken, rows_per_label)
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_text(folder / f"{part}.jsonl", lines)
        counts[part] = len(rows)
    return counts
