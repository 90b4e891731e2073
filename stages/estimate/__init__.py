"""What an extraction will cost, before anything is written."""
