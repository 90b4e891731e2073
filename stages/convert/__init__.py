"""Released checkpoints of the method's authors and of TinyLLaVA -> Hugging Face folders that the project reads."""
