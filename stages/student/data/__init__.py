"""From stored samples to batches on the training device."""
