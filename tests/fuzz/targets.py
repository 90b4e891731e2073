"""All that is fuzzed."""

from tests.fuzz import checkpoints, runs, stores
from tests.fuzz.attempt import Target

TARGETS: list[Target] = [*stores.TARGETS, *runs.TARGETS, *checkpoints.TARGETS]
