"""Functions of tensors that turn what the teacher said into small bytes and back; they import torch only.

Their names end in letters of shapes, which docs/architecture.md#shape-letters explains.
"""
