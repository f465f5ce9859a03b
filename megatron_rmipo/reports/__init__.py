"""What a run shows: records, the progress line, traces; what runs are compared by."""
