"""All that is fuzzed."""

from tests.fuzz import attention, checkpoints, images, report, results, runs, stores
from tests.fuzz.attempt import Target

TARGETS: list[Target] = [
    *stores.TARGETS,
    *runs.TARGETS,
    *results.TARGETS,
    *checkpoints.TARGETS,
    *images.TARGETS,
    *attention.TARGETS,
    *report.TARGETS,
]
