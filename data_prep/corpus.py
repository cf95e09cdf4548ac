"""The corpus: inputs become sources, and sources one stream of pieces of documents.

A document's leading and trailing whitespace is dropped. It is cut into pieces that are tokenised
apart: behind paragraphs, in long ones at blanks, so that the tokens are those of the whole
document and memory stays bounded.
"""

import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from data_prep.readers import (
    DatasetName,
    Fragment,
    ReadOptions,
    read_dataset,
    read_json_lines,
    read_parquet,
    read_text,
)
from potstill.errors import InputError
from potstill.secrets import redacted
from potstill.text import fits_a_line

READERS = {".txt": read_text, ".jsonl": read_json_lines, ".json": read_json_lines}
KINDS = ".txt, .jsonl, .json (each also .gz or .zst) or .parquet"
PIECE_CHARACTERS = 500  # a piece ends at the first paragraph end behind this many characters,
LONGEST_PIECE = 16_000  # or at the last blank before this many
# Cuts lie before a run of whitespace: no usual pre-tokenizer joins a word with what follows it.
_BLANK = re.compile(r".*\S(?=[ \n\t])", re.DOTALL)


@dataclass(frozen=True)
class Source:
    """A file or data set; `name` is what the user wrote, `kind` its extension or `dataset`."""

    name: str
    kind: str
    path: Path | None = None
    dataset: DatasetName | None = None

    def __post_init__(self) -> None:
        check_name(self.name)

    def fragments(self, options: ReadOptions) -> Iterator[Fragment]:
        """The source's documents as fragments, in order."""
        if self.dataset is not None:
            return read_dataset(self.dataset, options)
        assert self.path is not None
        if self.kind == ".parquet":
            return read_parquet(self.path, options)
        return READERS[self.kind](self.path, options)

    def identity(self) -> dict[str, Any]:
        """What tells whether the source is still the same: for the settings of a run."""
        files = [self.path] if self.path else []
        if self.dataset is not None and Path(self.dataset.name).is_dir():
            files = visible_files(Path(self.dataset.name))
        stats = [(str(path.resolve()), path.stat()) for path in files if path]
        return {
            "name": self.name,
            "dataset": redacted(list(vars(self.dataset).values())) if self.dataset else None,
            "files": [[path, stat.st_size, stat.st_mtime_ns] for path, stat in stats],
        }


def check_name(name: str) -> None:
    """Refuse a name that a manifest or a message in one line cannot hold.

    Raises:
        InputError: it is empty, not UTF-8, or has a newline or another control character.
    """
    if not name or not fits_a_line(name):
        raise InputError(f"{name!r} is empty, not UTF-8 or has a control character; rename it")


def find_sources(inputs: list[str]) -> list[Source]:
    """The sources of `--input`: files in the order given, folders as their files, sorted.

    Raises:
        InputError: a missing path, a kind that cannot be read, a folder without a readable file.
    """
    sources = []
    for given in inputs:
        path = Path(given)
        if path.is_dir():
            inside = [p for p in visible_files(path) if is_text(p)]
            if not inside:
                raise InputError(f"--input {given} has no file of a kind that is read: {KINDS}")
            sources += [_source(str(p), p) for p in inside]
        elif path.exists():
            sources.append(_source(given, path))
        else:
            raise InputError(f"--input {given} does not exist; give a file or a folder")
    return sources


def check_apart(inputs: list[str], output: Path) -> None:
    """Refuse an output that a later run would take for corpus, and a corpus inside the output.

    Raises:
        InputError: `output` lies in a folder of `inputs`, is one, or holds one.
    """
    place = Path(os.path.realpath(output))  # unlike `resolve`, it takes circles of links
    for folder in filter(Path.is_dir, map(Path, inputs)):
        for found in map(Path, _walk(folder)):  # folders behind links too
            if found in (place, *place.parents):
                raise InputError(f"--output {output} lies inside the input {folder}; give another")
            if place in found.parents:
                raise InputError(f"the input {folder} lies inside --output {output}; give another")


def _kind_of(path: Path) -> str:
    """`.txt` of `a.txt.gz`; empty where nothing reads it."""
    suffix = path.suffix if path.suffix not in (".gz", ".zst") else Path(path.stem).suffix
    return suffix if suffix in (*READERS, ".parquet") else ""


def is_text(path: Path) -> bool:
    """Whether a file's name is of a kind that is read as text."""
    return bool(_kind_of(path))


def visible_files(folder: Path) -> list[Path]:
    """The files in a folder and its sub-folders, sorted, without hidden files and folders.

    Links are followed; a folder that is reached twice, as in a circle, counts once.
    """
    return sorted(path for paths in _walk(folder).values() for path in paths if path.is_file())


def _walk(folder: Path) -> dict[str, list[Path]]:
    """What stands in a folder and its visible sub-folders, by the folders' real paths.

    Raises:
        OSError: a sub-folder cannot be read.
    """
    found: dict[str, list[Path]] = {}
    for place, folders, names in os.walk(folder, followlinks=True, onerror=_fail):
        real = os.path.realpath(place)
        if real in found:
            folders.clear()  # not entered a second time
            continue
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found[real] = [Path(place, name) for name in names if not name.startswith(".")]
    return found


def _fail(error: OSError) -> None:
    raise error


def _source(name: str, path: Path) -> Source:
    kind = _kind_of(path)
    if not kind:
        raise InputError(f"--input {name} is of no kind that is read: {KINDS}")
    if not path.is_file():
        raise InputError(f"--input {name} is no regular file; write it to one first")
    if kind == ".parquet" and path.suffix != ".parquet":
        raise InputError(
            f"--input {name} is compressed Parquet, which cannot be read in pieces (Parquet "
            "compresses inside); decompress it first"
        )
    return Source(name, kind, path=path)


def probe(sources: list[Source], options: ReadOptions) -> None:
    """Read the head of every source, so that most bad input is found before long work.

    Raises:
        InputError: as the readers do.
    """
    for source in sources:
        next(source.fragments(options), None)


@dataclass(frozen=True)
class Position:
    """A place in the corpus: `pieces` of the source with number `source` lie before it.

    `digest` is a SHA-256 over those pieces: it tells whether they are still the same.
    """

    source: int = 0
    pieces: int = 0
    digest: str = ""

    def behind(self, source: int, fragment: Fragment) -> "Position":
        """The place behind the next piece, which may be the first of another source."""
        before = self if self.source == source else Position(source)
        told = f"{before.digest}{fragment.ends}{fragment.text}".encode()
        return Position(source, before.pieces + 1, hashlib.sha256(told).hexdigest())


class Piece(NamedTuple):
    """Text that is tokenised at once; `position` is the place behind it."""

    text: str
    ends: bool
    bad: int
    position: Position


def read_pieces(sources: list[Source], options: ReadOptions, start: Position) -> Iterator[Piece]:
    """All pieces behind `start`, in order; sources that lie before it are not opened.

    Raises:
        InputError: as the readers do; or what lies before `start` in its source has changed.
    """
    place, passed = Position(start.source), start.pieces == 0
    for number in range(start.source, len(sources)):
        for fragment in cut_fragments(sources[number].fragments(options)):
            place = place.behind(number, fragment)
            if passed:
                yield Piece(fragment.text, fragment.ends, fragment.bad, place)
            elif place.pieces == start.pieces:
                if place != start:
                    raise _changed(sources[number])
                passed = True
        if not passed:
            raise _changed(sources[number])


def _changed(source: Source) -> InputError:
    return InputError(
        f"{source.name} has changed in the part that is sharded already; restore it and run the "
        "same command again, or shard into another folder"
    )


def cut_fragments(fragments: Iterator[Fragment]) -> Iterator[Fragment]:
    """Documents in fragments of any size become documents in pieces of a good size.

    The cuts depend on the documents only, never on how they came. Documents without text vanish.
    """
    held, bad = "", 0
    for fragment in fragments:
        bad += fragment.bad
        held = held + fragment.text if held else fragment.text.lstrip()
        start = 0
        while (end := _cut(held, start)) > start:
            yield Fragment(held[start:end], ends=False)
            start = end
        held = held[start:]
        if fragment.ends and (held or bad):
            yield Fragment(held.rstrip(), ends=True, bad=bad)
            held, bad = "", 0
    if bad:
        yield Fragment("", ends=False, bad=bad)


def _cut(text: str, start: int) -> int:
    """Where the piece that begins at `start` ends; `start` while that is not known yet."""
    limit = start + LONGEST_PIECE
    end = _paragraph_end(text, start + PIECE_CHARACTERS, limit)
    if end is not None:
        return end
    if len(text) <= limit:
        return start
    blank = _BLANK.match(text, start, limit)
    return blank.end() if blank else limit


def _paragraph_end(text: str, start: int, limit: int) -> int | None:
    """The first place in [start, limit) behind a word where only blanks come before a newline."""
    newline = text.find("\n", start, limit)
    while newline >= 0:
        end = newline
        while end > start and text[end - 1] in " \t\r\f\v":
            end -= 1
        if not text[end - 1].isspace():
            return end
        newline = text.find("\n", newline + 1, limit)
    return None
