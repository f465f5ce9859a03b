"""Other people's files: rows of any kind of file."""
