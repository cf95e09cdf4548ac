"""Tokenising in parallel: batches go out in order, and come back in order."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import accumulate, pairwise
from typing import Any

import numpy as np

from data_prep.corpus import Piece
from data_prep.engines import build_encoder
from data_prep.tokenization import EncoderSettings, TextEncoder
from potstill.errors import PotstillError

BATCH_CHARACTERS = 1 << 18

_encoder: TextEncoder | None = None  # of a worker process


def _start_worker(settings: EncoderSettings, engine: str) -> None:
    """Signals are the parent's business; a worker ends with it, even when it was killed."""
    global _encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _encoder = build_encoder(settings, engine)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode(texts: list[str]) -> tuple[np.ndarray, list[int]]:
    """The ids of all texts in one array, which travels faster than many; where each ends."""
    assert _encoder is not None
    encoded = _encoder.encode(texts)
    return np.concatenate(encoded), list(accumulate(map(len, encoded), initial=0))


def _apart(together: np.ndarray, ends: list[int]) -> list[np.ndarray]:
    return [together[start:end] for start, end in pairwise(ends)]


def in_batches(pieces: Iterator[Piece]) -> Iterator[list[Piece]]:
    """Pieces grouped into batches of about a quarter of a million characters."""
    batch: list[Piece] = []
    characters = 0
    for piece in pieces:
        batch.append(piece)
        characters += len(piece.text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def tokenize(
    pieces: Iterator[Piece], settings: EncoderSettings, workers: int, engine: str = "tokenizers"
) -> Iterator[tuple[list[Piece], list[np.ndarray]]]:
    """Each batch of pieces with their token ids, in order, whatever the number of workers.

    At most `2 * workers + 2` batches are under way, so memory stays bounded.

    Raises:
        PotstillError: a worker died.
    """
    if workers == 1:
        encoder = build_encoder(settings, engine)
        for batch in in_batches(pieces):
            yield batch, encoder.encode([piece.text for piece in batch])
        return
    pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), _start_worker, (settings, engine)
    )
    try:
        under_way: deque[tuple[list[Piece], Future[Any]]] = deque()
        for batch in in_batches(pieces):
            under_way.append((batch, pool.submit(_encode, [piece.text for piece in batch])))
            if len(under_way) >= 2 * workers + 2:
                first, future = under_way.popleft()
                yield first, _apart(*future.result())
        for first, future in under_way:
            yield first, _apart(*future.result())
    except BrokenProcessPool as error:
        raise PotstillError(
            "a worker process died (out of memory?); finished shards are kept: run the same "
            "command again, perhaps with fewer --workers"
        ) from error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
