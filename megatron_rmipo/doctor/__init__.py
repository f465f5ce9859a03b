"""Whether a machine is fit to train: what is installed, what it has, and whether it computes and communicates right."""
