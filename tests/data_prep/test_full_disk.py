"""A disk that is full, or that cannot be written, while the sharder works: a real one, of memory."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.chaos.sharder import can_mount
from tests.data_prep.conftest import quiet_environment

pytestmark = pytest.mark.skipif(
    not can_mount(), reason="this machine lets no process mount a disk of its own (unshare -rm)"
)
# In one process, as a start takes seconds: fill the disk, look, enlarge it, go on, look again.
SCRIPT = """
import contextlib, io, json, subprocess, sys
from pathlib import Path
from data_prep.shard import main

disk, copy, size, *arguments = sys.argv[1:]

def mount(options):
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", disk], check=True)

def attempt():
    errors, status = io.StringIO(), 0
    with contextlib.redirect_stderr(errors):
        try:
            main([*arguments, "--output", disk + "/out"])
        except SystemExit as ended:
            status = ended.code
    files = sorted(str(path.relative_to(disk)) for path in Path(disk).rglob("*") if path.is_file())
    return status, errors.getvalue().splitlines()[-1:], files

mount(f"size={size}")
told = [attempt()]
mount("remount,ro")
told.append(attempt())
mount("remount,rw,size=100m")
told.append(attempt())
subprocess.run(["cp", "-a", disk + "/out", copy], check=True)
print(json.dumps(told))
"""
