"""Checkpoints: Hugging Face in and out, Megatron `torch_dist` in between."""
