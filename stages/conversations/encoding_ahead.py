"""Encodes ahead of a model that works on what was encoded before."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")
Encoded = TypeVar("Encoded")


def encoded_ahead(
    items: Iterable[Item], encode: Callable[[Item], Encoded], num_ahead: int, num_threads: int
) -> Iterator[Encoded]:
    """Encoded items in their order; threads encode the next ones while the caller uses one.

    With the one that is asked for, at most `num_ahead` items are held, and they are taken in the thread of the caller.
    The first error of `encode`, in this order, is raised in the place of its item.
    """
    pending: deque[Future[Encoded]] = deque()
    waiting = iter(items)
    with ThreadPoolExecutor(num_threads) as pool:
        while True:
            pending += [pool.submit(encode, item) for item in islice(waiting, num_ahead - len(pending))]
            if not pending:
                return
            yield pending.popleft().result()


def batches_ahead(
    items: Iterable[Item], encode: Callable[[Item], Encoded], batch_size: int, num_threads: int
) -> Iterator[list[Encoded]]:
    """`encoded_ahead` in batches; one more batch is encoded while the caller uses one."""
    ahead = encoded_ahead(items, encode, batch_size + 1, num_threads)
    while batch := list(islice(ahead, batch_size)):
        yield batch
