import errno
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import pipeline.extraction.extract
from pipeline.cli.extract_teacher import print_report
from pipeline.cluster.worker import ProgressMarker
from pipeline.extraction.config import ExtractConfig
from pipeline.extraction.extract import extract, in_flight_notes
from pipeline.extraction.report import REPORT, ExtractionReport
from pipeline.extraction.shard_extractor import ShardExtractor
from stages.samples.pack import PackConfig, pack_samples
from stages.teacher.config import TeacherConfig
from stages.teacher.identity import identify_teacher
from storage.errors import FingerprintMismatch, NoHardLinks, TooManySkipped, UserError
from storage.integrity.verify import verify
from storage.progress import SILENT, Progress
from storage.targets.commits import CommitRecord, SkippedSample
from storage.targets.store import TargetStore
from tests.checkpoints import CHAT_TEMPLATE_OF_LLAVA_1_5, make_llava_data, make_tiny_llava
from tests.conftest import NUM_SAMPLES, TinyWorld
from tests.pipeline.in_process import without_ray
from tests.pipeline.processes import run_here, start_cdp, tree
from tests.processes import descendants, kill_when, runs_until, wait_until_dead
from tests.recorded_progress import RecordedProgress

pytestmark = pytest.mark.usefixtures("ray_address")

STOPS_WITHIN_S = 20
LASTING = ("manifest.json", "teacher/", "shards/", "commits/")


def run(
    tiny: TinyWorld, store: Path, samples: Path | None = None, progress: Progress = SILENT, **settings: Any
) -> ExtractionReport:
    """Extracts the tiny data; `settings` are those of `TeacherConfig` and `ExtractConfig`."""
    ours = {name: settings.pop(name) for name in list(settings) if name in ExtractConfig.model_fields}
    teacher = TeacherConfig(**{"checkpoint": str(tiny.teacher), "batch_size": 4} | settings)
    config = ExtractConfig(**{"workers": 1} | ours)
    return extract(teacher, str(samples or tiny.samples), str(store), config, progress)


def same_targets(found: Path, expected: Path) -> bool:
    """Byte for byte, but for reports."""
    return tree(found, *LASTING) == tree(expected, *LASTING)


def test_the_store_of_an_undisturbed_run_is_whole_and_reports_what_it_holds(
    tiny: TinyWorld, targets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "store"
    returned = run(tiny, store, workers=2)
    assert same_targets(store, targets)
    checked = verify(store, tiny.samples)
    assert checked.ok
    assert checked.num_samples == NUM_SAMPLES
    report = ExtractionReport.model_validate_json((store / "reports/extraction.json").read_text())
    assert report == returned
    assert (report.samples, report.skipped, report.failures) == (NUM_SAMPLES, {}, {})
    assert report.failed_starts == {}
    assert report.shards == report.shards_made_now == len(TargetStore.open(store).commits)
    # The other made all, if this one was ready last.
    for worker in (each for each in report.per_worker if each.shards):
        assert {"forward", "coding", "preparing", "writing"} <= worker.timings.keys()
        assert worker.waited_share is not None
        assert 0 <= worker.waited_share < 1
        assert worker.gpu_idle_shares == {}, "a CPU has no clock of its own"
    with_gpus = report.per_worker[0].model_copy(update={"gpu_idle_shares": {"cuda:0": 0.125, "cuda:1": 0.25}})
    print_report(report.model_copy(update={"per_worker": (with_gpus,)}), "store")
    printed = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "18.8% of that time by their own clocks, at most 25.0% of one" in printed


@pytest.mark.usefixtures("shards_made_here")
def test_a_shard_that_is_repaired_away_while_others_are_made_fails_the_command_and_a_rerun_makes_it(
    tiny: TinyWorld, targets: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"

    def repair_first_shard(task: str, done: float) -> None:
        if done > NUM_SAMPLES - 4:
            (store / "commits/000000.json").unlink(missing_ok=True)

    with pytest.raises(UserError, match=r"1 of \d+ shards are not stored in .*store, though none of them failed"):
        run(tiny, store, progress=RecordedProgress(at_step=repair_first_shard))
    assert run(tiny, store).shards_made_now == 1
    assert same_targets(store, targets)


@pytest.mark.usefixtures("shards_made_here")
def test_a_store_that_was_copied_to_where_nothing_can_be_committed_is_refused_before_its_shards_are_made(
    tiny: TinyWorld, targets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    store = Path(shutil.copytree(targets, tmp_path / "store"))
    monkeypatch.setattr(os, "link", refuse)
    assert run(tiny, store).shards_made_now == 0, "a finished store needs no more links"
    (store / "commits/000001.json").unlink()
    before = tree(store)
    with pytest.raises(NoHardLinks, match="refused a hard link"):
        run(tiny, store, progress=RecordedProgress(at_step=lambda *_: pytest.fail("a shard was begun")))
    assert tree(store) == before


@pytest.mark.usefixtures("shards_made_here")
def test_answers_without_an_end_are_said_before_the_first_shard_and_in_the_report(
    tiny: TinyWorld, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    template = tmp_path / "stock.jinja"
    template.write_text(CHAT_TEMPLATE_OF_LLAVA_1_5)

    progress = RecordedProgress()
    report = run(tiny, tmp_path / "store", progress=progress, chat_template=str(template))
    (note,) = report.notes
    assert progress.messages == [f"note: {note}"]
    assert note.startswith(f"the chat template of {template} ends 0 of 2 answers")
    assert "Set teacher.chat_template to a template" in note
    print_report(report, "store")
    assert "note: the chat template of" in capsys.readouterr().out
    with pytest.raises(FingerprintMismatch, match="differs in:\n  chat_template: "):
        run(tiny, tmp_path / "store")


def test_a_second_run_makes_nothing_and_changes_no_byte(
    tiny: TinyWorld, targets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "store"
    shutil.copytree(targets, store)
    progress = RecordedProgress()
    report = run(tiny, store, progress=progress)
    assert report.shards_made_now == 0
    assert report.samples == progress.named("extract").done == NUM_SAMPLES
    assert same_targets(store, targets)
    print_report(report, "store")
    assert "GPUs idle" not in capsys.readouterr().out


def test_a_resumed_run_makes_what_is_missing_with_equal_bytes_and_counts_every_sample_with_any_number_in_flight(
    tiny: TinyWorld, targets: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    shutil.copytree(targets, store)
    for shard in (1, 4):
        (store / f"commits/{shard:06d}.json").unlink()
    shutil.rmtree(next((store / "shards").glob("000004-*")))
    (store / "shards/000002.zarr.left.partial").mkdir()
    progress = RecordedProgress()
    report = run(tiny, store, progress=progress, batches_in_flight=3)
    assert report.shards_made_now == 2
    whole = progress.named("extract")
    assert whole.total == whole.done == NUM_SAMPLES
    assert "2 shards" in whole.note
    assert same_targets(store, targets)


def test_a_note_says_why_one_batch_is_in_a_teacher_that_was_to_have_several(tiny: TinyWorld) -> None:
    identity = identify_teacher(TeacherConfig(checkpoint=str(tiny.teacher)), on_gpu=False)
    several = ExtractConfig(gpus_per_worker=2)
    assert in_flight_notes(several, identity) == ()
    identity.config.get_text_config().rope_parameters = {"rope_type": "longrope"}
    (note,) = in_flight_notes(several, identity)
    assert note.startswith("one batch at a time is in the teacher: its positions (longrope) are scaled by the length")
    assert in_flight_notes(ExtractConfig(batches_in_flight=3), identity) == (note,)
    assert in_flight_notes(ExtractConfig(gpus_per_worker=2, batches_in_flight=1), identity) == ()
    assert in_flight_notes(ExtractConfig(), identity) == ()


@pytest.mark.slow
def test_a_driver_killed_in_the_middle_leaves_nothing_that_a_rerun_does_not_mend(
    tiny: TinyWorld, targets: Path, ray_address: str, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    _kill_a_driver(tiny, store, "--ray-address", ray_address)
    committed = len(list((store / "commits").glob("0*.json")))
    assert committed > 0
    with without_ray():
        assert run(tiny, store).samples == NUM_SAMPLES
    assert same_targets(store, targets)


@pytest.mark.slow
def test_a_driver_killed_together_with_its_own_local_cluster_can_be_run_again(
    tiny: TinyWorld, targets: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    _kill_a_driver(tiny, store)
    with without_ray():
        assert run(tiny, store).samples == NUM_SAMPLES
    assert same_targets(store, targets)


@pytest.mark.slow
def test_ctrl_c_ends_the_workers_on_a_cluster_and_says_what_is_stored(
    tiny: TinyWorld, ray_address: str, tmp_path: Path
) -> None:
    err = tmp_path / "err.txt"
    driver = _start_a_driver(tiny, tmp_path / "store", "--ray-address", ray_address, err=err)
    _stop_in_the_middle(driver, signal.SIGINT, tmp_path / "store", err, os.getpid())


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_driver_asked_to_stop_ends_with_its_own_cluster_and_can_be_run_again(
    number: signal.Signals, tiny: TinyWorld, targets: Path, tmp_path: Path
) -> None:
    store, err = tmp_path / "store", tmp_path / "err.txt"
    driver = _start_a_driver(tiny, store, err=err)
    _stop_in_the_middle(driver, number, store, err, driver.pid)
    with without_ray():
        assert run(tiny, store).samples == NUM_SAMPLES
    assert same_targets(store, targets)


def _stop_in_the_middle(
    driver: "subprocess.Popen[bytes]", number: signal.Signals, store: Path, err: Path, cluster: int
) -> None:
    """Sends the signal when a shard is stored; `cluster` is the process that started ray."""
    assert runs_until(driver, lambda: any((store / "commits").glob("0*.json")))
    started = [pid for pid in descendants(cluster) if "_Actor" in Path(f"/proc/{pid}/cmdline").read_text()]
    assert started
    asked = time.monotonic()
    # As a terminal does it: to the command and all that it started.
    os.killpg(driver.pid, number)
    assert driver.wait(60) == 128 + number
    assert time.monotonic() - asked < STOPS_WITHIN_S
    said = err.read_text()
    assert re.search(
        rf"interrupted: [1-7] of 7 shards are stored in {store} \([1-7] made now\); run the same command", said
    )
    assert "Traceback" not in said
    assert all(wait_until_dead(pid) for pid in started)


def _kill_a_driver(tiny: TinyWorld, store: Path, *flags: str) -> None:
    assert kill_when(_start_a_driver(tiny, store, *flags), lambda: any((store / "commits").glob("0*.json")))


def _start_a_driver(tiny: TinyWorld, store: Path, *flags: str, err: Path | None = None) -> "subprocess.Popen[bytes]":
    places = ("--teacher", tiny.teacher, "--samples", tiny.samples, "--targets", store, "--workers", 1)
    return start_cdp("extract-teacher", *places, "--set", "teacher.batch_size=4", *flags, err=err)


class KilledOnce(ShardExtractor):
    """A worker whose process is killed at a point of its first shard."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.mark = Path(self.targets.url + ".killed")

    def die_once(self) -> None:
        if not self.mark.exists():
            self.mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)


class KilledBeforeWriting(KilledOnce):
    """The teacher has seen the shard, nothing of it is stored."""

    def save_teacher_vision(self) -> None:
        self.die_once()
        super().save_teacher_vision()


class KilledBeforeCommitting(KilledOnce):
    """The shard's folder is in place, its commit record is not."""

    def __call__(self, shard: int, progress: Callable[[int], None]) -> CommitRecord:
        create = self.targets.create
        self.targets.create = lambda path, data: (self.die_once(), create(path, data))[1]  # type: ignore[method-assign]
        try:
            return super().__call__(shard, progress)
        finally:
            self.targets.create = create  # type: ignore[method-assign]


@pytest.mark.slow
@pytest.mark.parametrize("worker", [KilledBeforeWriting, KilledBeforeCommitting])
def test_a_worker_killed_in_the_middle_of_a_shard_is_replaced_and_the_bytes_are_the_same(
    worker: type[KilledOnce], tiny: TinyWorld, targets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline.extraction.extract, "ShardExtractor", worker)
    progress = RecordedProgress()
    store = tmp_path / "store"
    report = run(tiny, store, progress=progress)
    assert (tmp_path / "store.killed").exists()
    whole = progress.named("extract")
    assert report.samples == whole.total == whole.done == NUM_SAMPLES
    assert same_targets(store, targets)


class FailsOnShardTwo(ShardExtractor):
    """One shard is poison; each attempt leaves a file."""

    def __call__(self, shard: int, progress: Callable[[int], None]) -> CommitRecord:
        if shard == 2:
            progress(1)
            attempts = Path(self.targets.url + ".attempts")
            attempts.mkdir(exist_ok=True)
            (attempts / str(len(list(attempts.iterdir())))).touch()
            raise RuntimeError("this shard is poison")
        return super().__call__(shard, progress)

    def run_isolated(self, shard: int, progress: Callable[[int], None], _: ProgressMarker) -> CommitRecord:
        return self(shard, progress)


@pytest.mark.slow
def test_a_shard_that_always_fails_is_reported_after_its_attempts_and_the_others_are_stored(
    tiny: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "store"
    monkeypatch.setattr(pipeline.extraction.extract, "ShardExtractor", FailsOnShardTwo)
    with pytest.raises(UserError, match=r"1 of \d+ shards could not be made(.|\n)*shard 2: .*this shard is poison"):
        run(tiny, store, max_attempts=2)
    assert len(list((tmp_path / "store.attempts").iterdir())) == 2
    opened = TargetStore.open(store)
    assert opened.commits.keys() == set(range(opened.manifest.num_shards)) - {2}
    report = ExtractionReport.model_validate_json((store / "reports/extraction.json").read_text())
    assert "poison" in report.failures[2]
    assert report.failed_tries.keys() == {2}
    assert [failed.node for failed in report.failed_tries[2]] == [os.uname().nodename] * 2
    (worker,) = report.per_worker
    assert {failed.pid for failed in report.failed_tries[2]} == {worker.pid}
    assert (worker.shards, worker.failed_tries) == (opened.manifest.num_shards - 1, 2)
    assert worker.samples == report.samples


@pytest.mark.usefixtures("shards_made_here")
def test_a_worker_that_sees_another_teacher_than_the_driver_ends_the_run(
    tiny: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline.extraction.extract, "ShardExtractor", OtherLength)
    with pytest.raises(FingerprintMismatch, match=r"differs in: max_length\); give all machines the same files"):
        run(tiny, tmp_path / "store")
    assert not (tmp_path / "store/commits").exists()


class OtherLength(ShardExtractor):
    """A worker on a machine where things differ."""

    def __init__(self, teacher: TeacherConfig, *arguments: Any) -> None:
        super().__init__(teacher.model_copy(update={"max_length": 99}), *arguments)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"max_length": 100}, "max_length: stored 1536, this run 100"),
        ({"map_codec": "float16"}, "map_codec"),
        ({"top_k": 8}, "logit_codec.top_k: stored 48, this run 8"),
        ({"layers": (2, 3)}, "layers"),
        ({"dtype": "bfloat16"}, 'dtype: stored "float32", this run "bfloat16"'),
    ],
)
def test_resuming_with_other_settings_is_refused_by_name_and_changes_nothing(
    change: dict[str, Any], field: str, tiny: TinyWorld, targets: Path
) -> None:
    before = tree(targets)
    with pytest.raises(FingerprintMismatch) as caught:
        run(tiny, targets, **change)
    assert field in str(caught.value)
    assert tree(targets) == before


def test_resuming_with_another_teacher_or_other_samples_is_refused_by_name_and_changes_nothing(
    tiny: TinyWorld, targets: Path, tmp_path: Path
) -> None:
    before = tree(targets)
    other = make_tiny_llava(tmp_path / "teacher", num_layers=8, seed=5)
    with pytest.raises(FingerprintMismatch, match="teacher_weights: stored"):
        run(tiny, targets, checkpoint=str(other))
    data, images = make_llava_data(tmp_path / "data", 5, seed=9)
    pack_samples(data, images, tmp_path / "samples", PackConfig())
    with pytest.raises(FingerprintMismatch, match="samples: stored"):
        run(tiny, targets, samples=tmp_path / "samples")
    assert tree(targets) == before


@pytest.mark.usefixtures("shards_made_here")
def test_what_is_cut_is_counted_over_the_whole_store_by_every_run_and_by_inspect(
    tiny: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data, images = make_llava_data(tmp_path / "data", 6)
    records = json.loads(data.read_text())
    for record in (records[0], records[5]):
        record["conversations"] += [
            {"from": "human", "value": "And then?"},
            {"from": "gpt", "value": "A red square. " * 60},
        ]
    data.write_text(json.dumps(records))
    pack_samples(data, images, tmp_path / "samples", PackConfig(max_samples_per_shard=3))
    kept = {}
    for cut in ("whole_turns", "tokens"):
        store = tmp_path / cut
        first = run(tiny, store, samples=tmp_path / "samples", max_length=128, cut=cut)
        assert (first.samples, first.skipped, first.cut_samples) == (6, {}, 2)
        (store / "commits/000001.json").unlink()
        places = ("--teacher", tiny.teacher, "--samples", tmp_path / "samples", "--targets", store, "--workers", 1)
        asked = [f"--set=teacher.{setting}" for setting in ("batch_size=4", "max_length=128", f"cut={cut}")]
        extracted = run_here("extract-teacher", *places, *asked, monkeypatch=monkeypatch, capsys=capsys)
        assert extracted.code == 0, extracted.err
        second = ExtractionReport.model_validate_json((store / REPORT).read_text())
        assert second.shards_made_now == 1
        assert (second.cut_samples, second.cut_answer_tokens) == (2, first.cut_answer_tokens)
        assert verify(store, tmp_path / "samples").ok
        inspected = run_here("inspect", store, monkeypatch=monkeypatch, capsys=capsys)
        lost = f"2 (33.3%), which lost {first.cut_answer_tokens:,} answer tokens ("
        for shown, name in ((extracted.out, "cut at teacher.max_length"), (inspected.out, "cut at max_length")):
            assert f"{name} {lost}" in " ".join(shown.replace("│", " ").split())
        kept[cut] = first.answer_tokens, first.answer_tokens + first.cut_answer_tokens
    assert kept["whole_turns"][0] < kept["tokens"][0]
    assert kept["whole_turns"][1] == kept["tokens"][1]


@pytest.mark.usefixtures("shards_made_here")
def test_too_long_conversations_are_in_the_ledger_and_fail_the_command_unless_allowed(
    tiny: TinyWorld, tmp_path: Path
) -> None:
    data, images = make_llava_data(tmp_path / "data", 10)
    records = json.loads(data.read_text())
    records[0]["conversations"][0]["value"] = "<image>\n" + "What is this? " * 200
    data.write_text(json.dumps(records))
    pack_samples(data, images, tmp_path / "samples", PackConfig(max_samples_per_shard=5))
    store = tmp_path / "store"
    with pytest.raises(TooManySkipped, match=r"1 of 10 samples could not be used \(too_long: 1\)"):
        run(tiny, store, samples=tmp_path / "samples", max_length=128)
    opened = TargetStore.open(store)
    assert [(s.id, s.reason) for s in _ledger(opened)] == [("sample-000000", "too_long")]
    assert sum(commit.num_samples for commit in opened.commits.values()) == 9
    before = tree(store, *LASTING)
    report = run(tiny, store, samples=tmp_path / "samples", max_length=128, max_skipped_fraction=0.1)
    assert (report.samples, report.skipped) == (9, {"too_long": 1})
    assert report.shards_made_now == 0
    assert tree(store, *LASTING) == before
    assert verify(store, tmp_path / "samples").ok


@pytest.mark.usefixtures("shards_made_here")
def test_samples_for_which_the_teacher_gives_nan_are_in_the_ledger_and_all_others_are_stored(
    tiny: TinyWorld, tmp_path: Path
) -> None:
    teacher = tmp_path / "teacher"
    shutil.copytree(tiny.teacher, teacher)
    weights = load_file(teacher / "model.safetensors")
    # Everything that goes through the adapter becomes NaN, samples without an image do not.
    name = next(name for name in weights if name.endswith("multi_modal_projector.linear_2.bias"))
    weights[name] = torch.full_like(weights[name], float("nan"))
    save_file(weights, teacher / "model.safetensors", {"format": "pt"})
    store = tmp_path / "store"
    with pytest.raises(TooManySkipped, match="not_finite"):
        run(tiny, store, checkpoint=str(teacher))
    opened = TargetStore.open(store)
    skipped = _ledger(opened)
    text_only = NUM_SAMPLES // 5
    assert {sample.reason for sample in skipped} == {"not_finite"}
    assert len(skipped) == NUM_SAMPLES - text_only
    assert sum(commit.num_samples for commit in opened.commits.values()) == text_only
    assert verify(store, tiny.samples).ok


def _ledger(store: TargetStore) -> list[SkippedSample]:
    return [sample for commit in store.commits.values() for sample in commit.skipped]
