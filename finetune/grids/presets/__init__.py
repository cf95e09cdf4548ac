"""The papers' fine-tuning grids, for `finetune/grid.py --preset`."""
