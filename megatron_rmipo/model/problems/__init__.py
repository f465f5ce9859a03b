"""Which layouts and machines a model cannot be run on, before it is built."""
