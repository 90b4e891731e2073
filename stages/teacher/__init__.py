"""The teacher: loading it, and what it says of a sample."""
