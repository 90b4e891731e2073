"""Running tasks on a Ray cluster. The only folder that imports ray."""
