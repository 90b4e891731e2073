"""The number of threads that PyTorch computes with, in every thread of ours."""

import torch


def adopt_num_threads() -> None:
    """Makes the calling thread compute with the number of threads that was set in another one.

    Until it asks for that number, a new thread has as many as there are cores, and its matrix products and convolutions
    do not ask (seen with PyTorch 2.13). On some processors their bytes would then depend on the cores.
    """
    torch.get_num_threads()
