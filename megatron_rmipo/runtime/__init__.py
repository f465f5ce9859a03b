"""Process groups, and Megatron-Core on a machine without CUDA."""
