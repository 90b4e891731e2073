"""Isolates the samples that the teacher cannot take: runs a shard that failed before one sample at a time.

A sample that raises twice, while the teacher takes another one before and in between, is in the ledger as
`teacher_error`. A sample that kills the process cannot be reported by it: its row is told to `at` first, and whoever
starts the next try names the rows at which processes died. Nothing runs beside the one sample, so nothing else can be
the cause.
"""

from collections.abc import Callable, Collection, Iterable

from stages.teacher.batching import PreparedSample, SamplePreparer
from stages.teacher.observe import Observer, ShardObservations, ShardWork
from stages.teacher.teacher import Teacher
from stages.teacher.timings import Timings
from stages.unusable_sample import Reason, without_addresses
from storage.errors import UserError
from storage.samples.members import StoredSample
from storage.samples.shard_reader import SampleShard
from storage.targets.commits import SkippedSample

NOWHERE = -1
"""Told to `at` while no sample of the shard is in the teacher."""
DETAIL_CHARS = 500
KILLED = "each time this sample was alone in the teacher its process died; `failed_tries` of the report say of what"

_NOT_A_SAMPLES_FAULT = (UserError, OSError, MemoryError)
"""What a disk, an object store, a setting or the machine raises."""


class TeacherUnusable(Exception):
    """The teacher fails on a sample that it took before: the process is in a bad state, as after a GPU fault."""


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
    """Observes a shard as `Observer.observe` does, with the samples at fault in `skipped`.

    On a CPU all other targets are the same as in batches. On a GPU they are what `teacher.batch_size: 1` gives.

    Args:
        teacher: nothing else uses it meanwhile.
        shard: what is observed.
        controls: other samples, by shard and row. The first that the teacher takes is run again whenever a sample
            raises: if it passes, the fault is the sample's and not the teacher's.
        crashing_rows: rows that are left out, with the reason `kills_worker`.
        at: told each row before it is run, and `NOWHERE` when none is.
        progress: called with the number of samples finished since the last call.
        timings: where the time is counted.

    Raises:
        RuntimeError: If the teacher takes none of `controls`.
        TeacherUnusable: If it took one, and no longer does since the row that `at` was told last.
        UserError, OSError, MemoryError: If the fault is not a sample's.
    """
    with Observer(teacher, overlap=False, timings=timings) as observer:
        at(NOWHERE)
        control = _find_control(observer, controls)
        prepare = SamplePreparer(teacher.encoder, shard, observer.timings, teacher.identity.image_rules)
        work = ShardWork(observer, prepare, progress)
        for row in range(len(shard)):
            sample = shard.read(row)
            if row in crashing_rows:
                work.admit(_skipped(sample, "kills_worker", KILLED))
                continue
            at(row)
            if (why := _fault(work, prepare, row, sample)) is None:
                continue
            if control() is not None:
                raise TeacherUnusable(f"since sample {sample.key} the teacher fails on others too: {why}")
            if (why := _fault(work, prepare, row, sample)) is not None:
                work.admit(_skipped(sample, "teacher_error", why))
        at(NOWHERE)
        work.run_orphans()
        return work.finish()


def _fault(work: ShardWork, prepare: SamplePreparer, row: int, stored: StoredSample) -> str | None:
    """What one sample raises; None when the teacher took it, or it is known to be unusable."""
    sample: PreparedSample | SkippedSample | None = None
    try:
        sample = prepare.make(row, stored)
        if work.admit(sample):
            work.run_alone(sample)
    except _NOT_A_SAMPLES_FAULT:
        raise
    except Exception as error:
        if isinstance(sample, PreparedSample):
            work.forget(sample)
        return _text(error)
    return None


def _find_control(observer: Observer, controls: Iterable[tuple[SampleShard, int]]) -> Callable[[], str | None]:
    """Finds a sample that the teacher takes; the returned function runs it again and says what it raises."""
    why: str | None = "there is none"
    for shard, row in controls:
        taught, stored = observer.teacher, shard.read(row)
        prepare = SamplePreparer(taught.encoder, shard, observer.timings, taught.identity.image_rules)

        def control(prepare: SamplePreparer = prepare, row: int = row, stored: StoredSample = stored) -> str | None:
            try:
                sample = prepare.make(row, stored)
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


def _skipped(sample: StoredSample, reason: Reason, detail: str) -> SkippedSample:
    return SkippedSample(sample.key, str(sample.record.get("id", "")), reason, detail)


def _text(error: Exception) -> str:
    return without_addresses(f"{type(error).__name__}: {error}")[:DETAIL_CHARS]
