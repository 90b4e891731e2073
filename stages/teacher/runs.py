"""A batch of whole conversations through the teacher, in parts if it does not fit into memory together."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple, Protocol, TypeVar

from torch import Tensor

from stages.teacher.batching import BatchSize, PreparedSample
from stages.teacher.forward import run_teacher
from stages.teacher.teacher import Teacher

T = TypeVar("T")


class Passed(NamedTuple):
    """What a forward pass gave, as `forward.ForwardOutput` has it; without samples, maps alone."""

    samples: Sequence[PreparedSample]
    logits: Sequence[Tensor | None]
    answers: Sequence[Tensor | None]
    maps: dict[str, tuple[Tensor, ...]]


class Attempt(Protocol):
    """Runs forward passes."""

    def __call__(self, run: Callable[[], T], num_samples: int, /) -> T | None:
        """What one gives; None if its samples do not fit into memory."""


def refused(samples: Sequence[PreparedSample]) -> Passed:
    """Marks samples that do not fit into memory alone."""
    for sample in samples:
        sample.fault = "out_of_memory"
    return Passed(samples, [None] * len(samples), [None] * len(samples), {})


def run_samples(
    teacher: Teacher,
    size: BatchSize,
    attempt: Attempt,
    batch: Sequence[PreparedSample],
    wants_map: Callable[[PreparedSample], bool],
) -> Iterator[Passed]:
    """Runs samples of one padded length; a part that does not fit is halved."""
    waiting = deque(batch)
    while waiting:
        part = [waiting.popleft() for _ in range(min(size.value, len(waiting)))]
        wanted = {sample for sample in part if wants_map(sample)}
        output = attempt(partial(run_teacher, teacher, part, wanted), len(part))
        if output is not None:
            size.fitted(len(part))
            yield Passed(part, output.logits, output.answers, output.maps)
        elif len(part) > 1:
            size.shrink(len(part))
            waiting.extendleft(reversed(part))
        else:
            yield refused(part)
