"""Attention of students and teachers compared, and what it falls on."""
