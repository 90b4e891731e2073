"""Samples whose attention can be looked at: pictures, maps of teacher and students, words of the answer."""

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.attention_comparison import OpenedStudent, first_samples, open_student
from pipeline.report.page import TEACHER, GallerySample, MapPanel
from stages.evaluation.attention.received import SampleAttention, sample_attention
from stages.evaluation.attention.similarity import AttentionSimilarity, attention_similarity
from stages.evaluation.attention.words import Word, answer_words
from stages.images import decode_image
from stages.student.data.batch import Batch
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
    store = TargetStore.open(places[1])
    with closing(first_samples(places[0], store, SAMPLES_A_PICTURE * count)) as batches:
        streamed = _distinct_images([sample for batch in batches for sample in batch], count)
    shown = [_Shown(sample, []) for sample in streamed]
    similarity, notes = dict[str, AttentionSimilarity](), dict[str, None]()
    of_teacher = _TeacherWords(teacher, store, shown)
    windows: tuple[tuple[int, ...], ...] | None = None
    for name, model in models.items():
        opened = open_student(model, store)
        notes |= dict.fromkeys(f"{name}: {note}" for note in opened.notes)
        if name not in measured:
            similarity[name] = _similarity(opened, places[0], store, name, progress)
        own = opened.matching.windows
        title = None if own == windows else TEACHER if windows is None else f"{TEACHER}, as {name} learned"
        for one, (seen, words) in zip(shown, _looked(opened, [one.streamed for one in shown]), strict=True):
            one.words = one.words or words
            if title is not None:
                one.panels.append(of_teacher.panel(title, seen, own))
            one.panels.append(_student_panel(name, seen, opened.matching))
        windows = own
    return _placed(shown, store, similarity, notes)


def _placed(
    shown: Sequence[_Shown],
    store: TargetStore,
    similarity: Mapping[str, AttentionSimilarity],
    notes: Iterable[str],
) -> Gallery:
    """The samples whose image tokens have known places in the picture; a note says how many have none."""
    exif = store.manifest.fingerprint.images.exif
    samples, images = [], []
    for one in shown:
        boxes_N4 = _square_boxes(one.panels[0].pooled_WN.shape[-1])
        if boxes_N4 is None:
            continue
        image = one.streamed.images[0]
        question, answer = _first_turns(one.streamed)
        samples.append(
            GallerySample(
                key=one.streamed.key,
                question=question,
                answer=answer,
                image=decode_image(image, exif=exif),
                boxes_N4=boxes_N4,
                words=one.words,
                panels=tuple(one.panels),
            )
        )
        images.append(image)
    left_out = len(shown) - len(samples)
    said = [f"{left_out} samples are not shown: their image tokens form no square grid"] if left_out else []
    return Gallery(tuple(samples), tuple(images), similarity, (*notes, *said))


def _square_boxes(num_tokens: int) -> NDArray[np.float32] | None:
    side = math.isqrt(num_tokens)
    if side * side != num_tokens:
        return None
    top, left = np.divmod(np.arange(num_tokens), side)
    return (np.stack([left, top, left + 1, top + 1], 1) / side).astype(np.float32)


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


def _similarity(
    opened: OpenedStudent, samples: str, store: TargetStore, name: str, progress: Progress
) -> AttentionSimilarity:
    task = progress.task(f"compare {name}", SIMILARITY_SAMPLES)
    with closing(first_samples(samples, store, SIMILARITY_SAMPLES)) as batches:
        return attention_similarity(
            opened.student, map(opened.collator, batches), opened.matching, task, layers_from=opened.layers_from
        )


def _looked(opened: OpenedStudent, samples: Sequence[StreamedSample]) -> list[tuple[SampleAttention, tuple[str, ...]]]:
    """Each sample's attention and the words of its answers; one at a time, since maps of all layers are large."""
    found = []
    for sample in samples:
        batch: Batch = opened.collator([sample])
        tokenizer: Any = opened.collator.reader.processor.tokenizer
        words: list[Word] = answer_words(tokenizer, batch)[0][:MOST_WORDS]
        (seen,) = sample_attention(opened.student, batch, opened.matching, [words])
        assert seen is not None
        found.append((seen, seen.words))
    return found


class _TeacherWords:
    """The teacher's attention from words, of each captured layer; none unless its checkpoint was named."""

    def __init__(self, checkpoint: str | None, store: TargetStore, shown: Sequence[_Shown]) -> None:
        self._words: dict[str, tuple[Tensor, tuple[str, ...]]] = {}
        self._layers = store.manifest.fingerprint.layers
        if checkpoint is None:
            return
        opened = open_student(checkpoint, store)
        single = tuple((layer,) for layer in self._layers)
        opened = replace(opened, matching=replace(opened.matching, student_layers=tuple(self._layers), windows=single))
        for one, (seen, words) in zip(shown, _looked(opened, [one.streamed for one in shown]), strict=True):
            self._words[seen.key] = seen.student_words_WSN, words
            one.words = words

    def panel(self, title: str, seen: SampleAttention, windows: tuple[tuple[int, ...], ...]) -> MapPanel:
        """The teacher's side of a student's matched layers."""
        words_WQN = None
        if (found := self._words.get(seen.key)) is not None and found[1] == seen.words:
            rows = {layer: found[0][row] for row, layer in enumerate(self._layers)}
            words_WQN = torch.stack([torch.stack([rows[layer] for layer in window]).mean(0) for window in windows])
        names = tuple(f"teacher layer{'s' if len(window) > 1 else ''} {_span(window)}" for window in windows)
        return _panel(title, names, seen.teacher_WN, seen.teacher_with_sinks_WN, words_WQN)


def _student_panel(name: str, seen: SampleAttention, matching: Any) -> MapPanel:
    names = tuple(f"layer {layer}" for layer in matching.student_layers)
    return _panel(name, names, seen.student_WN, seen.student_with_sinks_WN, seen.student_words_WSN)


def _panel(
    name: str, layers: tuple[str, ...], pooled_WN: Tensor, with_sinks_WN: Tensor, words_WQN: Tensor | None
) -> MapPanel:
    words = None if words_WQN is None else words_WQN.numpy()
    return MapPanel(name, layers, pooled_WN.numpy(), with_sinks_WN.numpy(), words)


def _span(window: tuple[int, ...]) -> str:
    return f"{window[0]} to {window[-1]}" if len(window) > 1 else str(window[0])
