"""Grids of fine-tunings: planned, run on Ray, kept in files."""
