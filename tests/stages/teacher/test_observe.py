"""What the teacher's observations of a shard hold, and what goes to the ledger."""

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from stages.teacher.batching import BatchSize, PreparedSample
from stages.teacher.config import TeacherConfig
from stages.teacher.identity import identify_teacher
from stages.teacher.observe import Observer, ShardObservations
from stages.teacher.teacher import Teacher, load_teacher
from storage.codecs.answer_logits import AnswerLogitsCodec
from storage.errors import UserError
from storage.samples.sample_set import SampleSet
from storage.samples.shard_reader import SampleShard
from storage.stores import open_store
from tests.stages.distilled import TinyData, make_tiny_data, observe_shard
from tests.stages.teacher.forward_passes import before_each_pass


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TinyData:
    return make_tiny_data(tmp_path_factory.mktemp("observe"), num_samples=15)


@pytest.fixture(scope="module")
def teacher(data: TinyData) -> Teacher:
    return load_teacher(TeacherConfig(checkpoint=str(data.teacher), batch_size=3, top_k=5))


def opened(data: TinyData, shard: int = 0) -> SampleShard:
    store = open_store(data.samples)
    return SampleSet.open(store).shard(shard)


def observe(teacher: Teacher, data: TinyData, shard: int = 0, progress: list[int] | None = None) -> ShardObservations:
    with opened(data, shard) as samples:
        return observe_shard(teacher, samples, progress.append if progress is not None else None)


def test_each_image_with_its_prefix_is_captured_once_and_shared(teacher: Teacher, data: TinyData) -> None:
    seen = observe(teacher, data)
    store = open_store(data.samples)
    with SampleSet.open(store).shard(0) as shard:
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
    keys = [members.key for members in SampleSet.open(data.samples).members(0)]
    assert [sample.key for sample in seen.samples] == keys
    assert sum(progress) == len(keys)
    image_token = teacher.encoder.image_token_id
    for sample in seen.samples:
        assert (sample.map_row is None) == (not bool((sample.token_ids == image_token).any()))
        codec = teacher.identity.logit_codec
        assert sample.logits_RQ.shape == (int(sample.answer_mask.sum()), codec.row_bytes)
        assert AnswerLogitsCodec(codec).decode(sample.logits_RQ).ids_RK.shape[1] == 5


def test_a_conversation_cut_before_its_answer_is_in_the_ledger_and_the_others_stay(
    teacher: Teacher, data: TinyData
) -> None:
    lengths = sorted(len(sample.token_ids) for sample in observe(teacher, data).samples)
    short = load_teacher(TeacherConfig(checkpoint=str(data.teacher), max_length=lengths[0]))
    seen = observe(short, data)
    assert seen.skipped
    assert {sample.reason for sample in seen.skipped} <= {
        "too_long",
        "image_beyond_max_length",
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


def bytes_of(seen: ShardObservations) -> list[object]:
    """All that will be stored, to compare bit for bit; NaN is not among it."""
    return [
        [(s.key, s.token_ids.tolist(), s.answer_mask.tolist(), s.map_row) for s in seen.samples],
        [s.logits_RQ.tolist() for s in seen.samples],
        [[t.tolist() for t in (m.codes_LC, m.caps_L, *vars(m.windows).values())] for m in seen.maps],
        seen.skipped,
    ]


def everything_of(seen: ShardObservations) -> list[object]:
    """Answer attention too, for teachers of which it is stored."""
    attention = [sample.answer_attention_LaN for sample in seen.samples]
    return [*bytes_of(seen), [None if one is None else one.tolist() for one in attention]]


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def alone(request: pytest.FixtureRequest, data: TinyData) -> tuple[Teacher, list[object]]:
    """A teacher that sees one sample at a time, and what it saw."""
    torch.set_num_threads(1)
    settings = {"checkpoint": str(data.teacher), "dtype": request.param, "map_codec": "float16"}
    teacher = load_teacher(TeacherConfig.model_validate({**settings, "batch_size": 1}))
    return teacher, bytes_of(observe(teacher, data))


def with_batches_of(teacher: Teacher, size: int | None) -> Teacher:
    settings = teacher.identity.settings.model_copy(update={"batch_size": size})
    return replace(teacher, identity=replace(teacher.identity, settings=settings))


@pytest.mark.parametrize("size", [2, 3, 8, None])
def test_the_batch_size_changes_no_bit_on_a_cpu(
    alone: tuple[Teacher, list[object]], data: TinyData, size: int | None
) -> None:
    teacher, expected = alone
    assert bytes_of(observe(with_batches_of(teacher, size), data)) == expected


def test_doing_one_thing_after_the_other_gives_the_same(alone: tuple[Teacher, list[object]], data: TinyData) -> None:
    teacher, expected = alone
    with opened(data) as shard, Observer(with_batches_of(teacher, 3), overlap=False) as observer:
        assert bytes_of(observer.observe(shard)) == expected


def test_two_threads_may_each_give_a_shard_and_one_has_the_teacher_at_a_time(teacher: Teacher, data: TinyData) -> None:
    expected = [bytes_of(observe(teacher, data, shard)) for shard in (0, 1)]
    with Observer(teacher) as observer, ThreadPoolExecutor(2) as threads:
        for _ in range(3):
            with opened(data, 0) as first, opened(data, 1) as second:
                found = threads.map(lambda shard: bytes_of(observer.observe(shard)), (first, second))
                assert list(found) == expected
        seconds = observer.timings.seconds()
    assert {"forward", "waited", "coding", "preparing"} <= seconds.keys()


class LittleMemory:
    """Stands in for a GPU with room for `most` samples, and for none of the keys in `huge`."""

    def __init__(self, most: int, huge: frozenset[str] = frozenset()) -> None:
        self.most, self.huge = most, huge
        self.tried: list[int] = []

    def __call__(self, batch: Sequence[PreparedSample]) -> None:
        self.tried.append(len(batch))
        if len(batch) > self.most or any(sample.key in self.huge for sample in batch):
            raise torch.OutOfMemoryError("CUDA out of memory")


def test_a_batch_size_nobody_set_is_halved_until_it_fits_and_then_kept_with_one_line_in_the_log(
    data: TinyData, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    teacher = load_teacher(TeacherConfig(checkpoint=str(data.teacher), prefix_reuse="off"))
    expected = bytes_of(observe(teacher, data))
    memory = LittleMemory(most=2)
    before_each_pass(monkeypatch.setattr, memory)
    with Observer(teacher) as observer, opened(data) as shard, caplog.at_level("INFO"):
        observer.batch_size = BatchSize(None, on_gpu=True)
        assert bytes_of(observer.observe(shard)) == expected, "nothing is lost, nothing comes twice, no bit differs"
        assert observer.batch_size.value == 2
        assert max(memory.tried) > 2
        memory.tried.clear()
        assert bytes_of(observer.observe(shard)) == expected
        assert max(memory.tried) == 2, "once found, no more is tried"
    assert [record.message for record in caplog.records if record.name.startswith("stages")] == [
        "the teacher runs 2 samples at a time, found by trying"
    ]


def test_a_batch_size_that_was_set_is_kept_and_the_error_says_what_to_do(
    data: TinyData, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = load_teacher(TeacherConfig(checkpoint=str(data.teacher), batch_size=3, prefix_reuse="off"))
    before_each_pass(monkeypatch.setattr, LittleMemory(most=2))
    with pytest.raises(UserError, match=r"a batch of 3 samples does not fit.*set teacher.batch_size below 3, or leave"):
        observe(teacher, data)


def test_a_sample_that_alone_does_not_fit_is_in_the_ledger_and_others_keep_the_map_they_share_with_it(
    data: TinyData, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = load_teacher(TeacherConfig(checkpoint=str(data.teacher), map_codec="float16"))
    usual = observe(teacher, data)
    shared = Counter(sample.map_row for sample in usual.samples if sample.map_row is not None).most_common(1)[0][0]
    sharing = [sample for sample in usual.samples if sample.map_row == shared]
    assert len(sharing) > 1
    huge = sharing[0].key
    before_each_pass(monkeypatch.setattr, LittleMemory(most=8, huge=frozenset({huge})))
    with Observer(teacher) as observer, opened(data) as shard:
        observer.batch_size = BatchSize(None, on_gpu=True)
        seen = observer.observe(shard)
    assert [(skipped.key, skipped.reason) for skipped in seen.skipped] == [(huge, "out_of_memory")]
    assert [sample.key for sample in seen.samples] == [sample.key for sample in usual.samples if sample.key != huge]
    maps = {sample.key: seen.maps[sample.map_row] for sample in seen.samples if sample.map_row is not None}
    assert len(seen.maps) == len(usual.maps)
    # Taken of another sample, whose length may be another: equal to rounding only.
    found, expected = (teacher.identity.map_codec.decode(coded) for coded in (maps[sharing[1].key], usual.maps[shared]))
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)


def test_the_manifest_names_whatever_changes_the_targets(data: TinyData) -> None:
    base = identify_teacher(TeacherConfig(checkpoint=str(data.teacher)), on_gpu=False)
    manifest = base.manifest("samples", 1)
    for settings, field in [
        ({"max_length": 77}, "max_length"),
        ({"chat_template": "llava-1.5"}, "chat_template"),
        ({"top_k": 3}, "logit_codec.top_k"),
        ({"logit_codec": "float16"}, "logit_codec.name"),
        ({"tail_samples": 7}, "logit_codec.num_draws"),
        ({"temperatures": (2.0,)}, "logit_codec.temperatures"),
        ({"tempered_samples": 9}, "logit_codec.num_tempered_samples"),
        ({"map_codec": "float16"}, "map_codec.name"),
        ({"dtype": "bfloat16"}, "dtype"),
        ({"layers": (1, 2)}, "layers"),
        ({"num_matched": 1}, "windows"),
        ({"prefix_reuse": "off"}, "prefix_reuse"),
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
    with pytest.raises(UserError, match="'bert' is not a known teacher family"):
        identify_teacher(TeacherConfig(checkpoint=str(tmp_path)), on_gpu=False, with_weights=False)
