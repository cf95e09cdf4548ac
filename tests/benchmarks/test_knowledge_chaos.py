"""`benchmarks/knowledge_chaos.py`: in small, on a tiny teacher; storing survives SIGKILL."""

import json
import subprocess
import sys
from pathlib import Path

import knowledge_chaos
import pytest

from tests.launch import REPOSITORY, Materials, environment
from tests.launch import materials_fixture as materials_fixture

KILLS = 5  # the program itself takes twenty
PROGRAM = REPOSITORY / "benchmarks" / "knowledge_chaos.py"


@pytest.mark.slow
@pytest.mark.distributed
def test_knowledge_that_is_killed_over_and_over_is_that_of_an_unbroken_storing(
    materials: Materials, tmp_path: Path
) -> None:
    """Now on one rank, now on two; the same command again computes nothing a second time."""
    words = [sys.executable, str(PROGRAM), "--output", str(tmp_path / "out"), "--kills", str(KILLS)]
    words += ["--cases", "1 or 2 ranks", "--data", str(materials.ragged), "--results"]
    words += [str(tmp_path / "results"), "--teacher", str(materials.teacher), "--seed", "3"]
    (tmp_path / "results").mkdir()
    for _ in range(2):
        done = subprocess.run(
            words, env=environment(materials.folder), capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-3000:]
        report = json.loads((tmp_path / "results" / "knowledge-chaos.json").read_text())
        (seen,) = report["cases"].values()
        assert seen["kills"] == KILLS and seen["finished_folders"] > 0
        assert seen["of_other_bytes"] == seen["files_written_again"] == seen["forced_to_end"] == 0
        text = (tmp_path / "results" / "knowledge-chaos.md").read_text()
        assert text == knowledge_chaos.table(report)
