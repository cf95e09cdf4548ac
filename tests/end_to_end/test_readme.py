"""The README's commands, taken from its text; only paths and the length of runs are put in.

Runs of one kind are started together: both of the trainer by one start of the launcher, programs of
`finetune/` by one Python, since imports take most of their time.
"""

import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from data_prep import shard
from finetune.grids.settings import parse as parse_grid
from pretrain.config import parse_config
from tests.forked import Job, forked
from tests.launch import (
    SEVERAL,
    Materials,
    command,
    environment,
    materials_fixture,
    write_teacher,
)

__all__ = ["materials_fixture"]  # pytest finds it by this name in the module


def commands(readme: Path) -> list[str]:
    """The lines of all code blocks without a language, continued lines joined."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", readme.read_text(), re.MULTILINE | re.DOTALL)
    text = "\n".join(text for language, text in blocks if not language)
    lines = text.replace("\\\n", " ").splitlines()
    return [" ".join(line.split()) for line in lines if line.strip()]


def first_run(readme: Path) -> list[str]:
    """The commands of "Your first own run": shard, dry run, fine-tune, grid, report."""
    wanted = ("python data_prep", "deepspeed --num_gpus 2", "python finetune")
    return [c for c in commands(readme) if c.startswith(wanted) and "htd" not in c][:6]


@pytest.fixture
def workplace(tmp_path: Path, repository: Path, materials: Materials) -> Path:
    """A folder that looks like the checkout, with a corpus and a teacher of 128 positions."""
    for name in ("data_prep", "pretrain", "finetune", "ds_configs"):
        (tmp_path / name).symlink_to(repository / name)
    (tmp_path / "corpus").mkdir()
    text = (materials.folder / "manual.txt").read_text()
    (tmp_path / "corpus" / "manual.txt").write_text(text * 3)
    (tmp_path / "path" / "to").mkdir(parents=True)
    teacher = tmp_path / "path" / "to" / "teacher"
    write_teacher(teacher, materials.shards / "tokenizer", max_position_embeddings=128)
    return tmp_path


@pytest.mark.slow
@pytest.mark.distributed
def test_the_first_own_run_of_the_readme_works_as_written(
    workplace: Path, repository: Path, materials: Materials, real_data: Path
) -> None:
    (workplace / "glue").symlink_to(real_data / "glue")
    written = [c for c in first_run(repository / "README.md") if "wikipedia" not in c]
    sharding, dry_run, fine_tuning, grid, report = written
    own = environment(materials.folder) | {"CUDA_VISIBLE_DEVICES": ""}
    real_run = dry_run.replace(" --dry_run", "").replace("--max_steps 500", "--max_steps 3")
    dry, real = (shlex.split(line) for line in (dry_run, real_run))
    assert dry[:4] == real[:4] == ["deepspeed", "--num_gpus", "2", "pretrain/run.py"]
    several = workplace / "runs.json"  # both in one start of the launcher
    several.write_text(json.dumps([dry[4:], "test ! -e runs", real[4:]]))
    launched = [*command(2, SEVERAL), str(several)]
    for words in (shlex.split(sharding), launched):
        done = subprocess.run(
            words, cwd=workplace, env=own, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, f"{words}\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
    short = f"{fine_tuning} --epochs 1 --max_train_rows 64 --max_validation_rows 32"
    small = f"{grid} --epochs 1 --max_train_rows 16 --max_validation_rows 8 --lr 3e-5 --seeds 1"
    lines = [shlex.split(line) for line in (short, f"{small} --workers 1", report)]
    assert all(python == "python" for python, *_ in lines)
    jobs = [Job(program, 0, given) for _, program, *given in lines]
    for job, told in zip(jobs, forked(workplace / "forked", jobs, own, workplace), strict=True):
        assert told.statuses == [0], f"{job}\n{told.output[-2000:]}{told.errors[-4000:]}"
    assert (workplace / "runs" / "first" / "student" / "model.safetensors").is_file()
    assert (workplace / "runs" / "first-rte" / "result.json").is_file()
    assert (workplace / "runs" / "first-grid" / "summary.md").is_file()
    assert (workplace / "runs" / "first-report" / "report.html").is_file()


def test_the_paper_run_of_the_readme_has_only_known_flags(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = commands(repository / "README.md")
    (distilling,) = [c for c in written if "pretrain/run.py --preset" in c]
    (grid,) = [c for c in written if "grid.py" in c and "--preset" in c]
    (sharding,) = [c for c in written if "corpus/wikipedia corpus/books" in c]
    config = parse_config(shlex.split(distilling.split("pretrain/run.py")[1]))
    assert config.schedule.max_steps == 100_000 and config.objective.objective == "att-mse"
    assert (repository / str(config.run.ds_config)).is_file()
    arguments = shard.parse(shlex.split(sharding.split("data_prep/shard.py")[1]))
    assert arguments.seq_length == 128
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/htd-att-mse-6x768/student").mkdir(parents=True)
    settings = parse_grid(shlex.split(grid.split("finetune/grid.py")[1]))
    assert len(settings.combinations) == 8 and settings.seeds == 4


def test_every_link_of_the_documentation_leads_somewhere(repository: Path) -> None:
    pages = [repository / "README.md", *sorted((repository / "docs").glob("*.md"))]
    pages += sorted((repository / "ds_configs").glob("*.md"))
    dead = [
        f"{page.name}: {link}"
        for page in pages
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text())
        if not os.path.exists(page.parent / link)
    ]
    assert not dead, dead
