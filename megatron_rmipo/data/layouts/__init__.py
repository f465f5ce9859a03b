"""Rows of any layout -> the turns of a preference pair."""
