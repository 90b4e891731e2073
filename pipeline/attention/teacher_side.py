"""The teacher's side of a comparison of attention: its stored maps, or the teacher itself at work."""

from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.attention_comparison import BATCH_SIZE, first_samples
from pipeline.models import default_device
from stages.attention.capturable_layers import layers_with_maps
from stages.checkpoints.configs import load_config
from stages.checkpoints.processors import hide_loading_bars, load_processor
from stages.checkpoints.resolve import resolve_checkpoint
from stages.evaluation.attention.observe import Observed, observe_model, observe_stored
from stages.families.registry import family_of
from stages.images import decode_image
from stages.student.data.batch import Batch
from stages.student.data.sample_reader import SampleReader
from stages.student.layer_matching import LayerMatching
from stages.teacher.config import TeacherConfig
from stages.teacher.teacher import Teacher, load_teacher
from stages.unusable_sample import UnusableSample
from storage.errors import UserError
from storage.progress import Progress
from storage.samples.members import StoredSample
from storage.samples.sample_set import SampleSet
from storage.streaming.stream import StreamedSample
from storage.targets.sample_targets import SampleTargets
from storage.targets.store import TargetStore


@dataclass(frozen=True)
class TeacherSide:
    """Where the teacher's attention comes from.

    Attributes:
        reader: Reads samples as the teacher does.
        layers: Its layers that are looked at, each alone.
        store: With its maps; None where only the teacher itself is looked at.
        teacher: Loaded; None where its stored maps are enough.
    """

    reader: SampleReader
    layers: tuple[int, ...]
    store: TargetStore | None
    teacher: Teacher | None

    @property
    def windows(self) -> tuple[tuple[int, ...], ...]:
        """Each layer as a window of its own."""
        return tuple((layer,) for layer in self.layers)

    @property
    def stores_answers(self) -> bool:
        """Whether attention from answers is looked at as it is stored."""
        return self.teacher is None and self.store is not None and self.store.manifest.fingerprint.answer_attention

    def samples(self, samples: str, limit: int, progress: Progress) -> Generator[list[StreamedSample]]:
        """The first `limit` samples in batches, of the store or else of the sample set."""
        if self.store is not None:
            return first_samples(samples, self.store, limit, with_answers=self.stores_answers)
        assert self.teacher is not None
        return _live_samples(samples, self.teacher, limit, progress)

    def observe(self, batch: Batch, text_positions: Sequence[Tensor] | None) -> list[Observed | None]:
        """The teacher's attention on a batch of its reader; of the loaded teacher if there is one."""
        if self.teacher is not None:
            model = self.teacher.model
            moved = batch.to(model.device, model.dtype)
            positions, cells = batch.image_positions, batch.cells
            return observe_model(model, moved.inputs, positions, self.windows, text_positions, cells)
        assert self.store is not None
        fingerprint = self.store.manifest.fingerprint
        matching = LayerMatching(
            self.layers, fingerprint.layers, self.windows, fingerprint.windows, fingerprint.map_codec
        )
        return observe_stored(batch.maps, matching, default_device())


def open_teacher(store: TargetStore | None, checkpoint: str | None) -> TeacherSide:
    """A store's teacher, or a loaded one; with both, it must be the one that the store is of.

    Raises:
        UserError: If the teacher cannot be loaded, or is another one.
    """
    hide_loading_bars()
    if store is None:
        assert checkpoint is not None
        teacher = load_teacher(TeacherConfig(checkpoint=checkpoint, layers=_all_layers(checkpoint)))
        identity = teacher.identity
        reader = SampleReader(
            identity.processor,
            identity.config.image_token_id,
            identity.config.get_text_config().vocab_size,
            identity.family,
            own_vision=True,
            images=identity.images,
        )
        return TeacherSide(reader, identity.layers, None, teacher)
    fingerprint, folder = store.manifest.fingerprint, store.teacher_folder()
    config = load_config(folder)
    reader = SampleReader(
        load_processor(folder),
        config.image_token_id,
        config.get_text_config().vocab_size,
        family_of(config.model_type),
        own_vision=True,
        images=fingerprint.images,
    )
    return TeacherSide(
        reader, fingerprint.layers, store, None if checkpoint is None else _same_teacher(store, checkpoint)
    )


def _same_teacher(store: TargetStore, checkpoint: str) -> Teacher:
    fingerprint = store.manifest.fingerprint
    settings = TeacherConfig.model_validate(
        {"checkpoint": checkpoint, "layers": fingerprint.layers, "dtype": fingerprint.dtype}
    )
    teacher = load_teacher(settings, fingerprint.images)
    if teacher.identity.weights != fingerprint.teacher_weights:
        raise UserError(
            f"{checkpoint} has weights {teacher.identity.weights[:12]}, the targets at {store.store.url} are of a "
            f"teacher with {fingerprint.teacher_weights[:12]}; name the teacher that they were extracted with"
        )
    return teacher


def _all_layers(checkpoint: str) -> tuple[int, ...] | None:
    """All layers of the decoder that give maps; None where there are none, which the teacher's loading refuses."""
    decoder = load_config(resolve_checkpoint(checkpoint)).get_text_config()
    able = layers_with_maps(decoder)
    return tuple(range(decoder.num_hidden_layers) if able is None else sorted(able)) or None


def _live_samples(samples: str, teacher: Teacher, limit: int, progress: Progress) -> Generator[list[StreamedSample]]:
    held: list[StreamedSample] = []
    num_unusable = 0
    sample_set = SampleSet.open(samples)
    for number in range(len(sample_set.index.shards)):
        with closing(sample_set.shard(number)) as shard:
            for row in range(min(limit, len(shard))):
                try:
                    held.append(_as_streamed(shard.read(row), teacher))
                except UnusableSample:
                    num_unusable += 1
                if len(held) == BATCH_SIZE:
                    yield held
                    held = []
                limit -= 1
        if limit <= 0:
            break
    if held:
        yield held
    if num_unusable:
        progress.message(f"note: {num_unusable} samples were left out, the teacher cannot read them")


def _as_streamed(sample: StoredSample, teacher: Teacher) -> StreamedSample:
    """A sample as a store would give it, without maps and logits."""
    encoder = teacher.encoder
    images = [decode_image(data, exif=encoder.image_settings.exif) for data in sample.images]
    encoded = encoder.encode(sample.record["conversations"], images)
    targets = SampleTargets(
        sample.key,
        encoded.token_ids.int(),
        encoded.answer_mask,
        None,
        torch.zeros(int(encoded.answer_mask.sum()), 0, dtype=torch.uint8),
        encoded.num_cut_answer_tokens,
    )
    return StreamedSample(sample.key, sample.record, sample.images, targets, None)
