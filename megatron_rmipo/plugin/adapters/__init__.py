"""Other people's training programs: what each of them wants said of ours."""
