"""Training, evaluation, prediction, and what they write to disk."""
