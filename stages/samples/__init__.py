"""Conversations and images to sample shards: read, validate, group by image, pack."""
