"""Estimates an extraction with as many workers and threads as it would have here."""

import os
from typing import TYPE_CHECKING

from pipeline.extraction.config import ExtractConfig, threads_per_worker
from pipeline.runtime.cpu_determinism import make_cpu_deterministic
from storage.errors import UserError
from storage.progress import SILENT, Progress
from storage.samples.image_settings import DEFAULT_IMAGES, ImageConfig
from storage.samples.sample_set import SampleSet

if TYPE_CHECKING:
    from stages.estimate.report import Estimate, EstimateConfig
    from stages.teacher.config import TeacherConfig


def make_estimate(
    teacher: "TeacherConfig",
    samples_url: str | None,
    extract: ExtractConfig,
    config: "EstimateConfig",
    images: ImageConfig = DEFAULT_IMAGES,
    *,
    config_only: bool,
    progress: Progress = SILENT,
) -> "Estimate":
    """Estimates bytes and hours of extracting these samples; does not touch the target store.

    Of `extract` the number of workers and their GPUs count; None is as many as this machine has room for. With
    `config_only` the teacher's weights are neither loaded nor looked for, and `samples_url` may be None.

    Raises:
        UserError: If neither samples nor their number are given; or as `estimate_by_measurement` and
            `estimate_from_configs`.
    """
    if samples_url is None and config.samples is None:
        raise UserError(
            "neither sample shards nor how many samples there will be: give --samples, or --set estimate.samples=NUMBER"
        )
    samples = None if samples_url is None else SampleSet.open(samples_url)
    if config_only:
        from stages.estimate.analytic import estimate_from_configs

        return estimate_from_configs(
            teacher,
            samples,
            config,
            images,
            workers=extract.workers or 1,
            gpus_per_worker=extract.gpus_per_worker,
            batches_in_flight=extract.batches_in_flight,
            progress=progress,
        )
    make_cpu_deterministic()
    import torch

    from stages.estimate.measured import estimate_by_measurement

    assert samples is not None
    num_shards = len(samples.index.shards)
    gpus, cpus = torch.cuda.device_count(), os.cpu_count() or 1
    workers = extract.workers or gpus // extract.gpus_per_worker or min(cpus, max(num_shards, 1))
    threads = threads_per_worker(cpus, gpus, min(workers, cpus), num_shards, extract.gpus_per_worker)
    return estimate_by_measurement(
        teacher,
        samples,
        config,
        images,
        workers=workers,
        threads=threads,
        gpus_per_worker=extract.gpus_per_worker,
        progress=progress,
    )
