"""Teacher and students on the same samples: the bundled teacher on its scenes, and tiny models on tiny data."""

import hashlib
from pathlib import Path

import pytest
import torch

from pipeline.attention.compare import AttentionRequest, compare_models
from pipeline.attention.tables import attention_tables
from pipeline.attention_comparison import compare_with_targets
from pipeline.demo.assets import TEACHER
from pipeline.demo.scenes.dataset import write_dataset
from pipeline.extraction.config import ExtractConfig
from pipeline.extraction.extract import extract
from stages.checkpoints.weights import weights_digest
from stages.evaluation.answered_items import item_line
from stages.evaluation.attention.objects import ObjectFile, ObjectPlaces, read_objects
from stages.evaluation.suites.suite import Item, Question
from stages.samples.pack import PackConfig, pack_samples
from stages.teacher.config import TeacherConfig
from storage.errors import UserError
from storage.samples.sample_set import SampleSet
from tests.conftest import TinyWorld
from tests.pipeline.in_process import without_ray
from tests.recorded_progress import RecordedProgress
from tests.suite_runs import suite_run


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def everything(tiny: TinyWorld) -> ObjectFile:
    """The upper half of every tiny picture is an object."""
    places = ObjectPlaces(((0.0, 0.0, 1.0, 0.5),))
    found = {}
    samples = SampleSet.open(str(tiny.samples))
    for number in range(len(samples.index.shards)):
        with samples.shard(number) as shard:
            found |= {shard.read(row).key: places for row in range(len(shard))}
    return ObjectFile(found, {}, {})


def test_the_bundled_teacher_says_little_about_objects_and_its_maps_differ_between_images(tmp_path: Path) -> None:
    write_dataset(tmp_path / "scenes", 40, 0, num_pairs=1)
    pack_samples(tmp_path / "scenes/train.json", tmp_path / "scenes", tmp_path / "samples", PackConfig())
    objects = read_objects(tmp_path / "scenes/objects.jsonl")
    assert len(objects) == 40
    request = AttentionRequest({}, str(tmp_path / "samples"), None, 60, str(TEACHER), "answer", objects)
    found = compare_models(request)
    assert found.num_with_objects == found.num_samples > 50
    assert found.teacher.layers == tuple((layer,) for layer in range(8))
    for layer in range(8):
        pooled, answer = found.teacher.objects[layer], found.teacher.text_objects[layer]
        assert pooled is not None
        assert answer is not None
        assert 0.4 < pooled.value < 0.75
        assert pooled.interval_95 is not None
        assert pooled.interval_95[0] < pooled.value < pooled.interval_95[1]
    first = found.teacher.text_objects[0]
    assert first is not None
    assert first.value > 0.7, "answers look at objects in the first layer"
    assert all(one is not None and 0.3 < one.value < 1 for one in found.teacher.between_images)
    (table,) = attention_tables(found)
    assert table.header == [
        *("model", "layer", "differ between images", "AUC of objects", "AUC from answer", "answer: share on image")
    ]
    assert len(table.rows) == 8


def test_stored_maps_of_a_teacher_and_the_teacher_itself_say_the_same(
    tiny: TinyWorld, targets: Path, everything: ObjectFile
) -> None:
    stored = compare_models(AttentionRequest({}, str(tiny.samples), str(targets), 12, objects=everything))
    request = AttentionRequest({}, str(tiny.samples), str(targets), 12, str(tiny.teacher), objects=everything)
    live = compare_models(request)
    assert not stored.teacher_is_live
    assert live.teacher_is_live
    assert stored.teacher.layers == live.teacher.layers
    pairs = zip(stored.teacher.between_images, live.teacher.between_images, strict=True)
    for a, b in [*pairs, *zip(stored.teacher.objects, live.teacher.objects, strict=True)]:
        assert a is not None
        assert b is not None
        assert a.value == pytest.approx(b.value, abs=0.02)


def test_answers_that_are_stored_say_what_the_teacher_itself_says(
    tiny: TinyWorld, everything: ObjectFile, tmp_path: Path
) -> None:
    settings = TeacherConfig(checkpoint=str(tiny.teacher), batch_size=4, answer_attention=True)
    with without_ray():
        extract(settings, str(tiny.samples), str(tmp_path / "targets"), ExtractConfig())
    places = str(tiny.samples), str(tmp_path / "targets"), 12
    models = {"same": str(tiny.teacher)}
    stored = compare_models(AttentionRequest(models, *places, text="answer", objects=everything))
    live = compare_models(AttentionRequest(models, *places, str(tiny.teacher), "answer", objects=everything))
    assert (stored.teacher_is_live, stored.num_with_text) == (False, live.num_with_text)
    sides = [(found.teacher, found.students["same"].measures) for found in (stored, live)]
    for ours, theirs in zip(*sides, strict=True):
        for name in ("text_objects", "text_share", "text_similarity"):
            for a, b in zip(getattr(ours, name), getattr(theirs, name), strict=True):
                assert a.value == pytest.approx(b.value, abs=1e-3), name
    assert len(sides[0][0].text_share) == len(stored.teacher.layers)
    # Where no text is asked for, none is looked at.
    assert not compare_models(AttentionRequest({}, *places)).teacher.text_share


def test_the_teacher_beside_itself_is_alike_in_maps_and_in_answers(tiny: TinyWorld, targets: Path) -> None:
    models = {"same": str(tiny.teacher)}
    request = AttentionRequest(models, str(tiny.samples), str(targets), 8, str(tiny.teacher), "answer")
    progress = RecordedProgress()
    found = compare_models(request, progress).students["same"]
    assert found.similarity == compare_with_targets(str(tiny.teacher), str(tiny.samples), str(targets), 8)
    assert found.mean is not None
    assert found.mean.value == pytest.approx(found.similarity.mean, abs=1e-9)
    assert len(found.samples) == found.similarity.num_samples
    for w, estimate in enumerate(found.intervals):
        assert estimate is not None
        assert estimate.value == pytest.approx(sum(one[w] for one in found.samples.values()) / len(found.samples))
    # Its default layers are those of the store's windows, which hold one layer each or several.
    singles = [w for w, window in enumerate(found.similarity.windows) if len(window) == 1]
    for w, estimate in enumerate(found.measures.text_similarity):
        assert estimate is not None
        assert estimate.value > 0.5
        if w in singles and found.similarity.windows[w] == (found.similarity.student_layers[w],):
            assert estimate.value == pytest.approx(1, abs=1e-4)
    assert [task.done for task in progress.tasks] == [8, 8, 8]


def test_students_stand_beside_each_other_and_their_answers_are_linked_by_pictures(
    tiny: TinyWorld, targets: Path, undisturbed: Path, tmp_path: Path
) -> None:
    student = undisturbed / "sft" / "student"
    with SampleSet.open(str(tiny.samples)).shard(0) as shard:
        pictures = [sample.images[0] for row in range(len(shard)) if (sample := shard.read(row)).images]
    digests = sorted({hashlib.sha256(picture).hexdigest() for picture in pictures})
    (tmp_path / "run.json").write_text(suite_run(weights=weights_digest(student)).to_json())
    lines = [
        item_line(Item(str(n), ("a",), (Question("?", ()),), None), ["A"], {"accuracy": n % 2}, [[digest]])
        for n, digest in enumerate([*digests, "absent"])
    ]
    (tmp_path / "items.jsonl").write_text("".join(f"{line}\n" for line in lines))
    models = {"student": str(undisturbed), "teacher itself": str(tiny.teacher)}
    places = str(tiny.samples), str(targets)
    found = compare_models(AttentionRequest(models, *places, 16, answers={"student": [tmp_path]}))
    (split,) = found.students["student"].answers
    assert (split.num_items, split.num_without_sample, split.num_other) == (len(digests), 1, 0)
    assert found.students["teacher itself"].answers == ()
    assert attention_tables(found)[-1].rows[0][:3] == ["student", "sugarcrepe", "likelihood"]
    assert [table.title.split(",")[0] for table in attention_tables(found)][-1].startswith("similarity where")
    assert found.students["student"].similarity.mean < found.students["teacher itself"].similarity.mean
    with pytest.raises(UserError, match="name the answers of this student"):
        compare_models(AttentionRequest(models, *places, 4, answers={"teacher itself": [tmp_path]}))


def test_what_no_sample_has_is_refused(tiny: TinyWorld, targets: Path) -> None:
    places = str(tiny.samples), str(targets)
    with pytest.raises(UserError, match="holds 'xylophone' as a word"):
        compare_models(AttentionRequest({}, *places, 4, str(tiny.teacher), "xylophone"))
    with pytest.raises(UserError, match="holds 'xylophone' as a word"):
        compare_models(AttentionRequest({"t": str(tiny.teacher)}, *places, 4, text="xylophone"))
    objects = ObjectFile({"none": ObjectPlaces(((0.0, 0.0, 1.0, 1.0),))}, {}, {})
    with pytest.raises(UserError, match=r"none of .* samples has one of the 1 pictures that the objects name"):
        compare_models(AttentionRequest({}, *places, 4, objects=objects))
    with pytest.raises(UserError, match="name the teacher that they were extracted with"):
        compare_models(AttentionRequest({}, *places, 4, str(TEACHER)))
