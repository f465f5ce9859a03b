"""Judge-free evaluation: which of two answers a model's log-probs prefer, on any preference set."""
