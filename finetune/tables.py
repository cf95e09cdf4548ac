"""Labelled rows from a file: csv, jsonl or Parquet, with errors that name file and line."""

import csv
import io
import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
from datasets import ClassLabel, Dataset, Features, Value

from potstill.errors import InputError

INTEGER = re.compile(r"[+-]?\d{1,18}")  # fits 64 bits
LONGEST_TEXT = 1_000_000  # characters: a tokenizer takes a hundred times as many bytes for a text


def read_rows(path: Path, columns: tuple[str, ...]) -> Dataset:
    """The rows of `path`; only those of `columns` that it has, so that others may be anything.

    Raises:
        InputError: the file is missing, empty, damaged or of an unknown kind.
    """
    if not os.path.isfile(path):
        raise InputError(f"{path}: no such file")
    if path.suffix not in READERS:
        raise InputError(f"{path}: unknown kind {path.suffix!r}; give {', '.join(READERS)}")
    try:
        rows = READERS[path.suffix](path, columns)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 (byte {error.start}); convert it to UTF-8") from error
    if path.stat().st_size > 0 and not rows.column_names:
        raise InputError(f"{path}: none of the columns {', '.join(columns)}; name them so")
    if len(rows) == 0:
        raise InputError(f"{path}: no rows; give at least one labelled row")
    return rows


def _check_names(path: Path, names: Sequence[str], columns: tuple[str, ...]) -> None:
    for name in columns:
        if names.count(name) > 1:
            raise InputError(
                f"{path}: {names.count(name)} columns are called {name!r}; keep one of them"
            )


def _read_parquet(path: Path, columns: tuple[str, ...]) -> Dataset:
    table = read_parquet(path, columns)
    plain = _plain_schema(path, table.schema)
    # `pa.table` alone would keep the metadata of the file
    return Dataset(pa.table(table, schema=plain).replace_schema_metadata(plain.metadata))


def read_parquet(path: Path, columns: tuple[str, ...]) -> pa.Table:
    """Those of `columns` that a Parquet file has, checked as bytes but of whatever types.

    Raises:
        InputError: the file is missing or damaged, or a column stands twice.
    """
    if not os.path.isfile(path):
        raise InputError(f"{path}: no such file")
    try:
        # through a file object: a path makes pyarrow look for partitions in folders' names
        with pyarrow.parquet.ParquetFile(path, page_checksum_verification=True) as file:
            names = file.schema_arrow.names
            _check_names(path, names, columns)
            table = file.read(columns=[name for name in columns if name in names])
            table.validate(full=True)  # of damaged offsets nobody else would notice
            return table
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = (str(error).splitlines() or ["damaged"])[0]
        raise InputError(
            f"{path}: not a whole Parquet file ({reason}); copy or make it again"
        ) from error


def _plain_schema(path: Path, schema: pa.Schema) -> pa.Schema:
    """The columns' types, with the names of a ClassLabel and nothing else of the metadata.

    Other types of the library, such as images, would open files that the rows name.
    """
    try:
        features = Features.from_arrow_schema(_own_description(schema))
    except Exception as error:  # whatever the library makes of metadata that anybody may write
        raise InputError(
            f"{path}: its schema's description of the columns is damaged "
            f"({type(error).__name__}: {error}); write the file again"
        ) from error
    for name, feature in features.items():
        if not isinstance(feature, Value | ClassLabel):
            raise InputError(
                f"{path}: column {name!r} is {feature}; give text, and labels that are "
                "strings, integers or floats"
            )
    return features.arrow_schema


def _own_description(schema: pa.Schema) -> pa.Schema:
    """The schema with the library's description of its own columns only, not of those left out."""
    described = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    features = (described.get("info") or {}).get("features") or {}
    kept = {name: features[name] for name in schema.names if name in features}
    return schema.with_metadata({"huggingface": json.dumps({"info": {"features": kept}})})


def _text(path: Path) -> str:
    """The whole file, decoded at once: a decoder of blocks would count bytes within its block."""
    return path.read_bytes().decode().removeprefix("\N{BYTE ORDER MARK}")


def _read_csv(path: Path, columns: tuple[str, ...]) -> Dataset:
    found: dict[str, list[Any]] = {}
    csv.field_size_limit(2**31 - 1)  # its own is 131,072; LONGEST_TEXT is checked with the row
    reader = csv.reader(io.StringIO(_text(path), newline=""), strict=True)
    try:
        header = next(reader, [])
        _check_names(path, header, columns)
        kept = {name: header.index(name) for name in columns if name in header}
        found = {name: [] for name in kept}
        for row in reader:
            if len(row) != len(header):
                raise InputError(
                    f"{path}: line {reader.line_num} has {len(row)} fields, "
                    f"the header {len(header)}; quote fields that hold commas"
                )
            for name, index in kept.items():
                found[name].append(row[index])
    except csv.Error as error:
        raise InputError(f"{path}: line {reader.line_num}: {error}; mend the csv") from error
    if "label" in found:
        found["label"] = _typed(found["label"])
    return Dataset.from_dict(found)


def _read_jsonl(path: Path, columns: tuple[str, ...]) -> Dataset:
    rows = []
    for number, line in enumerate(io.StringIO(_text(path), newline=None), start=1):
        if line.strip():
            rows.append(_json_object(path, number, line))
    kept = [name for name in columns if rows and name in rows[0]]
    try:
        return Dataset.from_dict({name: [row.get(name) for row in rows] for name in kept})
    except (pa.ArrowException, OverflowError, UnicodeEncodeError) as error:
        raise InputError(
            f"{path}: a column mixes kinds of values, or has one that no column can hold "
            f"({error}); use one kind"
        ) from error


def _json_object(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line, object_pairs_hook=_without_doubles)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: line {number} is not JSON ({error}); mend it") from error
    if not isinstance(row, dict):
        raise InputError(
            f'{path}: line {number} is not an object such as {{"sentence": "…", "label": "…"}}'
        )
    return row


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; of a name that stands twice the parser would keep the last value only."""
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError("a name stands twice in an object")
    return row


def _typed(values: list[str]) -> list[Any]:
    """A csv knows only text: all integers, else all numbers, else strings; blanks are cut."""
    values = [value.strip() for value in values]
    if all(INTEGER.fullmatch(value) for value in values):
        return [int(value) for value in values]
    try:
        return [float(value) for value in values]
    except ValueError:
        return values


READERS: dict[str, Callable[[Path, tuple[str, ...]], Dataset]] = {
    ".csv": _read_csv,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
