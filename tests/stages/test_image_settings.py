"""How pictures are read and placed is the store's: students, their checkpoints and all who ask those follow it."""

import json
import random
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageOps

from pipeline.chat import open_chat
from pipeline.report.gallery import make_gallery
from stages.checkpoints.configs import load_config
from stages.checkpoints.image_settings import image_settings
from stages.checkpoints.processors import load_processor
from stages.conversations.encoder import ConversationEncoder
from stages.evaluation.answering.answerer import Answerer
from stages.evaluation.config import EvaluationConfig
from stages.export.export import export_student
from stages.samples.pack import pack_samples
from stages.student.data.sample_reader import SampleReader, resolve_reader_spec
from stages.student.training.setup import StageSetup
from stages.student.training.stage_run import StageRun
from stages.student.training.train_config import TrainConfig
from stages.teacher.config import TeacherConfig
from stages.teacher.identity import identify_teacher
from storage.errors import UserError
from storage.samples.image_settings import DEFAULT_IMAGES, ImageConfig
from storage.samples.sample_set import SampleSet
from storage.streaming.stream import Source, StreamConfig, StreamedSample
from storage.targets.store import TargetStore
from tests.checkpoints import draw_random_image, load_tiny_llava, make_foreign_lm, make_tiny_llava, make_tiny_lm
from tests.pipeline.processes import run_here
from tests.stages.distilled import TinyData, extract_here
from tests.storage.builders import target_stream

UPRIGHT = ImageConfig(exif="apply", position="as_written")
QUESTION = "What <image> color?"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TinyData:
    """Two samples: a picture that EXIF data turn, and one without them."""
    folder = tmp_path_factory.mktemp("data")
    teacher = make_tiny_llava(folder / "teacher", num_layers=4)
    rng, exif = random.Random(0), Image.Exif()
    exif[0x0112] = 6
    draw_random_image(rng).save(folder / "turned.png", exif=exif)
    draw_random_image(rng).save(folder / "plain.png")
    records = [
        {
            "id": name,
            "image": f"{name}.png",
            "conversations": [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": "Red."}],
        }
        for name in ("turned", "plain")
    ]
    (folder / "data.json").write_text(json.dumps(records))
    assert pack_samples(folder / "data.json", folder, folder / "samples").num_turned == 1
    return TinyData(teacher, make_tiny_lm(folder / "lm", tokenizer_from=teacher), folder / "samples")


def extracted(data: TinyData, out: Path, images: ImageConfig) -> TargetStore:
    return extract_here(data, out, images, map_codec="float16", layers=(1, 2), num_matched=1)


@pytest.fixture(scope="module")
def store(data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> TargetStore:
    return extracted(data, tmp_path_factory.mktemp("targets") / "t", UPRIGHT)


def streamed(data: TinyData, store: TargetStore) -> Sequence[StreamedSample]:
    config = StreamConfig(seed=0, shuffle_shards=0, batch_size=2)
    samples = next(iter(target_stream(data.samples, store, config, rank=0, world_size=1, epoch=0)))
    return sorted(samples, key=lambda sample: sample.key)


def picture(data: TinyData) -> Path:
    return data.samples.parent / "turned.png"


def student_of(data: TinyData, store: TargetStore, out: Path) -> Path:
    """A student as a stage saves it."""
    source = Source(SampleSet.open(data.samples), store)
    config = TrainConfig.model_validate({"matching": {"num_matched": 1}, "dpt": {"kd_weight": 0.0}})
    setup = StageSetup(StageRun("dpt", config, str(data.student_lm), None, (source,), out))
    setup.load()[0].save_pretrained(out)
    setup.processor.save_pretrained(out)
    return out


def test_a_store_says_how_its_pictures_were_read_and_counts_the_turned_ones(data: TinyData, store: TargetStore) -> None:
    assert store.manifest.fingerprint.images == UPRIGHT
    assert store.commits[0].num_turned == 1
    assert [store.shard(0).read(row)[0].is_turned for row in range(2)] == [True, False]
    base, settings = store.manifest.fingerprint, TeacherConfig(checkpoint=str(data.teacher))
    for images, field in ((ImageConfig(exif="apply"), "images.position"), (DEFAULT_IMAGES, "images.exif")):
        other = identify_teacher(settings, images, on_gpu=False).manifest(base.samples, 1).fingerprint
        assert field in other.differences(base)


def test_the_picture_stands_where_the_text_has_it_or_at_the_front(
    data: TinyData, store: TargetStore, tmp_path: Path
) -> None:
    tokenizer = load_processor(data.teacher).tokenizer
    texts = []
    for targets in (store, extracted(data, tmp_path / "t", DEFAULT_IMAGES)):
        sample = targets.shard(0).read(0)[0]
        texts.append(tokenizer.decode(sample.token_ids).replace(tokenizer.image_token, "#"))
    assert [text.replace("#" * 16, "#").partition(" ASSISTANT")[0] for text in texts] == [
        "USER: What #\n color?",
        "USER: #\nWhat  color?",
    ]


def test_attention_is_compared_on_pictures_read_as_the_teacher_read_them(
    data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store = extract_here(data, tmp_path / "t", UPRIGHT, map_codec="float16", layers=(1,), num_matched=1)
    words = ("--samples", data.samples, "--targets", store.store.url)
    done = run_here("compare-attention", data.teacher, *words, monkeypatch=monkeypatch, capsys=capsys)
    assert done.code == 0, done.err
    # The teacher against its own maps of the layer that is matched: of a picture turned otherwise they are others.
    (average,) = re.findall(r"average\W+([01]\.\d+)", done.out)
    assert average == "1.000"
    gallery = make_gallery({"itself": str(data.teacher)}, (str(data.samples), store.store.url), 2, measured=["itself"])
    with Image.open(picture(data)) as image:
        assert image.width != image.height
        assert gallery.samples[0].image.tobytes() == ImageOps.exif_transpose(image).convert("RGB").tobytes()


@pytest.mark.parametrize("own_tokenizer", [False, True])
def test_students_see_the_pictures_that_the_teacher_saw(
    own_tokenizer: bool, data: TinyData, store: TargetStore, tmp_path: Path
) -> None:
    student = make_foreign_lm(tmp_path / "foreign") if own_tokenizer else data.student_lm
    reader: SampleReader = resolve_reader_spec(store, student, own_vision=False, kd_weight=0.0).reader
    with Image.open(picture(data)) as image:
        turned = reader.processor.image_processor(ImageOps.exif_transpose(image), return_tensors="pt")["pixel_values"]
    read = reader(streamed(data, store)[0])
    assert torch.equal(read.pixel_inputs["pixel_values"], turned)
    before = reader.processor.tokenizer.decode(read.token_ids[: read.image_positions[0]])
    assert "What" in before


def test_a_students_checkpoint_and_its_export_say_it_and_chat_and_evaluation_follow(
    data: TinyData, store: TargetStore, tmp_path: Path
) -> None:
    student = student_of(data, store, tmp_path / "student")
    export_student(student, tmp_path / "export")
    card = " ".join((tmp_path / "export/README.md").read_text().split())
    assert "PIL.ImageOps.exif_transpose" in card
    assert "A picture stood where the text has it." in card
    for folder in (student, tmp_path / "export"):
        assert image_settings(load_config(folder)) == UPRIGHT
    chat = open_chat(str(student), picture(data), 2)
    with Image.open(picture(data)) as image:
        assert chat.image.tobytes() == ImageOps.exif_transpose(image).convert("RGB").tobytes()
    assert chat._encoder.image_settings == UPRIGHT
    assert open_chat(str(data.teacher), picture(data), 2).image.tobytes() != chat.image.tobytes()


def test_an_evaluation_reads_pictures_as_the_checkpoint_says_or_as_it_is_told(data: TinyData) -> None:
    scored = []
    for said, told in ((None, DEFAULT_IMAGES), (None, UPRIGHT), (UPRIGHT, DEFAULT_IMAGES)):
        model, processor = load_tiny_llava(data.teacher)
        if said is not None:
            model.config.image_settings = said.model_dump()
        scored.append(Answerer(model, processor, EvaluationConfig(), images=told).images)
    assert scored == [DEFAULT_IMAGES, UPRIGHT, UPRIGHT]


def test_a_checkpoint_that_says_something_else_is_refused(data: TinyData) -> None:
    config = load_config(data.teacher)
    assert image_settings(config) is None
    config.image_settings = {"exif": "sometimes"}
    with pytest.raises(UserError, match="expected exif and position"):
        image_settings(config)


def test_several_images_stay_where_they_are_written_whatever_the_setting(data: TinyData) -> None:
    processor = load_processor(data.teacher)
    images = [draw_random_image(random.Random(number)) for number in range(2)]
    talk = [{"from": "human", "value": "Is <image> left of <image>?"}, {"from": "gpt", "value": "So."}]
    one, other = (
        ConversationEncoder(processor, processor.image_token_id, 512, images=ImageConfig(position=position)).encode(
            talk, images
        )
        for position in ("front", "as_written")
    )
    assert torch.equal(one.token_ids, other.token_ids)
