"""Hugging Face checkpoints: finding, loading and identifying them; new folders for those made here."""
