"""Inputs of the embedded default, made from a seed: a small world of sentences, a tokenizer, a small model."""
