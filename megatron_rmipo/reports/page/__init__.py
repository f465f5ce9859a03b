"""The report of runs: one page of HTML that needs nothing beside it."""
