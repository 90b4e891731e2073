"""The command line: one file for each command, with its flags, its call and its table."""
