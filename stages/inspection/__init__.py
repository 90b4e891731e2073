"""One stored sample as people read it: its tokens, its attention maps, what the teacher predicts."""
