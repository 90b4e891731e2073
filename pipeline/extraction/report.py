"""What an extraction says of itself, and when that makes its command fail."""

from collections import Counter

from pydantic import Field

from pipeline.cluster.task_queue import FailedTry
from pipeline.cluster.worker import Outcome, Worker
from pipeline.extraction.config import ExtractConfig
from pipeline.extraction.tally import ExtractionTally
from stages.teacher.timings import idle_shares, waited_share
from storage.errors import TooManySkipped, UserError
from storage.strict_model import StrictModel

REPORT, RUN_FILE = "reports/extraction.json", "reports/run.yaml"
SHOWN_FAILURES = 20


class WorkerReport(StrictModel):
    """One worker of a run: a process with a teacher in it."""

    node: str
    pid: int
    shards: int
    samples: int
    seconds: float
    """From the moment its teacher was loaded."""
    samples_per_s: float
    failed_tries: int
    timings: dict[str, float]
    """Seconds, by what it spent them on; as it says itself, so empty for one that died before its first shard."""
    waited_share: float | None
    """Part of the time since its first forward pass in which its teacher stood idle; None before that."""
    gpu_idle_shares: dict[str, float] = Field(default_factory=dict)
    """GPU -> part of that time in which it had nothing to do, by its own clock; empty on a CPU."""
    ended: str
    """Why it ended."""


class ExtractionReport(StrictModel):
    """What a run of `cdp extract-teacher` did; saved in the store as `reports/extraction.json`."""

    shards: int
    shards_made_now: int
    samples: int
    skipped: dict[str, int]
    answer_tokens: int
    cut_samples: int
    """Samples that lost answer tokens because they are longer than `teacher.max_length`."""
    cut_answer_tokens: int
    """How many they lost."""
    maps: int
    turned: int
    """Samples with a picture that EXIF data turn."""
    bytes: int
    seconds: float
    samples_per_s: float
    workers: int
    """The most that worked at one time."""
    gpus_per_worker: int = 1
    """GPUs, or processes without any, that held one teacher."""
    tensor_ranks: int = 1
    """Processes over which each of its layers was split."""
    per_worker: tuple[WorkerReport, ...]
    """Every worker that ever was, those that died included."""
    failed_starts: dict[str, int]
    """Why workers did not start, and where -> how many times; such as a node that joined with another teacher on it."""
    failed_tries: dict[int, tuple[FailedTry, ...]]
    """Shard -> each try of it that failed, where and why; shards that succeeded later are among them."""
    failures: dict[int, str]
    """Shard given up -> its last error."""
    notes: tuple[str, ...] = ()
    """What students will not learn from these targets; said before the first shard, too."""


def make_report(
    config: ExtractConfig,
    num_shards: int,
    tally: ExtractionTally,
    outcome: Outcome,
    notes: tuple[str, ...],
    seconds: float,
    num_ranks: int = 1,
) -> ExtractionReport:
    """Makes the report of a run that ended; `num_shards` are those that the store holds now."""
    return ExtractionReport(
        shards=num_shards,
        shards_made_now=len(tally.new_shards),
        samples=tally.samples,
        skipped=dict(tally.skipped),
        answer_tokens=tally.answer_tokens,
        cut_samples=tally.cut_samples,
        cut_answer_tokens=tally.cut_answer_tokens,
        maps=tally.maps,
        turned=tally.turned,
        bytes=tally.bytes,
        seconds=seconds,
        samples_per_s=tally.new_samples / seconds,
        workers=tally.max_workers,
        gpus_per_worker=config.gpus_per_worker,
        tensor_ranks=num_ranks,
        per_worker=tuple(_worker_report(worker) for worker in outcome.workers),
        failed_starts=outcome.failed_starts,
        failed_tries={shard: tuple(tries) for shard, tries in sorted(outcome.tries.items())},
        failures=outcome.failures,
        notes=notes,
    )


def check_report(report: ExtractionReport, config: ExtractConfig, targets_url: str, num_planned: int) -> None:
    """Refuses a run that gave up or lost shards or skipped too many samples; a complete store has `num_planned` shards.

    Raises:
        UserError: If a shard failed on every attempt, or one that was committed is there no more.
        TooManySkipped: If more samples are unusable than the settings allow.
    """
    if report.failures:
        failures = sorted(report.failures.items())
        lines = [f"  shard {shard}: {why}" for shard, why in failures[:SHOWN_FAILURES]]
        if len(failures) > SHOWN_FAILURES:
            lines.append(f"  and {len(failures) - SHOWN_FAILURES} more")
        raise UserError(
            f"{len(failures)} of {num_planned} shards could not be made; the others are stored. "
            f"Every try is in {targets_url}/{REPORT}. "
            "Run the same command again when the cause is mended:\n" + "\n".join(lines)
        )
    if report.shards < num_planned:
        raise UserError(
            f"{num_planned - report.shards:,} of {num_planned:,} shards are not stored in {targets_url}, though none "
            "of them failed: their records were removed while this ran, as `cdp verify --repair` removes broken ones. "
            "Run the same command again to make them"
        )
    num_skipped = sum(report.skipped.values())
    num_samples = num_skipped + report.samples
    if num_skipped > config.max_skipped_fraction * num_samples:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in Counter(report.skipped).most_common())
        raise TooManySkipped(
            f"{num_skipped} of {num_samples} samples could not be used ({reasons}), allowed is a fraction of "
            f"{config.max_skipped_fraction}. They are named with their reasons in {targets_url}/commits/*.json; all "
            "others are stored. Accept them with --set extract.max_skipped_fraction=FRACTION"
        )


def _worker_report(worker: Worker) -> WorkerReport:
    return WorkerReport(
        node=worker.node,
        pid=worker.pid,
        shards=worker.num_tasks,
        samples=worker.num_units,
        seconds=worker.seconds,
        samples_per_s=worker.num_units / max(worker.seconds, 1e-9),
        failed_tries=worker.num_failures,
        timings=worker.timings,
        waited_share=waited_share(worker.timings),
        gpu_idle_shares=idle_shares(worker.timings),
        ended=worker.ended,
    )
