"""Our log-probs and objectives inside other people's models and training loops."""
