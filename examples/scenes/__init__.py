"""A small world to distill in: drawn images, their language, a teacher, a language model to start from."""
