"""Sample shards: conversations and their images as WebDataset tars with their member tables and an index."""
