"""Prepared data on the disk: Megatron's ``.bin``/``.idx``, and what lies beside it."""
