"""The search over cuts of stored knowledge: `finetune/search_cuts.py` is its program."""
