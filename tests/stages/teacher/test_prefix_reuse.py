"""What conversations begin with, computed once for all of them: the results of the whole, and the promises of both."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipeline.demo.assets import TEACHER
from pipeline.demo.scenes.dataset import write_dataset
from stages.families.registry import FAMILIES
from stages.samples.pack import PackConfig, pack_samples
from stages.teacher.batching import BatchSize, PreparedSample, SamplePreparer
from stages.teacher.config import PrefixReuse, TeacherConfig
from stages.teacher.forward import run_teacher
from stages.teacher.identity import identify_teacher
from stages.teacher.isolate import run_isolated
from stages.teacher.observe import Observer, ShardObservations
from stages.teacher.prefix_forward import run_continuations, run_prefixes
from stages.teacher.teacher import Teacher, load_teacher
from storage.codecs.answer_logits import AnswerLogitsCodec
from storage.codecs.attention_maps import MapCodec
from storage.errors import UserError
from storage.samples.sample_set import SampleSet
from storage.samples.shard_reader import SampleShard
from storage.samples.shard_writer import SampleShardWriter
from tests.checkpoints import make_tiny_llava
from tests.stages.distilled import TinyData, extract_here, make_tiny_data, observe_shard
from tests.stages.extracted_families import LAYERS, make_samples
from tests.stages.teacher.forward_passes import before_each_pass
from tests.stages.teacher.test_observe import bytes_of
from tests.storage.builders import files_of
from tests.tiny_families import HYBRID, RECIPES, make_tiny_family

WHOLE = sorted({*HYBRID, *(name for name in RECIPES if FAMILIES[name].why_no_prefix() is not None)})
"""Families whose conversations do not share what they begin with."""


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Samples that the bundled teacher knows: 24 images, two conversations each on average."""
    folder = tmp_path_factory.mktemp("scenes")
    write_dataset(folder / "data", 24, seed=3, num_pairs=1)
    pack_samples(folder / "data/train.json", folder / "data", folder / "samples", PackConfig())
    return folder / "samples"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TinyData:
    return make_tiny_data(tmp_path_factory.mktemp("reuse"), num_samples=15)


def bundled(way: PrefixReuse, **settings: object) -> Teacher:
    torch.set_num_threads(1)
    return load_teacher(TeacherConfig.model_validate({"checkpoint": str(TEACHER), "prefix_reuse": way, **settings}))


def opened(samples: Path) -> SampleShard:
    return SampleSet.open(samples).shard(0)


def observe(teacher: Teacher, samples: Path) -> ShardObservations:
    with opened(samples) as shard:
        return observe_shard(teacher, shard)


def test_the_bundled_teachers_store_is_the_same_but_for_roundings(scenes: Path) -> None:
    settings = {"map_codec": "sqrt4", "answer_attention": True}
    apart, shared = (observe(bundled(way, **settings), scenes) for way in ("off", "on"))
    assert [(s.key, s.map_row) for s in apart.samples] == [(s.key, s.map_row) for s in shared.samples]
    codec = AnswerLogitsCodec(bundled("on", **settings).identity.logit_codec)
    num_rows = num_other_ids = 0
    for one, other in zip(apart.samples, shared.samples, strict=True):
        assert torch.equal(one.token_ids, other.token_ids)
        found, expected = codec.decode(other.logits_RQ), codec.decode(one.logits_RQ)
        same_R = (found.ids_RK == expected.ids_RK).all(1)
        num_rows, num_other_ids = num_rows + len(same_R), num_other_ids + int((~same_R).sum())
        torch.testing.assert_close(
            found.logprobs_RK[same_R].float(), expected.logprobs_RK[same_R].float(), atol=2e-2, rtol=5e-3
        )
        if one.answer_attention_LaN is not None:
            assert other.answer_attention_LaN is not None
            torch.testing.assert_close(
                other.answer_attention_LaN.float(), one.answer_attention_LaN.float(), atol=1e-6, rtol=2**-10
            )
    assert num_other_ids <= 0.01 * num_rows, "ids of tokens that are about as likely may change places"
    num_codes = num_other_codes = num_bits = num_other_bits = 0
    for coded, again in zip(apart.maps, shared.maps, strict=True):
        num_codes, num_other_codes = (
            num_codes + coded.codes_LC.numel(),
            num_other_codes + int((coded.codes_LC != again.codes_LC).sum()),
        )
        for name, values in vars(coded.windows).items():
            if values.dtype == torch.uint8:
                num_bits += values.numel()
                num_other_bits += int((values != getattr(again.windows, name)).sum())
    assert num_other_codes <= 1e-4 * num_codes, "an entry between two levels may fall to either"
    assert num_other_bits <= 1e-4 * num_bits


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_neither_the_batch_size_nor_isolation_nor_overlap_changes_a_bit(scenes: Path, dtype: str) -> None:
    alone = bundled("on", dtype=dtype, batch_size=1, map_codec="float16")
    expected = bytes_of(observe(alone, scenes))
    for size in (3, 8):
        assert bytes_of(observe(bundled("on", dtype=dtype, batch_size=size, map_codec="float16"), scenes)) == expected
    with opened(scenes) as shard, Observer(alone, overlap=False) as observer:
        assert bytes_of(observer.observe(shard)) == expected
    with opened(scenes) as shard:
        apart = run_isolated(alone, shard, controls=[(shard, 0)], crashing_rows=(), at=lambda _: None)
    assert bytes_of(apart) == expected


def test_a_map_is_that_of_its_first_sample_also_where_copies_of_its_image_lie_apart(
    scenes: Path, tmp_path: Path
) -> None:
    """One picture under two names: a sample that is alone with it in its place, and two that share it."""
    with opened(scenes) as shard:
        stored = [shard.read(row) for row in range(len(shard))]
    pictures = [sample.images for sample in stored]
    pair = next(row for row in range(1, len(stored)) if stored[row].images and pictures.count(pictures[row]) == 2)
    other = next(sample for sample in stored if sample.images and sample.images != pictures[pair])
    first, second = (stored[row] for row in (pair, pair + 1))
    far = replace(first, key="far")
    for number, order in enumerate(([far, other, first, second], [first, second, other, far])):
        with SampleShardWriter(tmp_path / str(number), len(order), 2**63) as writer:
            writer.add_group(order)
        seen = [observe(bundled("on", batch_size=size), tmp_path / str(number)) for size in (1, 2, 8)]
        assert [sample.map_row for sample in seen[0].samples].count(seen[0].samples[0].map_row) == 3
        assert len(seen[0].maps) == 2
        assert bytes_of(seen[0]) == bytes_of(seen[1]) == bytes_of(seen[2])


def test_a_prefix_enters_the_decoder_and_its_image_the_vision_tower_once(scenes: Path) -> None:
    tokens: dict[str, int] = {}
    images: dict[str, int] = {}
    for way in ("off", "on"):
        teacher = bundled(way)

        def count(_: object, __: object, kwargs: dict[str, torch.Tensor], way: str = way) -> None:
            tokens[way] = tokens.get(way, 0) + kwargs["inputs_embeds"].shape[:2].numel()

        def see(_: object, args: tuple[torch.Tensor, ...], way: str = way) -> None:
            images[way] = images.get(way, 0) + len(args[0])

        teacher.model.model.language_model.register_forward_pre_hook(count, with_kwargs=True)
        teacher.model.model.multi_modal_projector.register_forward_pre_hook(see)
        seen = observe(teacher, scenes)
    with_image = [sample for sample in seen.samples if sample.map_row is not None]
    assert images == {"off": len(with_image), "on": len(seen.maps)}
    assert len(seen.maps) < 0.6 * len(with_image)
    assert tokens["on"] < 0.95 * tokens["off"], "prefixes are short here, and padded to 32 as what follows them"


@pytest.mark.parametrize("model_type", WHOLE)
def test_a_family_that_computes_wholes_is_refused_under_on_and_said_under_auto(model_type: str, tmp_path: Path) -> None:
    checkpoint = make_tiny_family(tmp_path / "teacher", model_type)
    settings = TeacherConfig(checkpoint=str(checkpoint), layers=LAYERS, prefix_reuse="on")
    with pytest.raises(UserError, match=r"whose state is not keys and values of|with its pixels only"):
        identify_teacher(settings, on_gpu=False)
    identity = identify_teacher(settings.model_copy(update={"prefix_reuse": "auto"}), on_gpu=False)
    assert not identity.prefix_reuse
    assert any("computed as a whole" in note for note in identity.notes)


@pytest.mark.parametrize("model_type", sorted(set(RECIPES) - set(WHOLE)))
def test_a_family_gives_the_same_to_rounding_and_the_same_bytes_in_any_batch(model_type: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    (tmp_path / "data").mkdir()
    checkpoint = make_tiny_family(tmp_path / "teacher", model_type)
    data = TinyData(teacher=checkpoint, student_lm=tmp_path, samples=make_samples(tmp_path / "data"))
    settings = {
        "layers": LAYERS,
        "num_matched": 1,
        "answer_attention": True,
        "map_codec": "float16",
        "logit_codec": "float16",
        "top_k": 1000,
    }
    apart = extract_here(data, tmp_path / "off", prefix_reuse="off", **settings)
    shared = extract_here(data, tmp_path / "on", prefix_reuse="on", batch_size=3, **settings)
    extract_here(data, tmp_path / "alone", prefix_reuse="on", batch_size=1, **settings)
    assert files_of(tmp_path / "alone") == files_of(tmp_path / "on") != files_of(tmp_path / "off")
    made = apart.manifest.fingerprint
    assert (made.prefix_reuse, shared.manifest.fingerprint.prefix_reuse) == (False, True)
    maps, logits = MapCodec.of_layers(made.map_codec, made.layers, made.windows), AnswerLogitsCodec(made.logit_codec)
    for row in range(5):
        one, other = (store.shard(0).read(row, with_answers=True) for store in (apart, shared))
        assert (one[1] is None) == (other[1] is None) == (one[0].map_row is None)
        if one[1] is not None and other[1] is not None:
            torch.testing.assert_close(maps.decode(other[1]), maps.decode(one[1]), atol=1e-6, rtol=1e-3)
            attention = [sample.answer_attention_LaN for sample in (other[0], one[0])]
            assert attention[0] is not None
            torch.testing.assert_close(*attention, atol=1e-6, rtol=2**-9)
        found, expected = (logits.decode(sample.logits_RQ) for sample in (other[0], one[0]))
        by_id = [
            torch.zeros(found.ids_RK.shape).scatter(1, r.ids_RK.long(), r.logprobs_RK.float())
            for r in (found, expected)
        ]
        torch.testing.assert_close(*by_id, atol=5e-3, rtol=2e-3)


@pytest.mark.parametrize(("first", "last"), [(-3, 6), (0, 1), (0, 9), (-6, 0)])
def test_answers_that_lie_in_the_prefix_or_across_its_end_are_those_of_the_whole(
    data: TinyData, first: int, last: int
) -> None:
    """As when an image stands in a later turn, or an answer follows its image at once; or nothing follows it."""
    teacher = load_teacher(TeacherConfig(checkpoint=str(data.teacher), answer_attention=True, prefix_reuse="on"))
    with opened(data.samples) as shard:
        sample = SamplePreparer(teacher.encoder, shard, Observer(teacher, overlap=False).timings)(0)
    assert isinstance(sample, PreparedSample)
    at, length = sample.prefix_length, len(sample.encoded.token_ids)
    mask = torch.zeros(length, dtype=torch.bool)
    mask[at + first : at + last] = True
    mask[2:4] = True
    end = at if last == 0 else length
    encoded = replace(sample.encoded, answer_mask=mask[:end], token_ids=sample.encoded.token_ids[:end])
    sample = replace(sample, encoded=encoded)
    whole = run_teacher(teacher, [sample], [sample])
    prefixes = run_prefixes(teacher, [sample], [sample])
    logits, answers = run_continuations(teacher, prefixes, [0], [sample])
    assert sample.map_key is not None
    for one, other in zip(whole.maps[sample.map_key], prefixes.maps[sample.map_key], strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)
    assert whole.answers[0] is not None
    assert whole.answers[0].shape[1] == 2
    torch.testing.assert_close(answers[0], whole.answers[0], atol=1e-6, rtol=2**-9)
    codec = AnswerLogitsCodec(teacher.identity.logit_codec)
    expected, found = (codec.decode(records) for records in (whole.logits[0], logits[0]) if records is not None)
    torch.testing.assert_close(found.logprobs_RK, expected.logprobs_RK, atol=2e-2, rtol=5e-3)


class LittleMemory:
    """A GPU with room for so many prefixes and samples, and for none of some keys."""

    def __init__(self, prefixes: int = 99, samples: int = 99, no_prefix: str = "", no_sample: str = "") -> None:
        self.prefixes, self.samples, self.no_prefix, self.no_sample = prefixes, samples, no_prefix, no_sample

    def meet(self, batch: Sequence[PreparedSample]) -> None:
        if len(batch) > self.samples or any(sample.key == self.no_sample for sample in batch):
            raise torch.OutOfMemoryError("CUDA out of memory")

    def meet_prefixes(self, firsts: Sequence[PreparedSample]) -> None:
        if len(firsts) > self.prefixes or any(sample.key == self.no_prefix for sample in firsts):
            raise torch.OutOfMemoryError("CUDA out of memory")


def with_memory(memory: LittleMemory, samples: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[ShardObservations, int]:
    """What is seen with it, and the batch size that was found."""
    before_each_pass(monkeypatch.setattr, memory.meet, meet_prefixes=memory.meet_prefixes)
    with Observer(bundled("on")) as observer, opened(samples) as shard:
        observer.batch_size = BatchSize(None, on_gpu=True)
        return observer.observe(shard), observer.batch_size.value


@pytest.mark.parametrize(
    ("memory", "size"), [(LittleMemory(prefixes=3), 2), (LittleMemory(samples=2), 2), (LittleMemory(1, 1), 1)]
)
def test_the_batch_size_is_halved_until_prefixes_and_conversations_fit_and_no_bit_differs(
    scenes: Path, monkeypatch: pytest.MonkeyPatch, memory: LittleMemory, size: int
) -> None:
    expected = bytes_of(observe(bundled("on"), scenes))
    seen, found = with_memory(memory, scenes, monkeypatch)
    assert bytes_of(seen) == expected
    assert found == size


def test_what_does_not_fit_alone_is_in_the_ledger_a_prefix_with_all_its_conversations(
    scenes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = observe(bundled("on"), scenes)
    rows = [sample.map_row for sample in usual.samples]
    shared = next(row for row in rows if rows.count(row) > 1)
    together = [sample.key for sample in usual.samples if sample.map_row == shared]
    for memory, lost in (
        (LittleMemory(no_prefix=together[0]), together),
        (LittleMemory(no_sample=together[0]), together[:1]),
    ):
        with monkeypatch.context() as patched:
            seen, _ = with_memory(memory, scenes, patched)
        assert {(one.key, one.reason) for one in seen.skipped} == {(key, "out_of_memory") for key in lost}
        records = {sample.key: sample.logits_RQ for sample in usual.samples}
        assert all(torch.equal(records[sample.key], sample.logits_RQ) for sample in seen.samples)
        assert len(seen.samples) == len(usual.samples) - len(lost)
        assert len(seen.maps) == len(usual.maps) - (lost == together)


def test_a_picture_that_is_not_finite_skips_its_conversations_and_no_others(
    scenes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = observe(bundled("on"), scenes)
    rows = [sample.map_row for sample in usual.samples]
    shared = next(row for row in rows if rows.count(row) > 1)
    together = {sample.key for sample in usual.samples if sample.map_row == shared}

    def spoil(firsts: Sequence[PreparedSample]) -> None:
        for first in firsts:
            if first.key in together:
                first.encoded.pixel_inputs["pixel_values"].fill_(torch.nan)

    before_each_pass(monkeypatch.setattr, lambda _: None, meet_prefixes=spoil)
    seen = observe(bundled("on"), scenes)
    assert {(one.key, one.reason) for one in seen.skipped} == {(key, "not_finite") for key in together}
    records = {sample.key: sample.logits_RQ for sample in usual.samples}
    assert all(torch.equal(records[sample.key], sample.logits_RQ) for sample in seen.samples)


def test_a_decoder_that_cannot_share_is_refused_under_on_and_said_under_auto(tmp_path: Path) -> None:
    checkpoint = make_tiny_llava(tmp_path / "teacher", num_layers=2)
    config = (checkpoint / "config.json").read_text()
    assert '"rope_type": "default"' in config
    (checkpoint / "config.json").write_text(
        config.replace('"rope_type": "default"', '"rope_type": "dynamic", "factor": 2.0')
    )
    settings = TeacherConfig(checkpoint=str(checkpoint), prefix_reuse="on")
    with pytest.raises(
        UserError, match=r"cannot share .* depends on how much is read at once; set teacher.prefix_reuse"
    ):
        identify_teacher(settings, on_gpu=False)
    identity = identify_teacher(settings.model_copy(update={"prefix_reuse": "auto"}), on_gpu=False)
    assert not identity.prefix_reuse
    assert any("computed as a whole" in note for note in identity.notes)
