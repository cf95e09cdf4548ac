"""Fine-tuning of students and teachers on tasks, and their results."""
