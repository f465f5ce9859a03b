"""Measurements beside a plain baseline that lives here; see README.md. Run from the root of the repository."""
