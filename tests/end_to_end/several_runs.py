"""Several runs of pretrain/run.py behind one another, in one start of the launcher.

several_runs.py RUNS.json     a list of argument lists
"""

import json
import sys
from pathlib import Path

from torch import distributed as dist

from pretrain import run


def main() -> None:
    """Do the runs in order; the ranks stay together between them."""
    dist.destroy_process_group = lambda: None
    for arguments in json.loads(Path(sys.argv[-1]).read_text()):
        sys.argv = ["pretrain/run.py", *arguments]
        run.main()


if __name__ == "__main__":
    main()
