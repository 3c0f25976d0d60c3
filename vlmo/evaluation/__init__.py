"""Evaluations that are more than a mean over batches."""
