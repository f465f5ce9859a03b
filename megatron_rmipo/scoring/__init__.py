"""Log-probs of whole data sets: those of a reference, computed once and kept."""
