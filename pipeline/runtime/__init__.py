"""How a process of the pipeline computes, is interrupted, and says what it was."""
