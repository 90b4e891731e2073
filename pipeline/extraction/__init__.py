"""Extraction of targets from a teacher: settings, workers, progress, report, and its estimate."""
