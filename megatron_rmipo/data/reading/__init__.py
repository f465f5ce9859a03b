"""Other people's files: rows of any format to turns of a preference pair."""
