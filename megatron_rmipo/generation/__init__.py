"""Answers of a model to the prompts of a benchmark, in the form that the benchmark's judge reads."""
