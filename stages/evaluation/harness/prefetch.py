"""Encodes one batch ahead of the one that a model works on."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")
Encoded = TypeVar("Encoded")


def batches_ahead(
    items: Iterable[Item], encode: Callable[[Item], Encoded], batch_size: int, num_threads: int
) -> Iterator[list[Encoded]]:
    """Encoded items in their order, in batches; threads encode the next batch while the caller uses one.

    At most two batches of items are taken at one time, in the thread of the caller. The first error of `encode`, in
    this order, is raised when its batch is asked for.
    """
    pending: deque[Future[Encoded]] = deque()
    waiting = iter(items)
    with ThreadPoolExecutor(num_threads) as pool:
        while True:
            room = 2 * batch_size - len(pending)
            pending += [pool.submit(encode, item) for item in islice(waiting, room)]
            if not pending:
                return
            yield [pending.popleft().result() for _ in range(min(batch_size, len(pending)))]
