"""A miniature in which attention among image tokens carries what an answer needs, checked before students compare."""
