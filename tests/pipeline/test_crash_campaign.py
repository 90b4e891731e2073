"""Kill anything at any moment, run the same command again: the same bytes as without the kill.

Smaller campaigns than `python -m benchmarks.crash_campaign`, whose outcome is in `benchmarks/results`.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from stages.samples.pack import PackConfig, pack_samples
from tests.checkpoints import make_llava_data
from tests.conftest import TinyWorld
from tests.pipeline.cluster.ray_kills import RayCampaign

PATIENCE_S = 580
pytestmark = [pytest.mark.slow, pytest.mark.timeout(PATIENCE_S + 20)]

CAMPAIGN = """
import json, sys
from pathlib import Path
from tests.pipeline import crash_points as points
folder, targets, name, arguments = sys.argv[1:]
place = points.Place(points.make_world(Path(folder)), targets)
print("outcome:" + json.dumps(vars(getattr(points, name)(place, **json.loads(arguments)))))
"""

UNDISTURBED = """
import json, sys
from pathlib import Path
from tests.pipeline import crash_points as points
teacher, samples, targets = sys.argv[1:]
print("outcome:" + json.dumps(points.Place(points.World.load(Path(teacher), Path(samples)), targets).finish()))
"""


def outcome(code: str, *arguments: object, cache: Path) -> dict[str, Any]:
    """What the code prints, run in a process that forks without anything that does not bear it."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "CDP_CACHE_DIR": str(cache)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.partition("outcome:")[2])
    assert isinstance(found, dict)
    return found


def campaign(folder: Path, targets: str, name: str, **arguments: Any) -> dict[str, Any]:
    return outcome(CAMPAIGN, folder, targets, name, json.dumps(arguments), cache=folder / "cache")


def test_a_local_store_survives_a_kill_before_every_seventh_operation_that_others_can_see(tmp_path: Path) -> None:
    tally = campaign(tmp_path, str(tmp_path / "store"), "at_every_operation", staged=False, stride=7)
    assert tally["lives_killed"] == (tally["operations"] + 6) // 7 > 10
    assert {"link commits, staged", "rename shards, staged", "rename teacher, staged"} & tally["died_before"].keys()


def test_a_store_survives_kills_of_drivers_actors_and_whole_clusters(tiny: TinyWorld, tmp_path: Path) -> None:
    data, images = make_llava_data(tmp_path / "data", 30)
    pack_samples(data, images, tmp_path / "samples", PackConfig(max_samples_per_shard=3))
    # Made without Ray.
    expected = outcome(UNDISTURBED, tiny.teacher, tmp_path / "samples", tmp_path / "undisturbed", cache=tmp_path)
    kills = RayCampaign(tiny.teacher, tmp_path / "samples", expected, tmp_path, seed=1)
    tally = kills.run(["driver", "cluster"], actor_kills=2)
    assert tally.stores >= 1
    assert tally.came_through + tally.kills["driver"] + tally.kills["cluster"] == tally.lives
    assert tally.orphans == []
