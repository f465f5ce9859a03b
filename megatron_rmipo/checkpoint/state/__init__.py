"""The state of a run on a rank, as Megatron-Core writes and reads it: the pieces of its optimizer, its random generators."""
