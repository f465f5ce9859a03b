"""The flags of a run, a file for each of their kinds."""
