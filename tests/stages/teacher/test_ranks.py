"""A teacher of two processes says what one says, also after one of them ran out of memory or was killed."""

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor

from pipeline.demo.assets import TEACHER
from pipeline.demo.scenes.dataset import write_dataset
from stages.estimate.memory import empty_model, teacher_memory
from stages.estimate.report import EstimateConfig
from stages.samples.pack import PackConfig, pack_samples
from stages.teacher.batching import PreparedSample, SamplePreparer
from stages.teacher.config import PrefixReuse, TeacherConfig
from stages.teacher.observe import Observer, ShardObservations
from stages.teacher.prefix_forward import run_continuations, run_prefixes
from stages.teacher.ranks import RankLost
from stages.teacher.teacher import Teacher, load_teacher
from stages.teacher.timings import Timings
from storage.codecs.answer_logits import AnswerLogitsCodec
from storage.samples.sample_set import SampleSet
from tests.processes import wait_until_dead
from tests.stages.teacher.failing_rank import PLAN

pytestmark = pytest.mark.slow

SETTINGS = {"checkpoint": str(TEACHER), "answer_attention": True, "map_codec": "float16", "logit_codec": "float16"}
ROOM = 2
"""Samples for which a rank has memory where it lacks it."""


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    write_dataset(folder / "data", 6, seed=3, num_pairs=1)
    pack_samples(folder / "data/train.json", folder / "data", folder / "samples", PackConfig())
    return folder / "samples"


@pytest.fixture(scope="module")
def one() -> Teacher:
    torch.set_num_threads(1)
    return load_teacher(TeacherConfig.model_validate(SETTINGS))


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("plan") / "plan"


@pytest.fixture(scope="module")
def two(plan: Path) -> Iterator[Teacher]:
    """Its second process fails where `plan` says so."""
    torch.set_num_threads(1)
    plan.write_text("nothing memory 0")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv(PLAN, str(plan))
        patched.setattr("stages.teacher.ranks.RANK_PROCESS", "tests.stages.teacher.failing_rank")
        teacher = load_teacher(TeacherConfig.model_validate({**SETTINGS, "parallel": "tensor"}), num_gpus=2)
        yield teacher
        assert teacher.ranks is not None
        ended = [process.pid for process in teacher.ranks.processes]
        teacher.ranks.end()
    assert all(map(wait_until_dead, ended))


def observe(teacher: Teacher, scenes: Path, way: PrefixReuse) -> ShardObservations:
    """The processes are told the passes alone, so this decides what they are."""
    was, teacher.identity = teacher.identity, replace(teacher.identity, prefix_reuse=way == "on")
    try:
        with SampleSet.open(scenes).shard(0) as shard, Observer(teacher) as observer:
            return observer.observe(shard)
    finally:
        teacher.identity = was


def assert_same_but_for_roundings(found: ShardObservations, expected: ShardObservations, teacher: Teacher) -> None:
    assert [(s.key, s.map_row) for s in found.samples] == [(s.key, s.map_row) for s in expected.samples]
    assert found.skipped == expected.skipped == []
    assert len(found.maps) == len(expected.maps) > 2
    codec, maps = AnswerLogitsCodec(teacher.identity.logit_codec), teacher.identity.map_codec
    for coded, other in zip(found.maps, expected.maps, strict=True):
        torch.testing.assert_close(maps.decode(coded), maps.decode(other), atol=1e-6, rtol=2**-9)
    num_rows = num_other_ids = num_answers = 0
    for ours, theirs in zip(found.samples, expected.samples, strict=True):
        assert torch.equal(ours.token_ids, theirs.token_ids)
        one, other = codec.decode(ours.logits_RQ), codec.decode(theirs.logits_RQ)
        same_R = (one.ids_RK == other.ids_RK).all(1)
        num_rows, num_other_ids = num_rows + len(same_R), num_other_ids + int((~same_R).sum())
        logprobs = (each.logprobs_RK[same_R].float() for each in (one, other))
        torch.testing.assert_close(*logprobs, atol=2e-2, rtol=2e-3)
        if ours.answer_attention_LaN is not None and theirs.answer_attention_LaN is not None:
            num_answers += 1
            attention = (each.float() for each in (ours.answer_attention_LaN, theirs.answer_attention_LaN))
            torch.testing.assert_close(*attention, atol=1e-6, rtol=2**-9)
    assert num_answers > 2
    assert num_other_ids <= 0.01 * num_rows, "ids of tokens that are about as likely may change places"


def test_rank_0_holds_the_weights_that_the_estimate_counts(two: Teacher) -> None:
    held = 0
    for weight in two.model.parameters():
        held += (weight.to_local() if isinstance(weight, DTensor) else weight).nbytes
    model = empty_model(two.identity)
    counted = teacher_memory(two.identity, model, {"image_tokens": 36.0, "maps": 1.0}, EstimateConfig())
    assert counted.gpus == 2
    assert held == pytest.approx(counted.bytes_of_weights_per_gpu, rel=0.02)
    assert held < 0.8 * counted.weight_bytes


@pytest.mark.parametrize("way", ["off", "on"])
def test_two_processes_say_what_one_says_but_for_roundings(
    one: Teacher, two: Teacher, scenes: Path, way: PrefixReuse
) -> None:
    found, expected = observe(two, scenes, way), observe(one, scenes, way)
    assert_same_but_for_roundings(found, expected, one)
    pairs = zip(found.maps, expected.maps, strict=True)
    assert any(not torch.equal(ours.codes_LC, theirs.codes_LC) for ours, theirs in pairs), "sums are in another order"


def test_students_get_the_vision_tower_of_a_split_teacher_in_the_bytes_of_a_whole_one(
    one: Teacher, two: Teacher, tmp_path: Path
) -> None:
    for name, teacher in (("one", one), ("two", two)):
        teacher.save_vision(tmp_path / name)
    files = [{file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in ("one", "two")]
    assert files[0] == files[1]
    assert "model.safetensors" in files[0]


def test_a_batch_for_which_another_process_has_no_memory_is_run_in_parts_after_all_were_started_again(
    one: Teacher, two: Teacher, scenes: Path, plan: Path
) -> None:
    assert two.ranks is not None
    before = [process.pid for process in two.ranks.processes]
    plan.write_text(f"run_teacher memory {ROOM}")
    found = observe(two, scenes, "off")
    plan.write_text("nothing memory 0")
    assert [process.pid for process in two.ranks.processes] != before
    assert_same_but_for_roundings(found, observe(one, scenes, "off"), one)


def test_after_a_process_was_killed_the_pass_fails_within_seconds_and_the_next_goes_on_from_the_same_prefixes(
    one: Teacher, two: Teacher, scenes: Path, plan: Path
) -> None:
    samples = prepared(two, scenes)
    expected = run_continuations(one, run_prefixes(one, samples[:1], ()), [0], samples[:1])
    prefixes = run_prefixes(two, samples[:1], ())
    plan.write_text("run_continuations kill 0")
    began = time.monotonic()
    with pytest.raises(RankLost, match=r"rank 1 of the 2 processes of the teacher ended by signal 9; .* started again"):
        run_continuations(two, prefixes, [0], samples[:1])
    assert time.monotonic() - began < 20
    plan.write_text("nothing memory 0")
    found = run_continuations(two, prefixes, [0], samples[:1])
    assert found[1][0] is not None
    assert expected[1][0] is not None
    torch.testing.assert_close(found[1][0].float(), expected[1][0].float(), atol=1e-6, rtol=2**-9)
    codec = AnswerLogitsCodec(one.identity.logit_codec)
    assert found[0][0] is not None
    assert expected[0][0] is not None
    rows = [codec.decode(each[0][0]).logprobs_RK[:, :5].float() for each in (found, expected)]
    torch.testing.assert_close(*rows, atol=2e-2, rtol=2e-3)


def prepared(teacher: Teacher, scenes: Path) -> list[PreparedSample]:
    with SampleSet.open(scenes).shard(0) as shard:
        made = map(SamplePreparer(teacher.encoder, shard, Timings()), range(len(shard)))
        return [sample for sample in made if isinstance(sample, PreparedSample) and sample.map_key is not None]
