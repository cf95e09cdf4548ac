"""Distillation at the pretraining stage: teacher, student, objectives, the trainer."""
