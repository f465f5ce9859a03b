"""The policy: Megatron-Core GPT model, packed attention, vocabulary-parallel log-probs; what a layout or device cannot do."""
