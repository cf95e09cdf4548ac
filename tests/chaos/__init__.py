"""Kills, preemptions, damaged files and bad input, drawn from a seed: one table of it all."""
