"""Packing and the split: rows give the stream of tokens back, whole and in order."""

import weakref

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.packing import RowPacker, is_validation

IDS = {"pad": 0, "cls": 1, "sep": 2, "mask": 3}
DOCUMENTS = st.lists(st.lists(st.integers(4, 60_000), min_size=1, max_size=40), max_size=12)


def packed(documents: list[list[int]], seq_length: int, rows: int) -> tuple[np.ndarray, int]:
    """All rows of the documents, through blocks of `rows`, and the padding of the last one."""
    packer = RowPacker(seq_length, rows, IDS, np.dtype(np.uint16))
    blocks = []
    for document in documents:
        packer.begin_document()
        packer.add(np.array(document))
        while (block := packer.full_block()) is not None:
            assert len(block) == rows
            blocks.append(block)
    last, padding = packer.last_block()
    return np.concatenate([*blocks, last]), padding


def test_waiting_tokens_do_not_hold_the_batch_that_they_came_in() -> None:
    packer = RowPacker(128, 1, IDS, np.dtype(np.uint16))
    batch = np.arange(1000, dtype=np.int32)
    alive = weakref.ref(batch)
    packer.add(batch[10:13])
    del batch
    assert alive() is None
    assert packer.waiting().tolist() == [10, 11, 12]


def test_rows_are_those_worked_out_by_hand() -> None:
    rows, padding = packed([[11, 12], [13, 14, 15, 16]], seq_length=5, rows=1)
    assert rows.tolist() == [[1, 11, 12, 2, 2], [1, 13, 14, 15, 2], [1, 16, 2, 0, 0]]
    assert padding == 2


@settings(max_examples=150, deadline=None)
@given(documents=DOCUMENTS, seq_length=st.integers(3, 12), rows=st.integers(1, 5))
def test_unpacking_gives_the_token_stream_back(
    documents: list[list[int]], seq_length: int, rows: int
) -> None:
    stream = [token for document in documents for token in [*document, IDS["sep"]]][:-1]
    found, padding = packed(documents, seq_length, rows)
    assert (found[:, 0] == IDS["cls"]).all()
    content = found[:, 1:].ravel().tolist()
    if padding:
        assert content[-padding:] == [IDS["pad"]] * padding
        content = content[:-padding]
    width = seq_length - 1
    ends = [content[at : at + width][-1] for at in range(0, len(content), width)]
    assert ends == [IDS["sep"]] * len(found)
    kept = [
        token for at in range(0, len(content), width) for token in content[at : at + width][:-1]
    ]
    assert kept == stream


@settings(max_examples=50, deadline=None)
@given(documents=DOCUMENTS, cut=st.integers(0, 12))
def test_a_restored_packer_goes_on_as_if_never_stopped(
    documents: list[list[int]], cut: int
) -> None:
    packer = RowPacker(7, 10_000, IDS, np.dtype(np.uint16))
    for number, document in enumerate(documents):
        if number == cut:
            waiting, begun = packer.waiting(), packer.begun
            packer = RowPacker(7, 10_000, IDS, np.dtype(np.uint16))
            packer.restore(waiting, begun)
        packer.begin_document()
        packer.add(np.array(document))
    assert packer.last_block()[0].tolist() == packed(documents, 7, 10_000)[0].tolist()


def test_two_documents_lie_on_both_sides_for_every_seed() -> None:
    for seed in range(50):
        assert not is_validation(seed, 0, 0.005)
        assert is_validation(seed, 1, 0.005)


def test_the_validation_share_is_the_fraction_and_the_seed_chooses() -> None:
    chosen = {seed: {n for n in range(20_000) if is_validation(seed, n, 0.05)} for seed in (0, 1)}
    for documents in chosen.values():
        assert len(documents) == pytest.approx(1000, abs=150)  # about 5 standard deviations
    assert len(chosen[0] & chosen[1]) < 150  # 50 expected by chance


def test_fraction_zero_holds_nothing_out() -> None:
    assert not any(is_validation(0, number, 0.0) for number in range(1000))
