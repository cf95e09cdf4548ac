"""Task-specific distillation: a fine-tuned teacher teaches a student one task."""
