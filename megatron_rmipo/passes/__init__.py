"""Packed rows through Megatron's schedules, and each pair's loss out of them."""
