"""Data files: their records in order."""
