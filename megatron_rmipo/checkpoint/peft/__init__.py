"""Adapters in Hugging Face PEFT's form: read, written, and what they make of weights."""
