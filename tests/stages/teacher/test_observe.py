"""What the teacher's observations of a shard hold, and what goes to the ledger."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from stages.teacher.identity import TeacherConfig, identify_teacher
from stages.teacher.observe import ShardObservations, observe_shard
from stages.teacher.teacher import Teacher, load_teacher
from storage.errors import UserError
from storage.samples import SampleIndex, SampleShard
from storage.stores import open_store
from tests.stages.distilled import TinyData, make_tiny_data


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TinyData:
    return make_tiny_data(tmp_path_factory.mktemp("observe"), num_samples=15)


@pytest.fixture(scope="module")
def teacher(data: TinyData) -> Teacher:
    return load_teacher(TeacherConfig(checkpoint=str(data.teacher), batch_size=3, top_k=5))


def observe(teacher: Teacher, data: TinyData, shard: int = 0, progress: list[int] | None = None) -> ShardObservations:
    store = open_store(data.samples)
    entry = SampleIndex.load(store).shards[shard]
    with SampleShard.open(store, entry) as samples:
        return observe_shard(teacher, samples, progress.append if progress is not None else None)


def test_each_image_with_its_prefix_is_captured_once_and_shared(teacher: Teacher, data: TinyData) -> None:
    seen = observe(teacher, data)
    store = open_store(data.samples)
    with SampleShard.open(store, SampleIndex.load(store).shards[0]) as shard:
        images = {sample.key: shard.read(row).images for row, sample in enumerate(seen.samples)}
    rows_of_image: dict[bytes, set[int | None]] = {}
    for sample in seen.samples:
        for image in images[sample.key]:
            rows_of_image.setdefault(image, set()).add(sample.map_row)
    assert all(len(rows) == 1 for rows in rows_of_image.values())
    assert len(seen.maps) == len(rows_of_image) < sum(sample.map_row is not None for sample in seen.samples)


def test_rows_stand_in_the_tars_order_and_text_only_samples_have_no_maps(teacher: Teacher, data: TinyData) -> None:
    progress: list[int] = []
    seen = observe(teacher, data, progress=progress)
    keys = [members.key for members in SampleIndex.load(open_store(data.samples)).shards[0].members]
    assert [sample.key for sample in seen.samples] == keys
    assert sum(progress) == len(keys)
    image_token = teacher.encoder.image_token_id
    for sample in seen.samples:
        assert (sample.map_row is None) == (not bool((sample.token_ids == image_token).any()))
        assert len(sample.logits) == int(sample.answer_mask.sum())
        assert sample.logits.ids_RK.shape[1] == 5


def test_a_conversation_cut_before_its_answer_is_in_the_ledger_and_the_others_stay(
    teacher: Teacher, data: TinyData
) -> None:
    lengths = sorted(len(sample.token_ids) for sample in observe(teacher, data).samples)
    short = load_teacher(TeacherConfig(checkpoint=str(data.teacher), max_length=lengths[0]))
    seen = observe(short, data)
    assert seen.skipped
    assert {sample.reason for sample in seen.skipped} <= {
        "no_answer_within_max_length",
        "image_beyond_max_length",
        "prompt_beyond_max_length",
    }
    assert len(seen.samples) + len(seen.skipped) == len(lengths)
    assert all(sample.id for sample in seen.skipped)


def test_a_teacher_that_is_not_finite_skips_its_samples_with_that_reason(data: TinyData) -> None:
    broken = load_teacher(TeacherConfig(checkpoint=str(data.teacher)))
    with torch.no_grad():
        broken.model.get_output_embeddings().weight.fill_(torch.nan)
    seen = observe(broken, data)
    assert not seen.samples
    assert not seen.maps
    assert {sample.reason for sample in seen.skipped} == {"not_finite"}


def test_maps_that_are_not_finite_skip_all_samples_that_share_them(data: TinyData) -> None:
    broken = load_teacher(TeacherConfig(checkpoint=str(data.teacher)))
    with torch.no_grad():
        broken.model.model.language_model.layers[broken.identity.layers[0]].self_attn.q_proj.bias.fill_(torch.nan)
    seen = observe(broken, data)
    assert {sample.reason for sample in seen.skipped} == {"not_finite"}


def test_the_manifest_names_whatever_changes_the_targets(data: TinyData) -> None:
    base = identify_teacher(TeacherConfig(checkpoint=str(data.teacher)), on_gpu=False)
    manifest = base.manifest("samples", 1)
    for settings, field in [
        ({"max_length": 77}, "max_length"),
        ({"top_k": 3}, "top_k"),
        ({"map_codec": "float16"}, "map_codec.name"),
        ({"dtype": "bfloat16"}, "dtype"),
        ({"layers": (1, 2)}, "layers"),
        ({"num_matched": 1}, "windows"),
    ]:
        other = replace(base, settings=TeacherConfig(checkpoint=str(data.teacher), **settings))  # type: ignore[arg-type]
        other = identify_teacher(other.settings, on_gpu=False)
        assert field in other.manifest("samples", 1).fingerprint.differences(manifest.fingerprint)
    assert base.manifest("other", 1).fingerprint.differences(manifest.fingerprint) == ["samples"]


def test_a_gpu_run_is_bfloat16_by_default_and_a_cpu_run_float32(data: TinyData) -> None:
    config = TeacherConfig(checkpoint=str(data.teacher))
    assert identify_teacher(config, on_gpu=True).dtype == torch.bfloat16
    assert identify_teacher(config, on_gpu=False).dtype == torch.float32


@pytest.mark.parametrize("layers", [(3, 5), (6, 7, 8), (-1, 0)])
def test_layers_the_decoder_does_not_have_are_refused(data: TinyData, layers: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match="consecutive layers of a decoder with 8"):
        identify_teacher(TeacherConfig(checkpoint=str(data.teacher), layers=layers), on_gpu=False)


def test_a_folder_without_safe_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(UserError, match="safetensors"):
        identify_teacher(TeacherConfig(checkpoint=str(tmp_path)), on_gpu=False)


def test_an_unknown_family_is_refused_by_name(data: TinyData, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="'bert' is not a known teacher family"):
        identify_teacher(TeacherConfig(checkpoint=str(tmp_path)), on_gpu=False)
