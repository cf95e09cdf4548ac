"""Fixtures that more than one test module of the trainer uses."""

from collections.abc import Iterator
from datetime import timedelta

import pytest
from torch import distributed as dist


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process group of this process alone."""
    store = dist.FileStore(str(tmp_path_factory.mktemp("store") / "ranks"), 1)
    limit = timedelta(seconds=60)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1, timeout=limit)
    yield
    dist.destroy_process_group()
