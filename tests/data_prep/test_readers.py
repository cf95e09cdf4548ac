"""Readers and cutting: the same documents from every format, in pieces that change nothing."""

import gzip
import json
import re
import tracemalloc
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.corpus import (
    LONGEST_PIECE,
    Position,
    Source,
    _paragraph_end,
    cut_fragments,
    find_sources,
    read_pieces,
)
from data_prep.readers import DatasetName, Fragment, ReadOptions, read_parquet, read_text
from data_prep.shard import parse, sources_of
from potstill.errors import InputError


def documents_of(*inputs: Path, options: ReadOptions = ReadOptions()) -> list[str]:  # noqa: B008
    """The documents that come out, put together from their pieces."""
    texts, open_text = [], ""
    for piece in read_pieces(find_sources([str(path) for path in inputs]), options, Position()):
        open_text += piece.text
        if piece.ends:
            texts.append(open_text)
            open_text = ""
    assert not open_text
    return texts


def write(path: Path, texts: list[str], column: str = "text") -> Path:
    """The documents in the format that the name says."""
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table({column: texts}), path)
        return path
    kind = path.suffixes[0]
    lines = texts if kind == ".txt" else [json.dumps({column: text}) for text in texts]
    content = ("\n\n" if kind == ".txt" else "\n").join(lines).encode()
    if path.suffix == ".gz":
        content = gzip.compress(content)
    if path.suffix == ".zst":  # two frames, as parallel compressors write
        half = len(content) // 2
        compress = zstandard.ZstdCompressor().compress
        content = compress(content[:half]) + compress(content[half:])
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    "kind",
    "txt txt.gz txt.zst jsonl jsonl.gz jsonl.zst json json.gz json.zst parquet".split(),
)
def test_every_format_gives_the_same_documents(
    tmp_path: Path, documents: list[str], kind: str
) -> None:
    path = write(tmp_path / f"corpus.{kind}", documents)
    assert documents_of(path) == [text.strip() for text in documents]


def test_several_inputs_and_folders_come_in_order_and_other_files_are_left(tmp_path: Path) -> None:
    for name in ("b.txt", "a.jsonl", "sub/c.txt"):
        (tmp_path / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        write(tmp_path / "folder" / name, [f"text of {name}"])
    for name in ("README.md", ".hidden.txt", ".sharding/a.json"):
        (tmp_path / "folder" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "folder" / name).write_text("not this")
    first = write(tmp_path / "z.txt", ["first"])
    found = documents_of(first, tmp_path / "folder")
    assert found == ["first", "text of a.jsonl", "text of b.txt", "text of sub/c.txt"]


def test_linked_folders_are_read_and_circles_end(tmp_path: Path) -> None:
    folder, far = tmp_path / "folder", tmp_path / "far"
    for place in (folder, far / "deep", far / ".hidden"):
        place.mkdir(parents=True)
        write(place / "x.txt", [f"text of {place.name}"])
    (folder / "linked").symlink_to(far)
    (far / "deep" / "back").symlink_to(folder)
    (folder / "x2.txt").symlink_to(far / "deep" / "x.txt")
    assert documents_of(folder) == ["text of deep", "text of folder", "text of deep"]
    dataset = Source("x", "dataset", dataset=DatasetName(str(folder), None, "train"))
    assert len(dataset.identity()["files"]) == 3


def test_secrets_of_a_data_set_address_are_neither_saved_nor_told() -> None:
    args = parse("--dataset https://me:pa55@host/x?token=abc --output out".split())
    (source,) = sources_of(args)
    assert "pa55" not in str(source.identity()) and "abc" not in str(source.identity())
    assert "pa55" not in source.name
    assert source.dataset is not None and "pa55" in source.dataset.name  # it must be read
    with pytest.raises(InputError) as refused:
        next(source.fragments(ReadOptions()))
    assert "pa55" not in str(refused.value) and "[redacted]@host" in str(refused.value)


def test_a_parquet_column_name_that_is_not_utf8_is_refused_by_file(tmp_path: Path) -> None:
    path = write(tmp_path / "x.parquet", ["some text"], column="textcolumn")
    path.write_bytes(path.read_bytes().replace(b"textcolumn", b"text\xff\xfeumn"))
    with pytest.raises(InputError, match="x.parquet is no whole Parquet file"):
        next(read_parquet(path, ReadOptions()))


def test_a_text_file_is_one_document_if_asked(tmp_path: Path) -> None:
    path = write(tmp_path / "x.txt", ["one", "two"])
    assert documents_of(path, options=ReadOptions(document_per_file=True)) == ["one\n\ntwo"]


def test_blank_lines_with_blanks_carriage_returns_and_byte_order_marks(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_bytes(b"\xef\xbb\xbf  \r\n\r\none\r\nmore\r\n \t\r\n\n\ntwo")
    assert documents_of(path) == ["one\r\nmore", "two"]


def test_a_data_set_folder_is_read_like_its_files(tmp_path: Path, documents: list[str]) -> None:
    pytest.importorskip("datasets", reason="the library that reads data sets")
    (tmp_path / "set").mkdir()
    write(tmp_path / "set" / "train.parquet", documents[:9], column="body")
    source = Source("set", "dataset", dataset=DatasetName(str(tmp_path / "set"), None, "train"))
    fragments = source.fragments(ReadOptions(text_column="body"))
    assert [fragment.text for fragment in fragments] == documents[:9]
    assert source.identity()["files"][0][0].endswith("train.parquet")


def test_skipping_leaves_out_only_the_bad_line_and_counts_it(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_bytes(b"good\nbad \xff here\nstill good\n\ncut \xe2\x82")
    skip = ReadOptions(on_bad_text="skip")
    pieces = list(read_pieces(find_sources([str(path)]), skip, Position()))
    assert [piece.text for piece in pieces] == ["good\nstill good", "cut"]
    assert sum(piece.bad for piece in pieces) == 2


def test_a_character_across_the_line_limit_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    text = "x" * ((1 << 20) - 1) + "€uro " + "y" * (1 << 20)
    path.write_text(text, encoding="utf-8")
    assert "".join(fragment.text for fragment in read_text(path, ReadOptions())) == text


def test_reading_starts_behind_any_position(corpus: Path) -> None:
    sources = find_sources([str(corpus), str(corpus)])
    pieces = list(read_pieces(sources, ReadOptions(), Position()))
    for at in (0, 1, len(pieces) // 2, len(pieces) - 2):
        rest = read_pieces(sources, ReadOptions(), pieces[at].position)
        assert list(rest) == pieces[at + 1 :]


def test_a_position_is_refused_where_what_lies_before_it_has_changed(tmp_path: Path) -> None:
    path = write(tmp_path / "x.txt", ["one", "two", "three"])
    sources = find_sources([str(path)])
    place = list(read_pieces(sources, ReadOptions(), Position()))[1].position
    write(path, ["one", "two", "another", "more"])
    rest = list(read_pieces(sources, ReadOptions(), place))
    assert [piece.text for piece in rest] == ["another", "more"]
    for texts in (["one", "new", "three"], ["one", "two too", "three"], ["one"]):
        write(path, texts)
        with pytest.raises(InputError, match="x.txt has changed in the part"):
            list(read_pieces(sources, ReadOptions(), place))


def test_a_parquet_row_group_is_never_held_whole(tmp_path: Path) -> None:
    texts = [f"{number:,} and {number * 7:x} " * 200 for number in range(5000)]  # 14 MB
    path = tmp_path / "x.parquet"
    table = pyarrow.table({"text": texts})
    pyarrow.parquet.write_table(table, path, compression="none", use_dictionary=False)
    del table
    pool = pyarrow.default_memory_pool()
    before, peak = pool.bytes_allocated(), 0
    for _ in read_parquet(path, ReadOptions()):
        peak = max(peak, pool.bytes_allocated() - before)
    assert path.stat().st_size > 12 << 20
    assert peak < 6 << 20


WORDS = st.text(st.sampled_from("ab.\n\n  \t\r"), max_size=60)


@settings(max_examples=500, deadline=None)
@given(st.text("ab \n\t\r\x1c\u00a0\u2028", min_size=1, max_size=30), st.data())
def test_a_paragraph_ends_behind_a_word_where_only_blanks_come_before_a_newline(
    text: str, data: st.DataObject
) -> None:
    start = data.draw(st.integers(1, len(text)))
    limit = data.draw(st.integers(start, len(text) + 2))
    expected = re.compile(r"(?<=\S)[ \t\r\f\v]*\n").search(text, start, limit)
    assert _paragraph_end(text, start, limit) == (expected.start() if expected else None)


@settings(max_examples=200, deadline=None)
@given(text=WORDS, ends=st.lists(st.integers(0, 6000), max_size=6), times=st.integers(1, 100))
def test_pieces_are_the_document_however_it_comes(text: str, ends: list[int], times: int) -> None:
    text *= times
    places = sorted({0, len(text), *(end % (len(text) + 1) for end in ends)})
    parts = [text[a:b] for a, b in zip(places, places[1:], strict=False)] or [""]
    fragments = [Fragment(part, ends=False) for part in parts] + [Fragment("", ends=True)]
    pieces = list(cut_fragments(iter(fragments)))
    assert "".join(piece.text for piece in pieces) == text.strip()
    assert [piece.text for piece in pieces] == [
        piece.text for piece in cut_fragments(iter([Fragment(text, ends=True)]))
    ]
    for before, after in zip(pieces, pieces[1:], strict=False):
        assert not after.text or after.text[0].isspace() and not before.text[-1].isspace()


def test_long_lines_are_cut_at_blanks_and_endless_words_where_they_must(tmp_path: Path) -> None:
    spaced = "word " * 20_000
    pieces = [p.text for p in cut_fragments(iter([Fragment(spaced, ends=True)]))]
    assert "".join(pieces) == spaced.strip()
    assert max(map(len, pieces)) <= LONGEST_PIECE
    assert all(piece.endswith("word") for piece in pieces)
    endless = [p.text for p in cut_fragments(iter([Fragment("x" * 50_000, ends=True)]))]
    assert list(map(len, endless)) == [16_000, 16_000, 16_000, 2_000]


def test_a_file_of_one_line_is_never_held_whole(tmp_path: Path) -> None:
    path = tmp_path / "line.txt"
    path.write_text("a line that does not end " * 400_000)  # 10 MB
    tracemalloc.start()
    count = sum(1 for _ in read_pieces(find_sources([str(path)]), ReadOptions(), Position()))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count > 600
    assert peak < 6 << 20
