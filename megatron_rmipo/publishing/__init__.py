"""What a model needs to be understood and used by others: its card, and its way to the Hugging Face Hub."""
