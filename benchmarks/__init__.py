"""Measurements of speed and size: a script each, its figures in `results/`."""
