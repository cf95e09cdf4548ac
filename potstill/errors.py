"""The errors that a user can meet.

PotstillError          something stopped the program that is not a bug
├── InputError         bad usage or bad input, found before long work starts (exit status 2)
└── TrainingError      a run that cannot go on, for example a non-finite loss (exit status 1)
"""


class PotstillError(Exception):
    """Base of all errors raised on purpose; the message is one line a person can act on."""

    exit_status = 1


class InputError(PotstillError):
    """Bad usage or bad input: names the file or flag, what was found, and the remedy."""

    exit_status = 2


class TrainingError(PotstillError):
    """Training cannot go on; everything saved so far stays as it is."""
