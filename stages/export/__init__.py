"""A trained student as a self-contained Hugging Face folder."""
