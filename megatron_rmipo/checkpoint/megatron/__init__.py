"""Megatron checkpoints: directories of them, the torch_dist format, saving and loading a run."""
