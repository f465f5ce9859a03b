"""Adapters in ``torch_dist`` checkpoints, of runs here and of Megatron-Bridge, read by one process without a model."""
