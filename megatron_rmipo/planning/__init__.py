"""Which layout of a model on some machines fits, how long it takes, and which is best: estimates, made without any of them."""
