"""The whole command with a teacher of two processes, one of which is killed meanwhile."""

import json
import os
import signal
from contextlib import suppress
from pathlib import Path
from threading import Event, Thread

import pytest
import torch

from pipeline.extraction.config import ExtractConfig
from pipeline.extraction.extract import extract
from pipeline.extraction.report import ExtractionReport
from stages.teacher.config import TeacherConfig
from stages.teacher.ranks import RANK_PROCESS
from storage.codecs.answer_logits import AnswerLogitsCodec
from storage.codecs.attention_maps import MapCodec
from storage.integrity.verify import verify
from storage.targets.store import TargetStore
from tests.conftest import NUM_SAMPLES, TinyWorld
from tests.pipeline.in_process import without_ray
from tests.processes import descendants, wait_until_dead

pytestmark = [pytest.mark.usefixtures("ray_address"), pytest.mark.slow]


def ranks() -> list[int]:
    """Processes that hold a part of a teacher beside a worker of this test's cluster."""
    found = []
    for number in descendants(os.getpid()):
        with suppress(OSError):
            if RANK_PROCESS.encode() in Path(f"/proc/{number}/cmdline").read_bytes():
                found.append(number)
    return found


def kill_one(store: Path, seen: list[int], over: Event) -> None:
    """Kills the first rank once a shard is stored, of several; notes it and all that come after."""
    while not over.wait(0.01 if not seen else 0.5):
        if not any((store / "commits").glob("*.json")):
            continue
        found = ranks()
        if found and not seen:
            os.kill(found[0], signal.SIGKILL)
        seen += [number for number in found if number not in seen]


def test_a_store_made_by_two_processes_is_whole_and_that_of_one_but_for_roundings_though_one_was_killed(
    tiny: TinyWorld, tmp_path: Path
) -> None:
    settings = {"batch_size": 2, "map_codec": "float16", "logit_codec": "float16", "answer_attention": True}
    plain = TeacherConfig.model_validate({"checkpoint": str(tiny.teacher), **settings})
    one, two = tmp_path / "one", tmp_path / "two"
    with without_ray():
        extract(plain, str(tiny.samples), str(one), ExtractConfig())
    seen: list[int] = []
    over = Event()
    killer = Thread(target=kill_one, args=(two, seen, over))
    killer.start()
    try:
        asked = plain.model_copy(update={"parallel": "tensor"})
        report = extract(asked, str(tiny.samples), str(two), ExtractConfig(gpus_per_worker=2))
    finally:
        over.set()
        killer.join()
    assert len(seen) == 2, "one was killed, one was started in its place"
    assert all(map(wait_until_dead, seen)), "they end with their worker"
    assert_the_same_but_for_roundings(two, one)
    assert verify(two, tiny.samples).ok
    assert report.samples == NUM_SAMPLES
    assert (report.failures, report.skipped, report.tensor_ranks, report.workers) == ({}, {}, 2, 1)
    tries = [failed for tries in report.failed_tries.values() for failed in tries]
    assert tries
    assert all("rank 1 of the 2 processes of the teacher ended by signal 9" in failed.why for failed in tries)
    saved = ExtractionReport.model_validate_json((two / "reports/extraction.json").read_text())
    assert any("each layer is split over 2 processes" in note for note in saved.notes)
    assert json.loads((two / "manifest.json").read_text())["fingerprint"]["tensor_ranks"] == 2


def assert_the_same_but_for_roundings(found: Path, expected: Path) -> None:
    one, other = TargetStore.open(expected), TargetStore.open(found)
    fingerprint = one.manifest.fingerprint
    assert other.manifest.fingerprint.differences(fingerprint) == ["tensor_ranks"]
    maps = MapCodec.of_layers(fingerprint.map_codec, fingerprint.layers, fingerprint.windows)
    logits = AnswerLogitsCodec(fingerprint.logit_codec)
    num_maps = num_rows = num_same = 0
    for number in one.commits:
        ours, theirs = other.shard(number), one.shard(number)
        assert ours.keys == theirs.keys
        for row in range(len(theirs.map_num_tokens)):
            pair = (maps.decode(each.read_map(row)) for each in (ours, theirs))
            torch.testing.assert_close(*pair, atol=1e-6, rtol=2**-9)
            num_maps += 1
        for row in range(len(theirs)):
            a, b = (each.read(row, with_maps=False)[0] for each in (ours, theirs))
            assert torch.equal(a.token_ids, b.token_ids)
            decoded = [logits.decode(each.logits_RQ) for each in (a, b)]
            same_R = (decoded[0].ids_RK == decoded[1].ids_RK).all(1)
            num_rows, num_same = num_rows + len(same_R), num_same + int(same_R.sum())
            rows = (each.logprobs_RK[same_R].float() for each in decoded)
            torch.testing.assert_close(*rows, atol=2e-2, rtol=2e-3)
    assert num_maps > 4
    assert num_same >= 0.98 * num_rows > 0, "ids of tokens that are about as likely may change places"
