"""Whether a store holds what was committed, and how its broken parts are moved to quarantine."""
