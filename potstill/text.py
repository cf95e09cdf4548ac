"""What texts of the user are: whether a line can hold them, whether a name means a folder."""

import re
from pathlib import Path

# Breaks a line, moves a terminal's cursor, or cannot be written as UTF-8 (bytes of a name that are
# not). Joiners and narrow spaces are no fault: names in Persian or French have them.
UNSPEAKABLE = r"\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff"
_UNSPEAKABLE = re.compile(f"[{UNSPEAKABLE}]")


def fits_a_line(text: str) -> bool:
    """Whether a message in one line, or a JSON file, can hold `text`."""
    return not _UNSPEAKABLE.search(text)


def means_a_folder(name: str | Path) -> bool:
    """Whether `name` can only be a folder; `OWNER/NAME` may also be one on the hub."""
    return isinstance(name, Path) or name.startswith((".", "/", "~")) or name.count("/") > 1
