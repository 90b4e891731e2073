import json

from benchmarks.crash_campaign import RANDOM_SHARDS
from benchmarks.results import RESULTS


def test_the_saved_campaign_killed_extraction_at_random_far_more_than_thirty_times() -> None:
    parts = json.loads((RESULTS / "crash_campaign.json").read_text())["parts"]
    for name in ("random_moments", "random_operations"):
        assert parts[name]["shards"] == RANDOM_SHARDS >= 5
        assert parts[name]["lives_killed"] >= 100
    for name in ("local_operations", "staged_operations", "s3_operations"):
        assert parts[name]["lives_killed"] >= 30
    training = parts["training"]
    assert training["kills"] == {"dpt": 20, "dft": 20, "sft": 20}
    # Not all in the same step.
    assert all(len(set(steps)) >= 3 for steps in training["killed_after"].values())
    kills = parts["ray"]["kills"]
    assert sum(kills.values()) >= 30
    assert min(kills["driver"], kills["cluster"]) >= 1
    assert parts["ray"]["orphans"] == []
