"""What an epoch reads: which samples, in which order, joined from tars and target shards."""
