"""Two models compared: by a judge that reads their answers, and by what other evaluations found."""
