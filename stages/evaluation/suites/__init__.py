"""One file a suite: its files, what it asks, how answers count; what they share stands beside them."""
