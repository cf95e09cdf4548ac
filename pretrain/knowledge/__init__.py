"""Stored teacher features: what is kept of them, how it lies on disk, and how it is read."""
