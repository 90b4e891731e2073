"""Attention maps over image tokens: which layers are chosen, which can be captured, and the capture."""
