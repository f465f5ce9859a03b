"""What one rank writes of a run and reads of it: its pieces of the optimizer's state, its random states, and its writers."""
