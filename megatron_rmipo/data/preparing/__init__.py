"""From rows to prepared data, by many processes, with what was left out and why; the commands that do it and show it."""
