"""Samples whose attention can be looked at: pictures, maps of teacher and students, words of the answer."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from pipeline.attention.teacher_side import TeacherSide, open_teacher
from pipeline.attention_comparison import first_samples, open_student, similarity_of
from pipeline.report.page import TEACHER, GallerySample, MapPanel
from stages.evaluation.attention.received import SampleAttention, sample_attention
from stages.evaluation.attention.similarity import AttentionSimilarity
from stages.evaluation.attention.token_boxes import cell_boxes, token_boxes
from stages.evaluation.attention.words import answer_words
from stages.images import decode_image
from stages.student.data.collator import Collator
from stages.student.data.sample_reader import SampleReader
from stages.student.layer_matching import LayerMatching
from stages.student.model.student import Student
from storage.errors import UserError
from storage.progress import SILENT, Progress
from storage.streaming.stream import StreamedSample
from storage.targets.store import TargetStore

SIMILARITY_SAMPLES: Final = 64
SAMPLES_A_PICTURE: Final = 8
"""Samples read for each picture, because several may share an image."""
MOST_WORDS: Final = 12
"""Words of an answer that can be chosen; a page holds a map of each for each layer and student."""


@dataclass(frozen=True)
class Gallery:
    """What came of looking at students: samples, and the similarity of those that had no measure yet."""

    samples: tuple[GallerySample, ...]
    images: tuple[bytes, ...]
    """The files of the samples' pictures."""
    similarity: Mapping[str, AttentionSimilarity]
    notes: tuple[str, ...]


@dataclass
class _Shown:
    """A sample while models look at it one after the other."""

    streamed: StreamedSample
    panels: list[MapPanel]
    words: tuple[str, ...] = ()


def make_gallery(
    models: Mapping[str, str],
    places: tuple[str, str],
    count: int,
    *,
    teacher: str | None = None,
    measured: Sequence[str] = (),
    progress: Progress = SILENT,
) -> Gallery:
    """Looks at the first `count` images of a store with each student, and compares it with the teacher's maps.

    The teacher is shown again for a student that learned from other teacher layers than the student before it.

    Args:
        models: name on the page to student checkpoint or training run.
        places: sample shards and target store.
        count: images at most.
        teacher: a checkpoint, to show its attention from words too.
        measured: names of models whose similarity is known already.
        progress: where the work is shown.
    """
    if not models:
        return Gallery((), (), {}, ())
    store = TargetStore.open(places[1])
    with closing(first_samples(places[0], store, SAMPLES_A_PICTURE * count)) as batches:
        streamed = _distinct_images([sample for batch in batches for sample in batch], count)
    shown = [_Shown(sample, []) for sample in streamed]
    similarity, notes = dict[str, AttentionSimilarity](), dict[str, None]()
    side = open_teacher(store, teacher)
    of_teacher = _TeacherWords(side, store, shown)
    windows: tuple[tuple[int, ...], ...] | None = None
    for name, model in models.items():
        opened = open_student(model, store)
        notes |= dict.fromkeys(f"{name}: {note}" for note in opened.notes)
        if name not in measured:
            task = progress.task(f"compare {name}", SIMILARITY_SAMPLES)
            similarity[name] = similarity_of(opened, places[0], store, SIMILARITY_SAMPLES, task)
        own = opened.matching.windows
        title = None if own == windows else TEACHER if windows is None else f"{TEACHER}, as {name} learned"
        looked = _looked(opened.student, opened.collator, opened.matching, streamed)
        for one, seen in zip(shown, looked, strict=True):
            one.words = one.words or seen.words
            if title is not None:
                one.panels.append(of_teacher.panel(title, seen, own))
            one.panels.append(_student_panel(name, seen, opened.matching, one.words))
        windows = own
    return _placed(shown, side.reader, similarity, notes)


def _placed(
    shown: Sequence[_Shown],
    reader: SampleReader,
    similarity: Mapping[str, AttentionSimilarity],
    notes: Iterable[str],
) -> Gallery:
    """The samples whose image tokens have known places in the picture; a note says how many have none."""
    samples, images, refusals = [], [], Counter[str]()
    for one in shown:
        image = one.streamed.images[0]
        decoded = decode_image(image, exif=reader.images.exif)
        try:
            boxes_N4 = token_boxes(reader.family, reader.processor, reader(one.streamed), decoded)
        except UserError as error:
            refusals[str(error)] += 1
            continue
        question, answer = _first_turns(one.streamed)
        samples.append(
            GallerySample(
                key=one.streamed.key,
                question=question,
                answer=answer,
                image=decoded,
                boxes_N4=cell_boxes(boxes_N4, one.streamed.targets.cells_X).numpy(),
                words=one.words,
                panels=tuple(one.panels),
            )
        )
        images.append(image)
    said = [f"{count} pictures are not shown: {reason}" for reason, count in refusals.items()]
    return Gallery(tuple(samples), tuple(images), similarity, (*notes, *said))


def _distinct_images(streamed: Sequence[StreamedSample], count: int) -> list[StreamedSample]:
    found: dict[bytes, StreamedSample] = {}
    for sample in streamed:
        if len(sample.images) == 1 and sample.maps is not None:
            found.setdefault(sample.images[0], sample)
    return list(found.values())[:count]


def _first_turns(sample: StreamedSample) -> tuple[str, str]:
    turns = [turn["value"] for turn in sample.record["conversations"] if turn["from"] != "system"]
    question, answer = turns[:2]
    return question.replace("<image>", "").strip(), answer


def _looked(
    model: Student, collator: Collator, matching: LayerMatching, samples: Sequence[StreamedSample]
) -> list[SampleAttention]:
    """Each sample's attention, also from words of its answers; one at a time, since maps of all layers are large."""
    found = []
    for sample in samples:
        batch = collator([sample])
        words = answer_words(collator.reader.processor.tokenizer, batch)[0][:MOST_WORDS]
        (seen,) = sample_attention(model, batch, matching, [words])
        assert seen is not None
        found.append(seen)
    return found


class _TeacherWords:
    """The teacher's attention from words, of each captured layer; none unless it was loaded."""

    def __init__(self, side: TeacherSide, store: TargetStore, shown: Sequence[_Shown]) -> None:
        self._words: dict[str, SampleAttention] = {}
        self._layers = side.layers
        if side.teacher is None:
            return
        fingerprint = store.manifest.fingerprint
        single = LayerMatching(
            side.layers, fingerprint.layers, side.windows, fingerprint.windows, fingerprint.map_codec
        )
        streamed = [one.streamed for one in shown]
        for one, seen in zip(shown, _looked(side.teacher.model, Collator(side.reader), single, streamed), strict=True):
            self._words[seen.key] = seen
            one.words = seen.words

    def panel(self, title: str, seen: SampleAttention, windows: tuple[tuple[int, ...], ...]) -> MapPanel:
        """The teacher's side of a student's matched layers."""
        words_WSN = None
        if (own := self._words.get(seen.key)) is not None:
            rows = dict(zip(self._layers, own.student_words_WSN, strict=True))
            words_WSN = torch.stack([torch.stack([rows[layer] for layer in window]).mean(0) for window in windows])
        names = tuple(f"teacher layer{'s' if len(window) > 1 else ''} {_span(window)}" for window in windows)
        return _panel(title, names, seen.teacher_WN, seen.teacher_with_sinks_WN, words_WSN)


def _student_panel(name: str, seen: SampleAttention, matching: LayerMatching, words: tuple[str, ...]) -> MapPanel:
    names = tuple(f"layer {layer}" for layer in matching.student_layers)
    # Another tokenizer may cut answers into other words.
    words_WSN = seen.student_words_WSN if seen.words == words else None
    return _panel(name, names, seen.student_WN, seen.student_with_sinks_WN, words_WSN)


def _panel(
    name: str, layers: tuple[str, ...], pooled_WN: Tensor, with_sinks_WN: Tensor, words_WSN: Tensor | None
) -> MapPanel:
    words = None if words_WSN is None else words_WSN.numpy()
    return MapPanel(name, layers, pooled_WN.numpy(), with_sinks_WN.numpy(), words)


def _span(window: tuple[int, ...]) -> str:
    return f"{window[0]} to {window[-1]}" if len(window) > 1 else str(window[0])
