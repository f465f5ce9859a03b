"""The trainer: entry point, loop, passes, metrics."""
