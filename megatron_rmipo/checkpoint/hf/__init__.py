"""Hugging Face checkpoints: read and written a piece at a time."""
