"""Samples whose later images lie past `max_length`, from packed samples to trained students of several kinds."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from stages.checkpoints.processors import load_processor
from stages.conversations.cuts import answer_runs
from stages.conversations.encoder import NO_LIMIT, ConversationEncoder, EncodedConversation
from stages.images import decode_image
from stages.samples.pack import PackConfig, pack_samples
from stages.student.data.collator import Collator
from stages.student.data.sample_reader import SampleReader, resolve_reader_spec
from stages.student.training.loop import train_stage
from stages.student.training.stage_run import StageRun
from stages.student.training.train_config import TrainConfig
from storage.codecs.answer_logits import AnswerLogitsCodec
from storage.codecs.attention_maps import MapCodec
from storage.errors import UserError
from storage.integrity.verify import verify
from storage.samples.members import StoredSample
from storage.samples.sample_set import SampleSet
from storage.streaming.stream import Source, StreamConfig, StreamedSample
from storage.targets.store import TargetStore
from tests.checkpoints import make_foreign_lm, make_tiny_llava, make_tiny_lm
from tests.stages.distilled import TinyData, extract_here
from tests.stages.extracted_families import LAYERS, eager, eager_maps, processed
from tests.storage.builders import target_stream
from tests.tiny_families import make_tiny_family

TWO_TURNS = ["<image>\nWhat is it?", "A red square.", "<image>\nAnd this?", "A blue circle left of it."]
RECORDS = {
    "cut before its third image": (["wide", "tall", "square"], [*TWO_TURNS, "<image>\nAnd the last?", "Both."]),
    "the first two images alone": (["wide", "tall"], TWO_TURNS),
    "cut before its only image": (["tall"], ["Hello?", "Yes.", "<image>\nIs it red?", "No, green. " * 40]),
    "text only": ([], ["What is the color of the sky?", "Blue."]),
}
KEPT = {
    "cut before its third image": 2,
    "the first two images alone": 2,
    "cut before its only image": 0,
    "text only": 0,
}


@dataclass(frozen=True)
class CutTargets:
    """A teacher's targets of `RECORDS`, with room for two turns with an image each."""

    teacher: Path
    samples: Path
    store: TargetStore

    def streamed(self) -> dict[str, StreamedSample]:
        """The samples by the names of their records."""
        config = StreamConfig(seed=0, shuffle_shards=0, batch_size=len(RECORDS))
        stream = target_stream(self.samples, self.store, config, rank=0, world_size=1, epoch=0)
        return {sample.record["id"]: sample for sample in next(iter(stream))}

    def shortened(self, sample: StreamedSample) -> StoredSample:
        """The conversation as it would be if it ended with the last answer that was kept."""
        num_turns = 2 * len(answer_runs(sample.targets.answer_mask))
        record = {**sample.record, "conversations": sample.record["conversations"][:num_turns]}
        return StoredSample(sample.key, record, sample.images[: KEPT[sample.record["id"]]])


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("samples")
    (folder / "images").mkdir()
    for number, (name, size) in enumerate({"wide": (64, 40), "tall": (30, 90), "square": (64, 64)}.items()):
        Image.radial_gradient("L").rotate(40 * number).resize(size).save(folder / "images" / f"{name}.png")
    records = [
        {
            "id": name,
            **({"image": [f"{image}.png" for image in images]} if images else {}),
            "conversations": [{"from": ("human", "gpt")[turn % 2], "value": text} for turn, text in enumerate(texts)],
        }
        for name, (images, texts) in RECORDS.items()
    ]
    (folder / "data.json").write_text(json.dumps(records))
    pack_samples(folder / "data.json", folder / "images", folder / "packed", PackConfig())
    return folder / "packed"


@pytest.fixture(scope="module")
def extracted(samples: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], CutTargets]:
    @cache
    def extract(model_type: str) -> CutTargets:
        folder = tmp_path_factory.mktemp(model_type)
        if model_type == "llava":
            teacher = make_tiny_llava(folder / "teacher", num_layers=4)
        else:
            teacher = make_tiny_family(folder / "teacher", model_type)
        settings = {"layers": LAYERS, "num_matched": 1, "map_codec": "float16", "logit_codec": "float16", "top_k": 1000}
        limit = length_of_two_turns(teacher, samples)
        store = extract_here(TinyData(teacher, teacher, samples), folder / "targets", max_length=limit, **settings)
        return CutTargets(teacher, samples, store)

    return extract


def length_of_two_turns(teacher: Path, samples: Path) -> int:
    processor = load_processor(teacher)
    with SampleSet.open(samples).shard(0) as shard:
        (found,) = (each for each in map(shard.read, range(4)) if each.record["id"] == "the first two images alone")
    images = [decode_image(data) for data in found.images]
    encoder = ConversationEncoder(processor, processor.image_token_id, NO_LIMIT)
    return answer_runs(encoder.encode(found.record["conversations"], images).answer_mask)[-1][1]


@pytest.mark.parametrize("model_type", ["llava", "llava_onevision", "qwen2_5_vl"])
def test_what_is_stored_is_what_the_teacher_says_of_the_conversation_without_the_later_turns(
    model_type: str, extracted: Callable[[str], CutTargets]
) -> None:
    made = extracted(model_type)
    model, processor, fingerprint = eager(made.teacher), load_processor(made.teacher), made.store.manifest.fingerprint
    maps_of = MapCodec.of_layers(fingerprint.map_codec, fingerprint.layers, fingerprint.windows)
    streamed = made.streamed()
    assert streamed.keys() == RECORDS.keys()
    for name, sample in streamed.items():
        inputs, targets = processed(processor, made.shortened(sample)), sample.targets
        assert targets.token_ids.tolist() == inputs["input_ids"][0].tolist()[: len(targets.token_ids)]
        assert bool(targets.num_cut_answer_tokens) == name.startswith("cut")
        expected_LNN, logits_TV = eager_maps(model, inputs)
        assert (sample.maps is None) == (KEPT[name] == 0)
        if sample.maps is not None:
            torch.testing.assert_close(maps_of.decode(sample.maps), expected_LNN, atol=1e-5, rtol=1e-3)
        found = AnswerLogitsCodec(fingerprint.logit_codec).decode(targets.logits_RQ)
        expected_RV = logits_TV[targets.answer_mask.nonzero()[:, 0] - 1].log_softmax(-1)
        expected_RK = expected_RV.gather(1, found.ids_RK.long())
        torch.testing.assert_close(found.logprobs_RK.float(), expected_RK, atol=5e-3, rtol=2e-3)
    shared = {streamed[name].targets.map_row for name, kept in KEPT.items() if kept}
    assert len(shared) == made.store.commits[0].num_maps == 1, "a cut sample shares the maps of the images it keeps"
    assert verify(made.store.store.url, made.samples).ok


@pytest.mark.parametrize("vision", ["teacher", "own"])
@pytest.mark.parametrize("model_type", ["llava", "llava_onevision", "qwen2_5_vl"])
def test_a_student_reads_the_images_that_the_teacher_read_and_trains(
    model_type: str,
    vision: str,
    extracted: Callable[[str], CutTargets],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    made, own = extracted(model_type), vision == "own"
    teacher = ConversationEncoder(processor := load_processor(made.teacher), processor.image_token_id, NO_LIMIT)
    student = made.teacher if own else make_tiny_lm(tmp_path / "lm", tokenizer_from=made.teacher)
    spec = resolve_reader_spec(made.store, student, own_vision=own, kd_weight=0.5)
    for name, sample in made.streamed().items():
        short, read = made.shortened(sample), spec.reader(sample)
        expected = teacher.encode(short.record["conversations"], [decode_image(data) for data in short.images])
        assert read.num_images == KEPT[name]
        assert read.pixel_inputs.keys() == expected.pixel_inputs.keys()
        assert all(torch.equal(read.pixel_inputs[key], expected.pixel_inputs[key]) for key in expected.pixel_inputs)
        assert len(Collator(spec.reader)([sample]).image_positions[0]) == len(expected.image_positions)
    lost = sum(sample.targets.num_cut_answer_tokens for sample in made.streamed().values())
    said = f"2 of the 4 samples with targets (50.0%) were cut at teacher.max_length and lost {lost:,} answer tokens ("
    initial = None
    for stage in ("dpt", "dft"):
        run = StageRun(
            name=stage,
            config=TrainConfig.model_validate(
                {
                    "vision": vision,
                    "loader": {"microbatch_size": 2},
                    "matching": {"num_matched": 1},
                    "lora": {"rank": 4, "alpha": 8},
                    stage: {"batch_size": 4, "max_steps": 2, "learning_rate": 1e-2},
                }
            ),
            decoder=str(student),
            initial=initial,
            # Twice the same store, whose samples count once.
            sources=(Source(SampleSet.open(made.samples), made.store),) * 2,
            output=tmp_path / stage,
        )
        report = train_stage(run, Accelerator(cpu=True))
        assert sum(note.startswith(said) for note in report.notes) == 1
        assert f"{stage}: {said}" in caplog.text
        initial = tmp_path / stage / "student"
    assert report.losses.keys() == {"loss", "lm", "kd", "attention"}


def read_by(reader: SampleReader, sample: StreamedSample, max_length: int) -> EncodedConversation:
    return replace(reader, max_length=max_length)(sample)


@pytest.mark.parametrize("cut", ["whole_turns", "tokens"])
def test_a_student_with_another_tokenizer_reads_these_images_too_or_names_the_sample(
    cut: str, extracted: Callable[[str], CutTargets], tmp_path: Path
) -> None:
    made = extracted("llava")
    spec = resolve_reader_spec(made.store, make_foreign_lm(tmp_path / "foreign"), own_vision=False, kd_weight=0.0)
    reader = replace(spec.reader, cut=cut)
    sample = made.streamed()["cut before its third image"]
    whole = read_by(reader, sample, 1000)
    first, second = answer_runs(whole.answer_mask)
    assert (whole.num_images, len(whole.image_positions)) == (2, 32)
    # With room for the second question alone, its image stays: the maps are over its tokens.
    read = read_by(reader, sample, second[0])
    assert read.token_ids.tolist() == whole.token_ids[: second[0]].tolist()
    assert answer_runs(read.answer_mask) == [first]
    last_image = int(whole.image_positions[-1])
    with pytest.raises(UserError, match=rf"sample {sample.key} .*: image_beyond_max_length: 1 of the teacher's 2 imag"):
        read_by(reader, sample, last_image)
