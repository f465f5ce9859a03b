"""Megatron-Core's optimizers: their configuration, and in fewer digits without Transformer Engine."""
