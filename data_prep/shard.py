"""Shard a corpus: text in, HDF5 files of full token rows out.

python data_prep/shard.py --input corpus/ --tokenizer bert-base-uncased --output shards/
"""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data_prep.corpus import (
    Position,
    Source,
    check_apart,
    check_name,
    find_sources,
    probe,
    read_pieces,
)
from data_prep.engines import ENGINES, check_engine, check_installed
from data_prep.journal import Journal
from data_prep.legacy_shards import Converter, find_legacy
from data_prep.readers import DatasetName, ReadOptions
from data_prep.shard_format import TRAIN, VALIDATION, Manifest, read_manifest, verify_files
from data_prep.sharding import Sharder, ShardPlan, settings_of
from data_prep.tokenization import (
    TextEncoder,
    encoder_settings,
    load_tokenizer,
    pieces_change_tokens,
    tokenizer_fingerprint,
    train_tokenizer,
)
from potstill.console import program, progress, say
from potstill.errors import InputError, PotstillError
from potstill.signals import Signalled, Stopped, raised_signals

INPUTS = (
    ".txt .jsonl .json .parquet, or folders of them; or HDF5 shards of academic-budget BERT's or "
    "NVIDIA's scripts, whose masks are undone"
)
KEPT = "finished shards are kept: run the same command again to go on"
MOST_WORKERS = 1024
LISTED_SOURCES = 20  # --info stays on a screen
EXAMPLES = """\
examples:
  python data_prep/shard.py --input books/ wiki.jsonl.zst --tokenizer bert-base-uncased \\
      --output shards/
  python data_prep/shard.py --input notes.txt --train_tokenizer 8000 --output shards/
  python data_prep/shard.py --dataset wikimedia/wikipedia --dataset_config 20231101.en \\
      --tokenizer bert-base-uncased --output shards/
  python data_prep/shard.py --info shards/
A run that was stopped goes on when the same command is given again.
"""


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line; argparse itself answers bad usage with exit status 2."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    add = what.add_argument
    add("--input", nargs="+", metavar="PATH", help=INPUTS)
    add("--dataset", metavar="NAME", help="a Hugging Face data set: hub name or local folder")
    add("--verify", metavar="DIR", type=Path, help="check every file against the manifest")
    add("--info", metavar="DIR", type=Path, help="rows, tokens, padding, tokenizer, sources")
    add = parser.add_argument
    add("--dataset_config", metavar="C", help="the data set's configuration, e.g. 20231101.en")
    add("--split", default="train", help="the data set's split (default: train)")
    add("--text_column", default="text", help="field with the text (default: text)")
    add(
        "--document_per_file",
        action="store_true",
        help="a .txt file is one document; else a blank line ends a document",
    )
    add(
        "--on_bad_text",
        choices=("stop", "skip"),
        default="stop",
        help="at text that is not "
        "UTF-8: stop with its place (default), or leave the line out and count it",
    )
    words = parser.add_mutually_exclusive_group()
    words.add_argument("--tokenizer", metavar="NAME_OR_DIR", help="a fast Hugging Face tokenizer")
    words.add_argument(
        "--train_tokenizer",
        type=int,
        metavar="V",
        help="learn a lower-case BERT "
        "WordPiece vocabulary of V tokens from the corpus (30522 in BERT)",
    )
    add(
        "--engine",
        choices=ENGINES,
        default=ENGINES[0],
        help="what tokenises: tokenizers (default), or tokie, about three times faster for BERT's "
        "WordPiece and the same to the token; the shards do not depend on it",
    )
    add("--output", type=Path, metavar="DIR", help="a folder of its own for the shards")
    add(
        "--seq_length",
        type=int,
        default=128,
        help="tokens a row, with [CLS] and [SEP] (default: 128)",
    )
    add(
        "--validation_fraction",
        type=float,
        default=0.005,
        help="share of documents held out; "
        "with two documents or more at least one; 0: none (default: 0.005)",
    )
    add("--rows_per_shard", type=int, default=65_536, help="rows of a file (default: 65536)")
    add("--seed", type=int, default=0, help="chooses the validation documents (default: 0)")
    add(
        "--workers",
        type=int,
        default=len(os.sched_getaffinity(0)),
        help="processes that tokenise text; the shards do not depend on it (default: all cores)",
    )
    args = parser.parse_args(arguments)
    if useless := useless_flags(args, parser):
        parser.error(f"--{useless[0]} does nothing here; leave it out")
    return args


def useless_flags(args: argparse.Namespace, parser: argparse.ArgumentParser) -> list[str]:
    """Flags that were given and would be passed over."""
    given = {name for name, value in vars(args).items() if value != parser.get_default(name)}
    if args.info or args.verify:
        return sorted(given - {"info", "verify"})
    return sorted(given & {"dataset_config", "split"}) if args.input else []


@program
def main(arguments: Sequence[str] | None = None) -> None:
    """Do what the command line says."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    for word in words:
        check_name(word)
    args = parse(words)
    try:
        with raised_signals():
            if args.info or args.verify:
                look(args)
            else:
                shard(args)
    except Signalled as signalled:
        raise Stopped(signalled.number, KEPT) from None


def look(args: argparse.Namespace) -> None:
    """Check or describe a folder of shards."""
    folder = args.info or args.verify
    manifest = read_manifest(folder)
    if args.verify:
        verify_files(folder, manifest, manifest.files + manifest.tokenizer_files)
        say(f"{folder}: {len(manifest.files)} shards and the tokenizer are as written")
    else:
        describe(folder, manifest)


def shard(args: argparse.Namespace) -> None:
    """Shard a corpus, or go on with a run that was stopped."""
    if args.output is None:
        raise InputError("--output is missing; give a folder for the shards")
    if args.tokenizer is None and args.train_tokenizer is None:
        raise InputError("give --tokenizer NAME_OR_DIR, or --train_tokenizer 30522 to learn one")
    if not 1 <= args.workers <= MOST_WORKERS:
        raise InputError(f"--workers is {args.workers}; give 1 or more, at most {MOST_WORKERS}")
    plan = ShardPlan(args.seq_length, args.validation_fraction, args.rows_per_shard, args.seed)
    options = ReadOptions(args.text_column, args.document_per_file, args.on_bad_text)
    check_installed(args.engine)
    check_apart(args.input or [args.dataset], args.output)
    if args.input and (older := find_legacy(args.input)):
        convert(args, plan, older)
        return
    sources = sources_of(args)
    probe(sources, options)
    tokenizer = None if args.tokenizer is None else load_tokenizer(args.tokenizer)
    journal = Journal(args.output)
    settings = settings_of(plan, sources, options, tokenizer_identity(args, tokenizer))
    complete = f"{args.output} is complete already, with these settings"
    if journal.is_complete(settings):
        journal.close()
        say(complete)
        return
    if tokenizer is not None:
        check_engine(encoder_settings(tokenizer), args.engine)  # refused: nothing is left behind
    try:
        if not journal.begin(settings):
            say(complete)
            return
        if tokenizer is None:
            tokenizer = learned_tokenizer(args.train_tokenizer, journal, sources, options)
            check_engine(encoder_settings(tokenizer), args.engine)
        sharder = Sharder(journal, plan, sources, options, tokenizer)
        if sharder.continues:
            say(f"going on behind {len(sharder.state.shards)} finished shards")
        if pieces_change_tokens(TextEncoder(*encoder_settings(tokenizer))):
            say("note: this tokenizer reads a paragraph differently behind another than on its own")
        manifest, tokens, seconds = sharder.run(args.workers, args.engine)
    except InputError:
        journal.undo()
        raise
    except OSError as error:
        raise PotstillError(
            f"{args.output} cannot be written ({error.strerror or error}); finished shards are "
            "kept: make room and run the same command again"
        ) from error
    finally:
        journal.release()
    describe(args.output, manifest)
    warn_of_split(manifest)
    say(f"{tokens:,} tokens read in {seconds:.1f} s: {tokens / seconds:,.0f} tokens/s")
    say(
        f"next: deepspeed pretrain/run.py --ds_config ds_configs/cpu.json --data {args.output} "
        "--teacher NAME_OR_DIR --objective att-mse --output RUN"
    )


def convert(args: argparse.Namespace, plan: ShardPlan, sources: list[Source]) -> None:
    """Make shards of the older shards of other scripts; see `data_prep.legacy_shards`."""
    refuse_text_flags(args, sources[0])
    if args.tokenizer is None:
        raise InputError(
            f"--input {sources[0].name} holds tokens: --train_tokenizer cannot learn from them; "
            "give the --tokenizer that they were made with"
        )
    tokenizer = load_tokenizer(args.tokenizer)
    journal = Journal(args.output)
    settings = settings_of(plan, sources, ReadOptions(), tokenizer_identity(args, tokenizer))
    complete = f"{args.output} is complete already, with these settings"
    if journal.is_complete(settings):
        journal.close()
        say(complete)
        return
    converter = Converter(journal, plan, sources, tokenizer)
    converter.check()
    try:
        if not journal.begin(settings):
            say(complete)
            return
        manifest, tokens, seconds = converter.run()
    except InputError:
        journal.undo()
        raise
    except Signalled as signalled:
        if converter.state.finished:  # all rows are read: the same command completes the folder
            raise
        nothing = "a conversion is all or nothing, nothing is kept: run the same command again"
        raise Stopped(signalled.number, nothing) from None
    except OSError as error:
        raise PotstillError(
            f"{args.output} cannot be written ({error.strerror or error}); make room and run the "
            "same command again: it begins from the start"
        ) from error
    finally:
        journal.release()
    describe(args.output, manifest)
    if not converter.continues:  # it was stopped after its last row: nothing was read again
        rows = manifest.documents + converter.duplicates
        say(
            f"{rows:,} rows read by one process in {seconds:.1f} s: {rows / seconds:,.0f} rows/s; "
            f"{converter.duplicates:,} were equal to others and left out"
        )


def refuse_text_flags(args: argparse.Namespace, source: Source) -> None:
    """Refuse flags that say how text is read, where there are tokens.

    `--workers` has a default that depends on the machine, and never changes the shards.
    """
    usual = {**vars(ReadOptions()), "engine": ENGINES[0]}
    for name, default in usual.items():
        if getattr(args, name) != default:
            raise InputError(
                f"--{name} is for text, and --input {source.name} holds tokens; leave it out"
            )


def warn_of_split(manifest: Manifest) -> None:
    """Say so where a split by document came out far from what was asked for."""
    train, validation = manifest.splits[TRAIN].tokens, manifest.splits[VALIDATION].tokens
    wanted = manifest.validation_fraction
    if manifest.documents == 1:
        say("one document only: all of it is for training, there are no validation rows")
    elif validation / (train + validation) > max(0.1, 10 * wanted):
        say(
            f"note: the split is by document, and validation holds "
            f"{validation / (train + validation):.0%} of the tokens instead of {wanted:.1%}: "
            "the corpus has few documents, or a very long second one"
        )


def sources_of(args: argparse.Namespace) -> list[Source]:
    """The sources that the command line names."""
    if args.input:
        return find_sources(args.input)
    dataset = DatasetName(args.dataset, args.dataset_config, args.split)
    return [Source(dataset.shown, "dataset", dataset=dataset)]


def tokenizer_identity(args: argparse.Namespace, tokenizer: Any) -> dict[str, Any]:
    """What tells the tokenizer from another in a run's settings; one to be learned by its size."""
    if tokenizer is None:
        return {"train_tokenizer": args.train_tokenizer, "tokenizer_fingerprint": None}
    return {"train_tokenizer": None, "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer)}


def learned_tokenizer(
    vocab_size: int, journal: Journal, sources: list[Source], options: ReadOptions
) -> Any:
    """A tokenizer learned from the corpus, once per output folder."""
    folder = journal.learned_tokenizer
    if folder.exists():
        return load_tokenizer(folder)
    say(f"learning a vocabulary of {vocab_size:,} tokens; the corpus is read twice")

    def texts() -> Iterator[str]:
        pieces = read_pieces(sources, options, Position())
        return (piece.text for piece in progress(pieces, desc="learning", unit=" pieces"))

    tokenizer = train_tokenizer(texts, vocab_size, folder)
    if len(tokenizer) < vocab_size:
        say(f"the corpus gave {len(tokenizer):,} tokens, fewer than asked for")
    return tokenizer


def describe(folder: Path, manifest: Manifest) -> None:
    """Print what a folder of shards holds."""
    say(f"{folder}: {manifest.documents:,} documents, rows of {manifest.seq_length} tokens")
    for split, size in manifest.splits.items():
        share = size.padding / max(1, size.rows * manifest.seq_length)
        files = len(manifest.of_split(split))
        say(
            f"  {split:<10} {size.rows:>12,} rows {size.tokens:>15,} tokens "
            f"{share:8.4%} padding {files:>6,} files"
        )
    say(
        f"  tokenizer  {manifest.vocab_size:,} tokens, fingerprint "
        f"{manifest.tokenizer_fingerprint[:16]}…"
    )
    say(f"  split      seed {manifest.seed}, fraction {manifest.validation_fraction:g}")
    for source in manifest.sources[:LISTED_SOURCES]:
        say(f"  source     {source['name']}: {source['documents']:,} documents")
    if len(manifest.sources) > LISTED_SOURCES:
        say(f"  source     and {len(manifest.sources) - LISTED_SOURCES:,} more")
    if manifest.skipped_texts:
        say(f"  left out   {manifest.skipped_texts:,} texts that are not UTF-8")
    say(f"  packing    {manifest.packing}")


if __name__ == "__main__":
    main()
