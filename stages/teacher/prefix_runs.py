"""Groups of conversations through the teacher: their prefixes together, then what follows these, batch by batch."""

from collections import defaultdict, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial

from stages.teacher.batching import BatchSize, PreparedSample
from stages.teacher.prefix_batching import PrefixGroup
from stages.teacher.prefix_forward import Prefixes, run_continuations, run_prefixes
from stages.teacher.runs import Attempt, Passed, refused
from stages.teacher.teacher import Teacher

WantsMap = Callable[[PrefixGroup], bool]


class PrefixRuns:
    """Runs groups with at most a batch of prefixes in memory, in parts if they do not fit into it together.

    Prefixes and samples of a forward pass are counted by the same batch size. Where either does not fit, it is halved,
    and what is left of the groups begins again.
    """

    def __init__(self, teacher: Teacher, size: BatchSize, attempt: Attempt, wants_map: WantsMap) -> None:
        self._teacher, self._size, self._attempt, self._wants_map = teacher, size, attempt, wants_map

    def run(self, groups: Sequence[PrefixGroup]) -> Iterator[Passed]:
        """Runs groups whose prefixes have one padded length; what each forward pass gave, maps before samples."""
        waiting = deque(groups)
        while waiting:
            part = [waiting.popleft() for _ in range(min(self._size.value, len(waiting)))]
            left = yield from self._run_part(part)
            waiting.extendleft(reversed(left))

    def _run_part(self, part: Sequence[PrefixGroup]) -> Generator[Passed, None, Sequence[PrefixGroup]]:
        """Returns what is left to do, with a smaller batch size."""
        firsts = [group.first for group in part]
        wanted = [group.first for group in part if self._wants_map(group)]
        prefixes = self._attempt(partial(run_prefixes, self._teacher, firsts, wanted), len(part))
        if prefixes is None and len(part) > 1:
            self._size.shrink(len(part))
            return part
        if prefixes is None:
            yield refused(part[0].samples)
            return []
        yield Passed([], [], [], dict(prefixes.maps))
        prefixes.maps.clear()
        left = yield from self._run_continuations(part, prefixes)
        if not left:
            self._size.fitted(len(part))
        return left

    def _run_continuations(
        self, part: Sequence[PrefixGroup], prefixes: Prefixes
    ) -> Generator[Passed, None, Sequence[PrefixGroup]]:
        """As `_run_part`."""
        done = set[PreparedSample]()
        for batch in self._batches(part):
            rows, samples = [row for row, _ in batch], [sample for _, sample in batch]
            together = max(len(part), len(samples))
            found = self._attempt(partial(run_continuations, self._teacher, prefixes, rows, samples), together)
            if found is None and together > 1:
                self._size.shrink(together)
                left = ((group.first, [one for one in group.samples if one not in done]) for group in part)
                return [PrefixGroup(first, samples) for first, samples in left if samples]
            yield refused(samples) if found is None else Passed(samples, *found, {})
            done.update(samples)
        return []

    def _batches(self, part: Sequence[PrefixGroup]) -> Iterator[list[tuple[int, PreparedSample]]]:
        """Samples with the row of their prefix, by padded length, the longest first."""
        by_length: defaultdict[int, list[tuple[int, PreparedSample]]] = defaultdict(list)
        for row, group in enumerate(part):
            for sample in group.samples:
                by_length[sample.padded_rest].append((row, sample))
        size = self._size.value
        for length in sorted(by_length, reverse=True):
            of_length = by_length[length]
            yield from (of_length[start : start + size] for start in range(0, len(of_length), size))
