"""One run, from flags to weights."""
