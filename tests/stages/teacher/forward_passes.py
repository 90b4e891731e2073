"""Does something before the teacher's forward passes: stands in for a sample or a device that makes them fail."""

from collections.abc import Callable, Sequence
from typing import Any

import stages.teacher.observe
import stages.teacher.prefix_runs
import stages.teacher.runs
from stages.teacher.batching import PreparedSample

Meet = Callable[[Sequence[PreparedSample]], None]


def before_each_pass(
    replace: Callable[[Any, str, Any], None], meet: Meet, *, meet_prefixes: Meet | None = None
) -> None:
    """Calls `meet` with the samples that are about to enter the teacher, as a whole or what follows their prefix.

    `meet_prefixes` is called with one sample for each prefix that is about to enter it. `replace` is `setattr`, or that
    of a `MonkeyPatch`.
    """
    modules = stages.teacher.observe, stages.teacher.prefix_runs
    whole, prefixes, behind = (
        getattr(modules[0], name) for name in ("run_teacher", "run_prefixes", "run_continuations")
    )

    def run_teacher(teacher: Any, batch: Sequence[PreparedSample], *rest: Any) -> Any:
        meet(batch)
        return whole(teacher, batch, *rest)

    def run_prefixes(teacher: Any, firsts: Sequence[PreparedSample], *rest: Any) -> Any:
        if meet_prefixes is not None:
            meet_prefixes(firsts)
        return prefixes(teacher, firsts, *rest)

    def run_continuations(teacher: Any, of: Any, rows: Any, batch: Sequence[PreparedSample]) -> Any:
        meet(batch)
        return behind(teacher, of, rows, batch)

    for module in (stages.teacher.observe, stages.teacher.runs):
        replace(module, "run_teacher", run_teacher)
    for module in modules:
        replace(module, "run_prefixes", run_prefixes)
        replace(module, "run_continuations", run_continuations)
