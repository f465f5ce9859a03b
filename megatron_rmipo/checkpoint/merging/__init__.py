"""Adapters merged into the models that they belong to."""
