"""Attention over packed rows, one backend a file."""
