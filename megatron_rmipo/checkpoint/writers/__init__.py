"""Processes that write a checkpoint's files: what they write is hashed on its way, and they may do it beside the training."""
