"""How fast the sharder is on one core, and how much of its time is not the tokenizer's.

    python benchmarks/sharding.py --input corpus/ --tokenizer bert-base-uncased --json

Times are of the processor, so that other work on the machine counts less.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

from data_prep.corpus import find_sources
from data_prep.journal import Journal
from data_prep.readers import ReadOptions
from data_prep.sharding import Sharder, ShardPlan
from data_prep.tokenization import TextEncoder, load_tokenizer
from potstill.console import program, say


class Stopwatch:
    """Wraps `TextEncoder.encode` to add up the processor seconds spent inside."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._encode = TextEncoder.encode

    def __call__(self, encoder: TextEncoder, pieces: list[str]) -> list:
        started = time.process_time()
        encoded = self._encode(encoder, pieces)
        self.seconds += time.process_time() - started
        return encoded


@program
def main() -> None:
    """Shard the input into a temporary folder with one worker and print the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--input", nargs="+", required=True, help="as for data_prep/shard.py")
    parser.add_argument("--tokenizer", required=True, help="as for data_prep/shard.py")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    sources, tokenizer = find_sources(args.input), load_tokenizer(args.tokenizer)
    watch = Stopwatch()
    TextEncoder.encode = lambda encoder, pieces: watch(encoder, pieces)  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        journal = Journal(Path(folder) / "shards")
        journal.begin({})
        sharder = Sharder(journal, ShardPlan(), sources, ReadOptions(), tokenizer)
        started = time.process_time()
        _, tokens, wall = sharder.run(workers=1)
        seconds = time.process_time() - started
    figures = {
        "tokens": tokens,
        "wall_seconds": round(wall, 2),
        "processor_seconds": round(seconds, 2),
        "tokens_per_processor_second": round(tokens / seconds),
        "share_outside_tokenizer": round(1 - watch.seconds / seconds, 4),
    }
    if args.json:
        print(json.dumps(figures))
    else:
        for name, value in figures.items():
            say(f"{name:<28} {value:>14,}")


if __name__ == "__main__":
    main()
