"""Pictures of runs, one style: what is drawn, from what; who asks for them is elsewhere."""
