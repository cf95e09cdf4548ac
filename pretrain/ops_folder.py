"""The folder in which DeepSpeed's ops are built, and the locks that a killed build leaves there."""

import fcntl
import os
from pathlib import Path
from typing import IO

from potstill.console import say


class OpsFolder:
    """Held while this process may build or load ops; `release` when it has them.

    torch marks a build by a file named `lock`, and waits for ever where a process was killed
    before it removed it. All our processes hold a lock of the system's beside it, which ends with
    them: whoever gets that alone knows that nobody builds, and removes what is left.
    """

    def __init__(self) -> None:
        default = Path.home() / ".cache" / "potstill" / "torch_extensions"
        folder = Path(os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(default)))
        self._file: IO[str] | None = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = open(folder / "potstill.lock", "a")
            self._clean(folder, self._file)
        except OSError as error:
            say(f"note: {folder} cannot be locked ({error.strerror}); builds are not watched over")

    def _clean(self, folder: Path, file: IO[str]) -> None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for left in folder.rglob("deepspeed*/lock"):
                left.unlink(missing_ok=True)
        except BlockingIOError:
            pass  # others build or load: their lock is none to remove
        fcntl.flock(file, fcntl.LOCK_SH)

    def release(self) -> None:
        """Say that this process builds and loads no more."""
        if self._file is not None:
            self._file.close()
