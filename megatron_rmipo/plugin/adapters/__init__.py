"""Our objectives as the losses that other programs call: a file a program."""
