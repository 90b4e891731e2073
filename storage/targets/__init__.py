"""The target store: what the teacher said of each sample, as one committed Zarr group a shard."""
