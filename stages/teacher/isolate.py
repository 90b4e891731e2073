"""The samples of a shard one by one, to find those that the teacher cannot take.

For a shard that failed before. A sample that raises, twice, while the teacher takes another one before and in between,
is in the ledger as `teacher_error`. For one that kills the process nobody is left to say so: its row is told to `at`
first, and who starts the next try names the rows that killed. Nothing goes on beside the one sample, so that nothing
else can be meant.
"""

from collections.abc import Callable, Collection, Iterable

from stages.teacher.batching import PreparedSample, SamplePreparer
from stages.teacher.observe import Observer, ShardObservations, ShardWork
from stages.teacher.teacher import Teacher
from stages.teacher.timings import Timings
from storage.errors import UserError
from storage.samples.members import StoredSample
from storage.samples.shard import SampleShard
from storage.targets.sample_targets import SkippedSample

NOWHERE = -1
"""No sample of the shard is in hand."""
DETAIL_CHARS = 500
KILLED = "each time this sample was alone in the teacher its process died; `failed_tries` of the report say of what"

_NOT_A_SAMPLES_FAULT = (UserError, OSError, MemoryError)
"""Of a disk, an object store, a setting, the machine."""


class TeacherUnusable(Exception):
    """The teacher fails on what it took before: the process is in a bad state, as after a fault inside a GPU."""


def run_isolated(
    teacher: Teacher,
    shard: SampleShard,
    *,
    controls: Iterable[tuple[SampleShard, int]],
    crashing_rows: Collection[int],
    at: Callable[[int], None],
    progress: Callable[[int], None] | None = None,
    timings: Timings | None = None,
) -> ShardObservations:
    """As `Observer.observe`, with the samples at fault in `skipped`.

    On a CPU all others are what they are in a batch. On a GPU they are what `teacher.batch_size: 1` gives.

    Args:
        teacher: the loaded teacher; nothing else uses it meanwhile.
        shard: the sample shard.
        controls: other samples, by shard and row. The first that the teacher takes shows, whenever a sample raises,
            that it is the sample and not the teacher.
        crashing_rows: rows that are left out, as `kills_worker`.
        at: told the row before it is touched, and `NOWHERE` when none is.
        progress: called with the number of samples finished since the last call.
        timings: where the time is counted.

    Raises:
        RuntimeError: the teacher takes none of `controls`.
        TeacherUnusable: it did, and does no more, since the row that `at` was told last.
        UserError, OSError, MemoryError: not a sample's fault.
    """
    with Observer(teacher, overlap=False, timings=timings) as observer:
        at(NOWHERE)
        control = _find_control(observer, controls)
        maker = SamplePreparer(teacher.encoder, shard, observer.timings)
        work = ShardWork(observer, maker, progress or (lambda _: None))
        for row in range(len(shard)):
            sample = shard.read(row)
            if row in crashing_rows:
                work.admit(_skipped(sample, "kills_worker", KILLED))
                continue
            at(row)
            if (why := _fault(work, maker, row, sample)) is None:
                continue
            if control() is not None:
                raise TeacherUnusable(f"since sample {sample.key} the teacher fails on others too: {why}")
            if (why := _fault(work, maker, row, sample)) is not None:
                work.admit(_skipped(sample, "teacher_error", why))
        at(NOWHERE)
        work.run_orphans()
        return work.finish()


def _fault(work: ShardWork, maker: SamplePreparer, row: int, stored: StoredSample) -> str | None:
    """What one sample raises; None when it is through, or known to be unusable."""
    ready = None
    try:
        made = maker.make(row, stored)
        if work.admit(made):
            ready = made
            work.run([made])
    except _NOT_A_SAMPLES_FAULT:
        raise
    except Exception as error:
        if ready is not None:
            work.forget(ready)
        return _text(error)
    return None


def _find_control(observer: Observer, controls: Iterable[tuple[SampleShard, int]]) -> Callable[[], str | None]:
    """What runs the first sample that passes once more, and says what it raises."""
    why: str | None = "there is none"
    for shard, row in controls:
        maker, stored = SamplePreparer(observer.teacher.encoder, shard, observer.timings), shard.read(row)

        def control(maker: SamplePreparer = maker, row: int = row, stored: StoredSample = stored) -> str | None:
            try:
                sample = maker.make(row, stored)
                if not isinstance(sample, PreparedSample):
                    return f"{sample.reason}: {sample.detail}"
                observer.try_out(sample)
            except _NOT_A_SAMPLES_FAULT:
                raise
            except Exception as error:
                return _text(error)
            return None

        if (why := control()) is None:
            return control
    raise RuntimeError(f"the teacher fails on other samples too: {why}")


def _skipped(sample: StoredSample, reason: str, detail: str) -> SkippedSample:
    return SkippedSample(sample.key, str(sample.record.get("id", "")), reason, detail)


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:DETAIL_CHARS]
