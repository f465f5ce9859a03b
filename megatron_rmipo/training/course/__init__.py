"""What a run does between its steps: it evaluates, keeps its best, stops early, answers prompts."""
