"""SQuAD v1.1: windows, spans, answers and their scores."""
