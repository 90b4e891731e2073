"""Students: their model, what they are trained on, the losses and the training loop.

Letters at the end of names are axes: docs/architecture.md#shape-letters.
"""
