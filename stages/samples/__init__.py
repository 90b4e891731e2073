"""LLaVA data to sample shards: read, validate, group by image, pack."""
