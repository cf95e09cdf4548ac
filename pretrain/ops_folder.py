"""The folder in which DeepSpeed's ops are built, and the locks that a killed build leaves there."""

import fcntl
import os
from pathlib import Path
from typing import IO


class OpsFolder:
    """Held while this process may build or load ops; `release` when it has them.

    torch marks a build by a file named `lock`, and waits for ever where a process was killed
    before it removed it. All our processes hold a lock of the system's beside it, which ends with
    them: whoever gets that alone knows that nobody builds, and removes what is left.
    """

    def __init__(self) -> None:
        default = Path.home() / ".cache" / "potstill" / "torch_extensions"
        self.path = Path(os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(default)))
        self.path.mkdir(parents=True, exist_ok=True)
        self._file: IO[str] = open(self.path / "potstill.lock", "a")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for left in self.path.rglob("lock"):
                left.unlink(missing_ok=True)
        except BlockingIOError:
            pass  # others build or load: their lock is none to remove
        fcntl.flock(self._file, fcntl.LOCK_SH)

    def release(self) -> None:
        """Say that this process builds and loads no more."""
        self._file.close()
