"""Preference losses inside other people's Megatron models and training loops."""
