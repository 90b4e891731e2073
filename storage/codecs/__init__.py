"""Functions of tensors that turn what the teacher said into small bytes and back; they import torch only."""
