"""Estimates against what extraction then wrote."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from benchmarks.results import RESULTS
from pipeline.demo.assets import TEACHER
from pipeline.demo.scenes.dataset import write_dataset
from stages.estimate.analytic import BYTES_PER_ENTRY, METADATA_BYTES_PER_ARRAY, bytes_per_entry, estimate_from_configs
from stages.estimate.extrapolate import longest_share, student_t
from stages.estimate.measured import CODECS, estimate_by_measurement
from stages.estimate.report import Estimate, EstimateConfig
from stages.samples.pack import PackConfig, pack_samples
from stages.teacher.config import TeacherConfig
from stages.teacher.teacher import load_teacher
from storage.codecs.codec_settings import EntryCodecName, num_entries
from storage.errors import UserError
from storage.samples.sample_set import SampleSet
from storage.stores import Store
from storage.targets.commits import CommitRecord
from storage.targets.layout import arrays
from storage.targets.manifest import Manifest
from storage.targets.shard_writer import write_shard
from storage.targets.summary import summarize
from tests.stages.distilled import TinyData, extract_here, make_tiny_data

SETTINGS = {
    "layers": (2, 3, 4, 5, 6),
    "num_matched": 3,
    "max_length": 512,
    "batch_size": 16,
    "top_k": 32,
    "answer_attention": True,
}
NEARNESS = 0.15


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> TinyData:
    """60 scenes, about twice as many conversations, for the bundled teacher."""
    folder = tmp_path_factory.mktemp("scenes")
    write_dataset(folder, 60, 0, "shapes", 1)
    pack_samples(folder / "train.json", folder, folder / "samples", PackConfig(max_samples_per_shard=64))
    return TinyData(TEACHER, TEACHER, folder / "samples")


@pytest.fixture(scope="module")
def estimate(scenes: TinyData) -> Estimate:
    """Of a part of the scenes: 64 read, 32 seen by the teacher."""
    settings = TeacherConfig.model_validate({"checkpoint": str(TEACHER), **SETTINGS})
    config = EstimateConfig(num_sampled=64, num_measured=32)
    return estimate_by_measurement(settings, SampleSet.open(scenes.samples), config, workers=2, threads=1)


@pytest.mark.parametrize("codec", ["sqrt4", "float16"])
def test_estimated_bytes_are_near_those_that_extraction_writes(
    scenes: TinyData, estimate: Estimate, codec: str, tmp_path: Path
) -> None:
    extract_here(scenes, tmp_path / codec, **SETTINGS, map_codec=codec)
    found = summarize(tmp_path / codec)
    expected = estimate.settings[codec]
    assert estimate.num_sampled < found.num_samples
    assert expected.shard_bytes == pytest.approx(found.total_bytes, rel=NEARNESS)
    for array in ("map_codes", "answer_attention"):
        assert expected.bytes_by_array[array] == pytest.approx(found.array_bytes[array], rel=NEARNESS)
    written = sum(file.stat().st_size for file in (tmp_path / codec).rglob("*") if file.is_file())
    assert expected.store_bytes == pytest.approx(written, rel=NEARNESS)


def test_each_codec_is_measured_with_the_settings_that_extraction_stores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make_tiny_data(tmp_path, num_samples=8)
    settings, samples = TeacherConfig(checkpoint=str(data.teacher), batch_size=4), SampleSet.open(data.samples)
    written: set[str] = set()

    def recorded(store: Store, shard: int, manifest: Manifest, *seen: Any) -> CommitRecord:
        written.add(manifest.digest)
        return write_shard(store, shard, manifest, *seen)

    monkeypatch.setattr("stages.estimate.measured.write_shard", recorded)
    config = EstimateConfig(num_blocks=2, num_sampled=8, num_measured=8)
    estimate_by_measurement(settings, samples, config, workers=1, threads=1)
    teachers = [load_teacher(settings.model_copy(update={"map_codec": codec})) for codec in CODECS]
    index = samples.index
    assert written == {teacher.identity.manifest(index.digest, len(index.shards)).digest for teacher in teachers}
    assert len(written) == len(CODECS) - 1, "auto is one of the others for windows of few layers"


def test_every_codec_has_bytes_an_interval_and_hours_and_coarser_codes_are_smaller(estimate: Estimate) -> None:
    assert estimate.basis == "measured"
    assert tuple(estimate.settings) == CODECS
    sizes = [setting.shard_bytes for name, setting in estimate.settings.items() if name != "auto"]
    assert sizes == sorted(sizes, reverse=True)
    assert estimate.settings["auto"].bytes_by_array == estimate.settings["sqrt8"].bytes_by_array, "maps are small"
    for setting in estimate.settings.values():
        assert setting.shard_bytes_95 is not None
        low, high = setting.shard_bytes_95
        assert 0 < low < setting.shard_bytes < high
        assert sum(setting.bytes_by_array.values()) == pytest.approx(setting.shard_bytes, rel=1e-3)
        assert estimate.load_seconds < setting.wall_seconds
        assert setting.worker_seconds > estimate.teacher_seconds_per_sample * estimate.num_samples * 0.9
    rows = list(estimate.answer_bytes_by_top_k)
    assert 32 in rows
    assert estimate.answer_bytes_by_top_k[16] < estimate.answer_bytes_by_top_k[32]
    assert estimate.settings["sqrt4"].bytes_by_array["logit_records"] == pytest.approx(
        estimate.answer_bytes_by_top_k[32], rel=1e-3
    )


def test_a_teacher_that_gives_no_numbers_for_any_sample_is_refused_with_the_reason(tmp_path: Path) -> None:
    data = make_tiny_data(tmp_path)
    weights = load_file(data.teacher / "model.safetensors")
    save_file(
        {name: tensor * float("nan") for name, tensor in weights.items()},
        data.teacher / "model.safetensors",
        {"format": "pt"},
    )
    settings = TeacherConfig(checkpoint=str(data.teacher), batch_size=4)
    config = EstimateConfig(num_blocks=2, num_sampled=20, num_measured=4)
    with pytest.raises(UserError, match=r"none of \d+ samples .* can be used \(not_finite: \d+\)"):
        estimate_by_measurement(settings, SampleSet.open(data.samples), config, workers=1, threads=1)


def test_unusable_samples_are_counted_and_shown_with_their_reasons(tmp_path: Path) -> None:
    data = make_tiny_data(tmp_path)
    # Most samples have an image, whose 16 tokens alone are more; the others' answers come later.
    settings = TeacherConfig(checkpoint=str(data.teacher), max_length=12, batch_size=4)
    config = EstimateConfig(num_blocks=2, num_sampled=20, num_measured=4)
    with pytest.raises(UserError, match=r"none of 20 samples .* can be used \(image_beyond_max_length: 16"):
        estimate_by_measurement(settings, SampleSet.open(data.samples), config, workers=1, threads=1)
    # Long enough for the shorter conversations.
    settings = settings.model_copy(update={"max_length": 24, "cut": "tokens"})
    estimate = estimate_by_measurement(settings, SampleSet.open(data.samples), config, workers=1, threads=1)
    extract_here(data, tmp_path / "targets", max_length=24, cut="tokens", batch_size=4)
    found = summarize(tmp_path / "targets")
    assert estimate.num_sampled == found.num_samples + found.num_skipped == 20
    assert estimate.cut_samples == found.num_cut_samples > 0
    assert estimate.cut_answer_tokens == found.num_cut_answer_tokens > 0
    assert 0 < sum(estimate.unusable.values()) < 20
    assert estimate.per_sample["samples"] == pytest.approx(1 - sum(estimate.unusable.values()) / 20)
    assert all(reason in " ".join(estimate.unusable_examples) for reason in list(estimate.unusable)[:1])


def test_configs_alone_give_a_coarse_estimate_without_reading_weights(scenes: TinyData, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in TEACHER.iterdir():
        if file.is_file() and file.suffix != ".safetensors":
            (bare / file.name).write_bytes(file.read_bytes())
    settings = TeacherConfig.model_validate({"checkpoint": str(bare), **SETTINGS})
    counted = estimate_from_configs(settings, SampleSet.open(scenes.samples), EstimateConfig(), workers=4)
    assert counted.basis == "analytic"
    assert counted.num_sampled == counted.num_samples
    assert counted.settings["sqrt4"].shard_bytes_95 is None
    assert "from configs alone" in counted.notes[0]
    assumed = estimate_from_configs(settings, None, EstimateConfig(samples=1000), workers=4)
    assert assumed.settings["sqrt4"].bytes_by_array["answer_attention"] == 1000 * 5 * 36 * 2
    off = settings.model_copy(update={"answer_attention": False})
    without = estimate_from_configs(off, None, EstimateConfig(samples=1000), workers=4)
    assert "answer_attention" not in without.settings["sqrt4"].bytes_by_array
    assert assumed.files_per_shard - without.files_per_shard == 4
    assert assumed.per_sample["map_entries"] == num_entries(36, causal=True) / 2
    assert (assumed.num_samples, assumed.num_shards) == (1000, 2)
    assert assumed.settings["sqrt4"].wall_seconds == pytest.approx(0.512 * assumed.settings["sqrt4"].worker_seconds)
    whole = estimate_from_configs(
        settings.model_copy(update={"prefix_reuse": "off"}), None, EstimateConfig(samples=1000), workers=4
    )
    assert assumed.per_sample["repeated_tokens"] == 36 / 2
    assert assumed.teacher_seconds_per_sample < 0.95 * whole.teacher_seconds_per_sample
    assert any(note.startswith("8% of all tokens come up to an image") for note in assumed.notes)
    assert not any("come up to an image" in note for note in whole.notes)
    faster = EstimateConfig(samples=1000, efficiency=0.8)
    halved = estimate_from_configs(settings, None, faster, workers=4)
    assert 2 * halved.teacher_seconds_per_sample == pytest.approx(assumed.teacher_seconds_per_sample)


def test_bytes_of_an_entry_are_those_of_the_benchmark() -> None:
    measured = json.loads((RESULTS / "attention_codes.json").read_text())["synthetic"]
    (num_tokens,) = measured["image_tokens"]
    entries = len(measured["layers"]) * num_entries(num_tokens, causal=True)
    assert BYTES_PER_ENTRY.keys() == measured["codecs"].keys()
    for codec, per_entry in BYTES_PER_ENTRY.items():
        assert per_entry == pytest.approx(measured["codecs"][codec]["bytes_a_sample"] / entries, rel=1e-3)


@pytest.mark.parametrize(
    ("num_layers", "num_tokens", "codec"), [(5, 728, "sqrt4"), (3, 728, "sqrt8"), (5, 64, "sqrt8")]
)
def test_auto_is_computed_for_the_size_of_maps_and_the_layers_of_windows(
    num_layers: int, num_tokens: int, codec: EntryCodecName
) -> None:
    found = bytes_per_entry({"image_tokens": 2 * num_tokens, "maps": 2}, [range(num_layers)])
    assert found == BYTES_PER_ENTRY | {"auto": BYTES_PER_ENTRY[codec]}


def test_metadata_of_an_array_is_about_as_large_as_assumed(scenes: TinyData, estimate: Estimate) -> None:
    found = estimate.settings["sqrt4"].bytes_by_array["(metadata)"] / estimate.num_shards
    assert found / (len(arrays(answer_attention=True, pooled=False)) + 1) == pytest.approx(
        METADATA_BYTES_PER_ARRAY, rel=0.25
    )


def test_the_busiest_worker_gets_what_falls_to_it_shard_by_shard() -> None:
    assert longest_share([10, 10, 10], 1) == 1
    assert longest_share([10, 10, 10], 2) == pytest.approx(2 / 3)
    assert longest_share([10, 10, 1], 2) == pytest.approx(11 / 21)
    assert longest_share([10], 8) == 1


@pytest.mark.parametrize(("freedom", "quantile"), [(1, 12.706), (3, 3.182), (7, 2.365), (30, 2.042)])
def test_the_quantiles_are_those_of_the_tables(freedom: int, quantile: float) -> None:
    assert student_t(freedom) == pytest.approx(quantile, rel=0.01)
