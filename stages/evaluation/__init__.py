"""Compositional evaluation of a checkpoint: which of two captions fits an image."""
