"""Answers for the harnesses of others: prompts with pictures in, texts or log-probabilities out."""
