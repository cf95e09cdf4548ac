"""Knowledge of tiny teachers, stored within the test's own process."""

from pathlib import Path
from typing import Any

import torch

from pretrain import cache_knowledge
from pretrain.knowledge.job import make_job
from pretrain.knowledge.settings import parse_config
from pretrain.knowledge.source import Knowledge, open_knowledge
from pretrain.run_folder import release_folder
from tests.launch import Materials, flags, write_ds_config

CPU = torch.device("cpu")
EVERYTHING = "hid-seq+att-mse+val-kl+kd"


def store(materials: Materials, folder: Path, **given: Any) -> Path:
    """Store knowledge of ragged rows by the program, on the ranks of this process; the folder."""
    output = folder / "knowledge"
    own = dict(data=materials.ragged, teacher=materials.teacher, objective=EVERYTHING)
    own |= dict(ds_config=write_ds_config(folder / "ds.json"), dtype="fp32", output=output)
    try:
        cache_knowledge.run(make_job(parse_config(flags(**(own | given)))), CPU)
    finally:
        release_folder()
    return Path(str(given.get("output", output)))


def opened(folder: Path) -> Knowledge:
    """Stored knowledge, its files checked."""
    knowledge = open_knowledge(folder)
    knowledge.check_files()
    return knowledge


def contents_of(knowledge: Path) -> dict[str, bytes]:
    """All files, by name; the lock names a process."""
    return {p.name: p.read_bytes() for p in knowledge.iterdir() if p.name != ".lock"}
