"""`cdp compare-attention`: teacher and students on the same samples, in numbers."""
