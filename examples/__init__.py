"""Bundled examples: data sets and models that the commands can be tried on."""
