"""Conversations: their rules, their text by a chat template, and the tokens that a model reads of them."""
