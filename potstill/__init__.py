"""What more than one of Potstill's programs calls: errors, atomic files, the console."""

__version__ = "0.1.0"
