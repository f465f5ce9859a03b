"""What ranks share: process groups, signals, failures, traces; Megatron-Core without CUDA."""
