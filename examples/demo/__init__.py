"""The main job end to end, small: `make demo`, or `python -m examples.demo --output demo`."""
