"""Log-probs of data sets: those of a reference, computed once and kept."""
