"""The student as a model: building, loading, what of it is trained, folding."""
