"""One pipeline from text to training data, timed; `benchmarks/shards.py` starts it.

    python benchmarks/text_pipelines.py ours --input a.txt --tokenizer T --output DIR

`ours` is the sharder; `run_mlm` is Hugging Face's script (`datasets.map` with the same tokenizer,
`group_texts`); `static_mask` is what the scripts of academic-budget BERT and NVIDIA do (Python
loops over sentences, masks drawn once, gzip HDF5) with the tokenizer of transformers 5, which is
`tokenizers` inside; `python_tokenizer` is the same with BERT's tokenizer in Python, as those
scripts had it when they were released. The peers are written here, after their ways.
The import of libraries is not timed. It stands apart because worker processes import it again.
"""

import argparse
import json
import random
import re
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.corpus import find_sources
from data_prep.engines import TokieEncoder
from data_prep.journal import Journal
from data_prep.readers import ReadOptions
from data_prep.sharding import Sharder, ShardPlan
from data_prep.tokenization import TextEncoder, load_tokenizer

LENGTH, MOST_MASKED, PROBABILITY = 128, 20, 0.15
Masked = tuple[list[str], list[int], list[str]]  # tokens of a row, positions, labels
READ_AT_ONCE = 1 << 18  # characters, where only tokens are counted
Count = Callable[[], int]  # body tokens that a pipeline kept; counted when its time is taken
SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


@contextmanager
def stopwatch(owner: type, name: str) -> Iterator[list[float]]:
    """The processor seconds spent inside a method, one entry a call."""
    seconds: list[float] = []
    wrapped = getattr(owner, name)

    def timed(*arguments: Any) -> Any:
        started = time.process_time()
        result = wrapped(*arguments)
        seconds.append(time.process_time() - started)
        return result

    setattr(owner, name, timed)
    try:
        yield seconds
    finally:
        setattr(owner, name, wrapped)


def shard_with(engine: str, path: Path, tokenizer: Any, output: Path, workers: int) -> Count:
    """The sharder, as its program runs it."""
    journal = Journal(output)
    journal.begin({})
    sharder = Sharder(journal, ShardPlan(), find_sources([str(path)]), ReadOptions(), tokenizer)
    manifest = sharder.run(workers, engine)[0]
    splits = [size for size in manifest.splits.values() if size.rows]
    separators = manifest.documents - len(splits)
    return lambda: sum(size.tokens - 2 * size.rows for size in splits) - separators


def map_and_group(path: Path, tokenizer: Any, output: Path) -> Count:
    """Hugging Face's run_mlm: tokenise lines, join a thousand, cut into rows, drop the rest."""
    import datasets

    def tokenize(examples: dict[str, list[str]]) -> Any:
        return tokenizer(examples["text"], return_special_tokens_mask=True)

    def group_texts(examples: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        together = {name: [v for row in rows for v in row] for name, rows in examples.items()}
        total = len(together["input_ids"]) // LENGTH * LENGTH
        return {
            name: [values[i : i + LENGTH] for i in range(0, total, LENGTH)]
            for name, values in together.items()
        }

    lines = datasets.load_dataset(
        "text", data_files=str(path), split="train", cache_dir=str(output / "cache")
    )
    tokenized = lines.map(tokenize, batched=True, remove_columns=["text"])
    file = output / "rows" / "grouped.arrow"
    file.parent.mkdir()
    grouped = tokenized.map(group_texts, batched=True, cache_file_name=str(file))
    return lambda: sum(LENGTH - sum(row) for row in grouped["special_tokens_mask"])


def sentences(path: Path) -> Iterator[list[str]]:
    """The sentences of each document: what a sentence splitter makes of blocks of lines."""
    document: list[str] = []
    with open(path, encoding="utf-8") as file:
        for line in file:
            if line.strip():
                document += SENTENCE_END.split(line.strip())
            elif document:
                yield document
                document = []
    if document:
        yield document


def mask_tokens(tokens: list[str], words: list[str], draw: random.Random) -> Masked:
    """BERT's masks, drawn once: the row with masks, positions, labels."""
    candidates = []
    for place, token in enumerate(tokens):
        if token not in ("[CLS]", "[SEP]"):
            candidates.append(place)
    draw.shuffle(candidates)
    masked, chosen = list(tokens), []
    for place in candidates[: min(MOST_MASKED, max(1, round(len(tokens) * PROBABILITY)))]:
        if draw.random() < 0.8:
            masked[place] = "[MASK]"
        elif draw.random() < 0.5:
            masked[place] = words[draw.randint(0, len(words) - 1)]
        chosen.append((place, tokens[place]))
    chosen.sort()
    return masked, [place for place, _ in chosen], [token for _, token in chosen]


def rows_of(document: list[list[str]]) -> Iterator[list[str]]:
    """Whole sentences gathered until a row is full; what is too much is cut away."""
    held: list[str] = []
    for number, tokens in enumerate(document):
        held += tokens
        if held and (len(held) >= LENGTH - 2 or number == len(document) - 1):
            yield ["[CLS]", *held[: LENGTH - 2], "[SEP]"]
            held = []


def static_mask(path: Path, tokenizer: Any, output: Path) -> Count:
    """The scripts' way: sentences tokenised one by one, packed, shuffled, masked, gzip."""
    draw, words = random.Random(0), list(tokenizer.get_vocab())
    read = [[tokenizer.tokenize(one) for one in document] for document in sentences(path)]
    draw.shuffle(read)
    rows = [mask_tokens(row, words, draw) for document in read for row in rows_of(document)]
    draw.shuffle(rows)
    output.mkdir(parents=True)
    return write_gzip(output / "rows.hdf5", rows, tokenizer)


def write_gzip(path: Path, rows: list[Masked], tokenizer: Any) -> Count:
    """The scripts' file."""
    import h5py

    ids, valid = (np.zeros((len(rows), LENGTH), np.int32) for _ in range(2))
    places, labels = (np.zeros((len(rows), MOST_MASKED), np.int32) for _ in range(2))
    for number, (tokens, where, what) in enumerate(rows):
        ids[number, : len(tokens)] = tokenizer.convert_tokens_to_ids(tokens)
        valid[number, : len(tokens)] = 1
        places[number, : len(where)] = where
        labels[number, : len(what)] = tokenizer.convert_tokens_to_ids(what)
    arrays = {
        "input_ids": (ids, "i4"),
        "input_mask": (valid, "i1"),
        "segment_ids": (np.zeros_like(valid), "i1"),
        "masked_lm_positions": (places, "i4"),
        "masked_lm_ids": (labels, "i4"),
    }
    with h5py.File(path, "w") as file:
        for name, (values, kind) in arrays.items():
            file.create_dataset(name, data=values, dtype=kind, compression="gzip")
    return lambda: int(valid.sum()) - 2 * len(rows)


def python_tokenizer(tokenizer: Any, file: Path) -> Any:
    """BERT's tokenizer in Python, with the same vocabulary."""
    from transformers.models.bert.tokenization_bert_legacy import BertTokenizerLegacy

    vocabulary = tokenizer.get_vocab()
    lines = "".join(f"{token}\n" for token in sorted(vocabulary, key=vocabulary.__getitem__))
    file.write_text(lines, encoding="utf-8")
    return BertTokenizerLegacy(str(file))


def count_body_tokens(path: Path, tokenizer: Any) -> int:
    """Tokens of the text without special ones: lines tokenised apart, as nothing joins them."""
    with open(path, encoding="utf-8") as file:
        batches = iter(lambda: file.readlines(READ_AT_ONCE), [])
        encode = tokenizer.backend_tokenizer.encode_batch_fast
        found = (encode(lines, add_special_tokens=False) for lines in batches)
        return sum(len(one) for lines in found for one in lines)


def processor_seconds() -> float:
    """Of this process and of its finished children."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def bytes_on_disk(output: Path) -> int:
    """What training reads: shards, Arrow or HDF5 files; no caches, no tokenizer."""
    files = [*output.glob("*.h5"), *output.glob("rows*/*.arrow"), *output.glob("rows.hdf5")]
    return sum(file.stat().st_size for file in files)


def run(name: str, path: Path, tokenizer: Any, output: Path, workers: int) -> Count:
    """A pipeline's whole work."""
    if name == "run_mlm":
        return map_and_group(path, tokenizer, output)
    if name in ("static_mask", "python_tokenizer"):
        return static_mask(path, tokenizer, output)
    engine = "tokie" if name == "ours_tokie" else "tokenizers"
    return shard_with(engine, path, tokenizer, output, workers)


def measure(name: str, path: Path, tokenizer: Any, output: Path, workers: int) -> dict[str, float]:
    """The figures of a pipeline: seconds, those inside the tokenizer, bytes, body tokens kept."""
    if name == "count":
        return {"tokens": count_body_tokens(path, tokenizer)}
    if name == "run_mlm":
        import datasets

        datasets.disable_progress_bars()
    if name == "python_tokenizer":
        tokenizer = python_tokenizer(tokenizer, output.with_suffix(".txt"))
    with stopwatch(TokieEncoder if name == "ours_tokie" else TextEncoder, "ids") as inside:
        before, started = processor_seconds(), time.perf_counter()
        count = run(name, path, tokenizer, output, workers)
        wall, seconds = time.perf_counter() - started, processor_seconds() - before
    return {
        "wall_seconds": wall,
        "processor_seconds": seconds,
        "tokenizer_seconds": sum(inside),
        "bytes": bytes_on_disk(output),
        "kept": count(),
    }


def main() -> None:
    """Run one pipeline and print its figures as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    names = ("ours", "ours_tokie", "run_mlm", "static_mask", "python_tokenizer", "count")
    parser.add_argument("pipeline", choices=names)
    parser.add_argument("--input", type=Path, required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=1)
    args = parser.parse_args()
    tokenizer = load_tokenizer(args.tokenizer)
    print(json.dumps(measure(args.pipeline, args.input, tokenizer, args.output, args.workers)))


if __name__ == "__main__":
    main()
