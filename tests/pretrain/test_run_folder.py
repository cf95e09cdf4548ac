"""How a run's batch is cut when it goes on on another number of ranks."""

import json
from pathlib import Path

import pytest

from potstill.errors import InputError
from pretrain.config import parse_config
from pretrain.ds_config import BatchSizes, batch_sizes
from pretrain.run_folder import keep_global_batch
from tests.launch import flags, write_ds_config

WHOLE = 8  # rows of the run's batch, begun on two ranks as 2 x 2 micro-batches x 2 ranks


def sizes_of(folder: Path, ranks: int, micro: int, accumulation: int) -> BatchSizes:
    """With what the run that stands in `folder` goes on, given that ds_config."""
    path = write_ds_config(folder / "ds.json", micro, accumulation)
    record = {"begun_on_ranks": 2, "identity": {"global_batch": WHOLE}}
    (folder / "config.json").write_text(json.dumps(record))
    given = flags(ds_config=path, data=folder, objective="mlm", max_steps=9, output=folder)
    config = parse_config(given)
    ds_config = json.loads(path.read_text())
    return keep_global_batch(batch_sizes(ds_config, ranks, path), ds_config, config, ranks)[0]


@pytest.mark.parametrize("ranks, accumulation", [(1, 4), (2, 2), (4, 1)])
def test_the_ds_config_of_the_beginning_is_cut_anew(
    ranks: int, accumulation: int, tmp_path: Path
) -> None:
    assert sizes_of(tmp_path, ranks, 2, 2) == BatchSizes(WHOLE, 2, accumulation)


@pytest.mark.parametrize("ranks, micro, accumulation", [(1, 2, 4), (4, 2, 1), (4, 1, 2)])
def test_a_ds_config_that_was_cut_by_hand_is_taken_as_it_is(
    ranks: int, micro: int, accumulation: int, tmp_path: Path
) -> None:
    assert sizes_of(tmp_path, ranks, micro, accumulation) == BatchSizes(WHOLE, micro, accumulation)


def test_ranks_that_cannot_share_the_batch_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="8 rows cannot be shared by 3 ranks"):
        sizes_of(tmp_path, 3, 2, 2)
