"""Who runs what, where, in which order: commands, run files, Ray."""
