"""Groups of conversations through the teacher: their prefixes together, then what follows these, batch by batch."""

from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor

from stages.teacher.batching import PreparedSample
from stages.teacher.prefix_batching import PrefixGroup
from stages.teacher.prefix_forward import Prefixes, run_continuations, run_prefixes

if TYPE_CHECKING:
    from stages.teacher.observe import Observer

WantsMap = Callable[[PrefixGroup], bool]
OnMaps = Callable[[dict[str, tuple[Tensor, ...]]], None]
OnDone = Callable[[Sequence[PreparedSample], Sequence[Tensor | None], Sequence[Tensor | None]], None]


class PrefixRuns:
    """Runs groups with at most a batch of prefixes in memory, in parts if they do not fit into it together.

    Prefixes and samples of a forward pass are counted by the same batch size. Where either does not fit, it is halved,
    and what is left of the groups begins again.
    """

    def __init__(self, observer: "Observer", wants_map: WantsMap, on_maps: OnMaps, on_done: OnDone) -> None:
        """`on_maps` is given the maps that are wanted, `on_done` samples with their records and attention."""
        self._observer, self._wants_map, self._on_maps, self._on_done = observer, wants_map, on_maps, on_done

    def run(self, groups: Sequence[PrefixGroup]) -> None:
        """Runs groups whose prefixes have one padded length; marks samples that do not fit into memory alone."""
        waiting = deque(groups)
        while waiting:
            size = self._observer.batch_size.value
            part = [waiting.popleft() for _ in range(min(size, len(waiting)))]
            waiting.extendleft(reversed(self._run_part(part)))

    def _run_part(self, part: Sequence[PrefixGroup]) -> Sequence[PrefixGroup]:
        """What is left to do, with a smaller batch size."""
        observer, firsts = self._observer, [group.first for group in part]
        wanted = [group.first for group in part if self._wants_map(group)]
        prefixes = observer.attempt(partial(run_prefixes, observer.teacher, firsts, wanted), len(part))
        if prefixes is None and len(part) > 1:
            observer.batch_size.shrink(len(part))
            return part
        if prefixes is None:
            self._refuse(part[0].samples)
            left = []
        else:
            self._on_maps(prefixes.maps)
            prefixes.maps.clear()
            left = self._run_continuations(part, prefixes)
            if not left:
                observer.batch_size.fitted(len(part))
        still_needed = {group.first for group in left}
        for first in firsts:
            if first not in still_needed:
                first.encoded.pixel_inputs.clear()
        return left

    def _run_continuations(self, part: Sequence[PrefixGroup], prefixes: Prefixes) -> list[PrefixGroup]:
        """As `_run_part`."""
        observer, done = self._observer, set[PreparedSample]()
        for batch in self._batches(part):
            rows, samples = [row for row, _ in batch], [sample for _, sample in batch]
            together = max(len(part), len(samples))
            run = partial(run_continuations, observer.teacher, prefixes, rows, samples)
            found = observer.attempt(run, together)
            if found is None and together > 1:
                observer.batch_size.shrink(together)
                left = ((group.first, [one for one in group.samples if one not in done]) for group in part)
                return [PrefixGroup(first, samples) for first, samples in left if samples]
            if found is None:
                self._refuse(samples)
            else:
                self._on_done(samples, *found)
            done.update(samples)
        return []

    def _batches(self, part: Sequence[PrefixGroup]) -> Iterator[list[tuple[int, PreparedSample]]]:
        """Samples with the row of their prefix, by padded length, the longest first."""
        by_length: defaultdict[int, list[tuple[int, PreparedSample]]] = defaultdict(list)
        for row, group in enumerate(part):
            for sample in group.samples:
                by_length[sample.padded_rest].append((row, sample))
        size = self._observer.batch_size.value
        for length in sorted(by_length, reverse=True):
            of_length = by_length[length]
            yield from (of_length[start : start + size] for start in range(0, len(of_length), size))

    def _refuse(self, samples: Sequence[PreparedSample]) -> None:
        for sample in samples:
            sample.fault = "out_of_memory"
        self._on_done(samples, [None] * len(samples), [None] * len(samples))
