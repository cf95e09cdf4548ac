"""Readers: a file or a data set becomes a stream of fragments of documents, in constant memory.

Text is read in lines of at most a mebibyte, JSON lines and Parquet document by document.
"""

import gzip
import io
import itertools
import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import zstandard

from potstill.errors import InputError
from potstill.secrets import redacted

LINE_LIMIT = 1 << 20  # bytes of a line of text taken at once
BOM = b"\xef\xbb\xbf"
DAMAGED = (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError)


class Fragment(NamedTuple):  # one for each line of a corpus: quickly made
    """Some text of a document; `ends`: the document ends behind it; `bad`: texts left out."""

    text: str
    ends: bool
    bad: int = 0


@dataclass(frozen=True)
class ReadOptions:
    """How files are read: the column that holds text, what a document is, what bad text does."""

    text_column: str = "text"
    document_per_file: bool = False
    on_bad_text: str = "stop"


class _ZstdStream(io.RawIOBase):
    """Decompressed bytes of a .zst file; the library's own reader takes a cut file for whole."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "rb")
        self._frame: Any = None
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            data = self._frame.unused_data if self._frame is not None and self._frame.eof else b""
            data = data or self._file.read(1 << 14)
            if not data:
                if self._frame is not None and not self._frame.eof:
                    raise EOFError("the last zstd frame is cut off")
                return 0
            if self._frame is None or self._frame.eof:
                self._frame = zstandard.ZstdDecompressor().decompressobj()
            self._ready = memoryview(self._frame.decompress(data))
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


@contextmanager
def open_bytes(path: Path) -> Iterator[BinaryIO]:
    """The decompressed bytes of a file, plain, .gz or .zst.

    Raises:
        InputError: it cannot be opened or read, or its compression is damaged or cut off.
    """
    openers: dict[str, Callable[[Path], Any]] = {
        ".gz": lambda path: gzip.open(path, "rb"),
        ".zst": lambda path: io.BufferedReader(_ZstdStream(path), 1 << 20),
    }
    try:
        with openers.get(path.suffix, lambda path: open(path, "rb"))(path) as file:
            yield file
    except DAMAGED as error:
        raise InputError(f"{path} is damaged or cut off ({error}); fetch it again") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error


def _decode(data: bytes, whole: bool) -> tuple[str, bytes]:
    """Text, and the bytes of a character that is cut off where `data` is not a whole line."""
    try:
        return data.decode(), b""
    except UnicodeDecodeError as error:
        if not whole and error.end == len(data) and "unexpected end" in error.reason:
            return data[: error.start].decode(), data[error.start :]
        raise


def _bad_text(place: str, options: ReadOptions) -> Fragment:
    if options.on_bad_text == "skip":
        return Fragment("", ends=False, bad=1)
    raise InputError(
        f"{place} is not UTF-8 text; convert it (iconv), or give --on_bad_text skip to leave it out"
    )


def read_text(path: Path, options: ReadOptions) -> Iterator[Fragment]:
    """The documents of a text file: blocks between blank lines, or the whole file.

    Under `on_bad_text="skip"` a line that is not UTF-8 is left out (of a line above a mebibyte,
    only the damaged mebibyte).
    """
    with open_bytes(path) as file:
        offset, rest, line_begins = 0, b"", True
        for line in iter(lambda: file.readline(LINE_LIMIT), b""):
            ends_line = line.endswith(b"\n")
            if offset == 0 and line.startswith(BOM):
                line, offset = line[len(BOM) :], len(BOM)
            data = rest + line
            offset -= len(rest)
            try:
                text, rest = _decode(data, ends_line)
                blank = line_begins and ends_line and not text.strip()
                yield Fragment(text, ends=blank and not options.document_per_file)
            except UnicodeDecodeError as error:
                rest = b""
                yield _bad_text(f"{path}, byte offset {offset + error.start},", options)
            offset += len(data)
            line_begins = ends_line
        if rest:
            yield _bad_text(f"{path}, byte offset {offset - len(rest)},", options)
        yield Fragment("", ends=True)


def _document(value: Any, place: str, options: ReadOptions) -> Fragment:
    """A whole document from a field; null is an empty one."""
    if value is None:
        return Fragment("", ends=True)
    if not isinstance(value, str):
        raise InputError(
            f"{place}: the column {options.text_column!r} holds {type(value).__name__}, not text; "
            "name another with --text_column"
        )
    try:
        value.encode()  # lone surrogates, written as \ud800 in JSON, are no text
    except UnicodeEncodeError:
        return _bad_text(place, options)
    return Fragment(value, ends=True)


def _one_line(error: Exception) -> str:
    """What a library says, which may be several lines."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def missing_column(place: object, options: ReadOptions, found: Any) -> InputError:
    """The error for a table without the wanted column."""
    return InputError(
        f"{place} has no column {options.text_column!r}, only {', '.join(map(str, found))}; "
        "name the one that holds text with --text_column"
    )


def read_json_lines(path: Path, options: ReadOptions) -> Iterator[Fragment]:
    """One document a line: the field `text_column` of a JSON object."""
    with open_bytes(path) as file:
        offset = 0
        for number, line in enumerate(file, 1):
            place = f"{path}, line {number},"
            start, offset = offset, offset + len(line)
            if not line.removeprefix(BOM).strip():
                continue
            try:
                fields = json.loads(line.removeprefix(BOM).decode())
            except UnicodeDecodeError as error:
                yield _bad_text(f"{place} byte offset {start + error.start},", options)
                continue
            except (ValueError, RecursionError) as error:
                raise InputError(
                    f"{place} is not a JSON object ({error}); JSON lines are wanted, one object "
                    "a line (an array becomes that with: jq -c '.[]')"
                ) from error
            if not isinstance(fields, dict):
                raise InputError(f'{place} is not a JSON object; make it {{"text": …}}')
            if options.text_column not in fields:
                raise missing_column(place, options, fields)
            yield _document(fields[options.text_column], place, options)


def _open_parquet(path: Path, options: ReadOptions) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20)
        names = file.schema_arrow.names
    except (pyarrow.ArrowException, OSError, ValueError) as error:  # names that are not UTF-8 too
        raise InputError(
            f"{path} is no whole Parquet file ({_one_line(error)}); fetch it again"
        ) from error
    if options.text_column not in names:
        raise missing_column(path, options, names)
    return file


def read_parquet(path: Path, options: ReadOptions) -> Iterator[Fragment]:
    """One document a row of the column `text_column`."""
    import pyarrow

    file = _open_parquet(path, options)
    row = 0
    try:
        for batch in file.iter_batches(batch_size=16, columns=[options.text_column]):
            for value in batch.column(0):
                place = f"{path}, row {row},"
                row += 1
                try:
                    text = value.as_py()
                except UnicodeDecodeError:
                    yield _bad_text(place, options)
                    continue
                yield _document(text, place, options)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise InputError(
            f"{path} is damaged behind row {row} ({_one_line(error)}); fetch it again"
        ) from error
    finally:
        file.close()


@dataclass(frozen=True)
class DatasetName:
    """A data set for `datasets.load_dataset`: a hub name or a local folder."""

    name: str
    config: str | None
    split: str

    @property
    def shown(self) -> str:
        """The name as it is printed and saved, without a secret of an address."""
        return str(redacted(self.name))

    def told(self, error: Exception) -> str:
        """What the library says; its kind alone where it could repeat a secret in other words."""
        return _one_line(error) if self.shown == self.name else type(error).__name__


def read_dataset(dataset: DatasetName, options: ReadOptions) -> Iterator[Fragment]:
    """One document a row of a data set's split, streamed."""
    import datasets  # heavy: only for --dataset

    try:
        rows = datasets.load_dataset(
            dataset.name, dataset.config, split=dataset.split, streaming=True
        )
        columns = rows.column_names or list(next(iter(rows), {options.text_column: None}))
    except Exception as error:  # the library raises of every kind: no name, split, network, format
        raise InputError(
            f"--dataset {dataset.shown} (config {dataset.config}, split {dataset.split}) cannot be "
            f"loaded: {dataset.told(error)}"
        ) from error
    if options.text_column not in columns:
        raise missing_column(f"--dataset {dataset.shown}", options, columns)
    iterator = iter(rows.select_columns([options.text_column]))
    for number in itertools.count():
        place = f"--dataset {dataset.shown}, row {number},"
        try:
            row = next(iterator, None)
        except Exception as error:  # as above: a network or a file that breaks half-way
            raise InputError(f"{place} cannot be read: {dataset.told(error)}") from error
        if row is None:
            return
        yield _document(row[options.text_column], place, options)
