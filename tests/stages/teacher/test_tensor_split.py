"""Which teachers are split over processes, what a store says of it, and what is refused before anything is loaded."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.cluster.connection import Cluster
from pipeline.extraction.config import ExtractConfig
from pipeline.extraction.extract import extract
from pipeline.preflight import check_extraction
from stages.checkpoints.configs import load_config
from stages.teacher import ranks as ranks_module
from stages.teacher.config import TeacherConfig, ranks_of
from stages.teacher.identity import identify_teacher
from stages.teacher.ranks import RankLost, Ranks
from stages.teacher.tensor_split import check_split
from storage.errors import FingerprintMismatch, UserError
from storage.samples.image_settings import DEFAULT_IMAGES
from storage.stores import open_store
from storage.streaming.source_checks import check_mixable
from storage.targets.manifest import MANIFEST_PATH, Manifest
from tests.checkpoints import make_tiny_llava
from tests.conftest import TinyWorld
from tests.pipeline.in_process import without_ray
from tests.tiny_families import make_tiny_family


def split(checkpoint: Path, **settings: object) -> TeacherConfig:
    return TeacherConfig.model_validate({"checkpoint": str(checkpoint), "parallel": "tensor", **settings})


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4 heads, 2 of keys and values."""
    return make_tiny_llava(tmp_path_factory.mktemp("split") / "llava", heads=4, kv_heads=2)


def refusal(checkpoint: Path, num_ranks: int, **changes: object) -> str:
    config = load_config(checkpoint)
    for name, value in changes.items():
        setattr(config, name, value)
    with pytest.raises(UserError) as caught:
        check_split(config, checkpoint, num_ranks, trust_remote_code=False)
    assert "set teacher.parallel to layers" in str(caught.value)
    return str(caught.value)


def test_a_teacher_that_cannot_be_split_so_is_refused_with_what_can_be_done(llava: Path, tmp_path: Path) -> None:
    config = load_config(llava)
    check_split(config, llava, 2, trust_remote_code=False)
    assert "4 heads with 2 of keys and values, which do not divide by 3; set extract.gpus_per_worker to one that divides both (2)" in refusal(llava, 3)  # fmt: skip  # noqa: E501
    assert "4 heads with 2" in refusal(llava, 4), "each rank must have heads of keys"
    scheme = {"quant_method": "gptq", "bits": 4}
    assert "it is quantized (gptq, 4 bits)" in refusal(llava, 2, quantization_config=scheme)
    with pytest.raises(
        UserError, match=r"how code of a checkpoint splits is not known; set teacher.parallel to layers"
    ):
        check_split(config, llava, 2, trust_remote_code=True)
    experts = make_tiny_family(tmp_path / "experts", "glm4v_moe")
    assert "its decoder is of type glm4v_moe_text, known to work are gemma3_text, " in refusal(experts, 2)


def test_a_version_of_the_library_without_a_plan_for_the_decoder_is_refused(llava: Path) -> None:
    config = load_config(llava)
    config.text_config.base_model_tp_plan = {"layers.*.self_attn.q_proj": "colwise"}
    with pytest.raises(UserError, match=r"the plan of this version .* does not split k_proj, v_proj, o_proj"):
        check_split(config, llava, 2, trust_remote_code=False)


def test_nothing_to_split_over_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    nowhere = TeacherConfig(checkpoint=str(tmp_path / "no such teacher"), parallel="tensor")
    with pytest.raises(UserError, match=r"extract.gpus_per_worker is 1: set it to 2 or more, or teacher.parallel to"):
        check_extraction(nowhere, "no samples", str(tmp_path / "store"), ExtractConfig(), DEFAULT_IMAGES)
    assert ranks_of(TeacherConfig(checkpoint="x"), 4) == 1, "layers in a row are in one process"


def test_a_cluster_without_gpus_and_with_too_few_cores_is_refused() -> None:
    Cluster(cpus=2, gpus=0).check_room(2, 2)
    with pytest.raises(UserError, match=r"a worker of 3 processes .* takes as many cores, and the cluster has 2"):
        Cluster(cpus=2, gpus=0).check_room(3, 3)
    with pytest.raises(UserError, match="a worker of 2 GPUs"):
        Cluster(cpus=8, gpus=1, gpus_of_a_node=1).check_room(2, 2)


def test_a_store_says_over_how_many_processes_its_teacher_was_split_and_is_as_before_where_it_was_not(
    llava: Path, tmp_path: Path
) -> None:
    plain, two, again = (
        identify_teacher(split(llava), on_gpu=False, num_ranks=number).manifest("samples", 1) for number in (1, 2, 1)
    )
    assert b"tensor" not in plain.to_bytes()
    assert b'"tensor_ranks":2' in two.to_bytes()
    assert plain == again
    assert two.fingerprint.differences(plain.fingerprint) == ["tensor_ranks"]
    open_store(tmp_path).write(MANIFEST_PATH, two.to_bytes())
    assert Manifest.load(open_store(tmp_path)) == two
    check_mixable([("a", plain.fingerprint), ("b", two.fingerprint)])


def test_a_store_is_not_continued_with_another_split(tiny: TinyWorld, targets: Path) -> None:
    asked = split(tiny.teacher, batch_size=4)
    for check in _both_checks(asked, tiny, targets):
        with pytest.raises(FingerprintMismatch, match=r"tensor_ranks: stored \(absent\), this run 2"):
            check()


def _both_checks(asked: TeacherConfig, tiny: TinyWorld, targets: Path) -> list[Callable[[], object]]:
    two = ExtractConfig(gpus_per_worker=2)

    def in_full() -> None:
        with without_ray(cpus=2):
            extract(asked, str(tiny.samples), str(targets), two)

    return [lambda: check_extraction(asked, str(tiny.samples), str(targets), two, DEFAULT_IMAGES), in_full]


STARTS = {
    "sys.exit(3)": (RankLost, r"rank 1 of the 2 processes of the teacher ended with status 3; what it printed"),
    "os.kill(os.getpid(), 9)": (RankLost, "rank 1 of the 2 processes of the teacher ended by signal 9; "),
    "say('unusable')": (UserError, "rank 1 of the 2 processes of the teacher: why"),
    "say('failed')": (RankLost, "rank 1 of the 2 processes of the teacher failed: why"),
    "time.sleep(60)": (RankLost, "ended by signal 9; it took more than 1 s"),
}


@pytest.mark.parametrize("what", STARTS)
def test_a_rank_that_does_not_get_ready_is_said_to_within_seconds(
    what: str, llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a_rank.py").write_text(
        "import json, os, struct, sys, time\n"
        "def say(state):\n"
        "    data = json.dumps({'state': state, 'detail': 'why'}).encode()\n"
        "    sys.stdout.buffer.write(struct.pack('<Q', len(data)) + data)\n"
        f"{what}\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(ranks_module, "START_S", 1.0)
    monkeypatch.setattr(ranks_module, "NOTICE_S", 0.5)
    identity = identify_teacher(split(llava), on_gpu=False, num_ranks=2)
    error, message = STARTS[what]
    began = time.monotonic()
    started = Ranks(identity, lambda: pytest.fail("rank 0 waits until all are ready"), "a_rank")
    with pytest.raises(error, match=message):
        started.start()
    assert time.monotonic() - began < 10
    assert not started.are_running
