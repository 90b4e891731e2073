"""Data files: their records in order, and each of them once more."""
