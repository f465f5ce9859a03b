"""Turns to token ids: tokenizers, chat templates, the exact boundary between prompt and response."""
