"""Puts questions to a model: encodes them, computes what they share once, reads likelihoods or writes answers."""
