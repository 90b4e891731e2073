"""Samples as the teacher will read them, before anything is extracted."""

from collections.abc import Iterator
from dataclasses import dataclass

from stages.conversations.token_runs import TokenRun, token_runs
from stages.estimate.report import EstimateConfig
from stages.estimate.sampling import plan_blocks, rows_of
from stages.teacher.batching import SamplePreparer
from stages.teacher.config import TeacherConfig
from stages.teacher.identity import identify_teacher
from stages.teacher.timings import Timings
from storage.samples.image_settings import ImageConfig
from storage.samples.sample_set import SampleSet
from storage.targets.commits import SkippedSample


@dataclass(frozen=True)
class SamplePreview:
    """One sample as the teacher will read it."""

    key: str
    runs: tuple[TokenRun, ...]
    num_cut_tokens: int
    num_cut_answer_tokens: int
    num_cut_images: int


def preview_samples(
    settings: TeacherConfig, samples: SampleSet, config: EstimateConfig, num_samples: int, images: ImageConfig
) -> Iterator[SamplePreview | SkippedSample]:
    """Reads one sample from each of `num_samples` equal parts of a set, or all of a smaller one.

    The teacher's weights are neither loaded nor looked for. `config.seed` chooses the samples, `images` says how the
    teacher is shown pictures. A sample that cannot be used comes with its reason.

    Raises:
        UserError: If the set is empty, or extraction would refuse the teacher.
    """
    identity = identify_teacher(settings, images, on_gpu=False, with_weights=False)
    encoder = identity.encoder()
    chosen = config.model_copy(update={"num_blocks": num_samples, "num_sampled": num_samples})
    for block in plan_blocks(samples.index.num_samples, chosen):
        for number, rows in rows_of(samples.index, block):
            with samples.shard(number) as shard:
                prepare = SamplePreparer(encoder, shard, Timings(), identity.image_rules)
                for found in map(prepare, rows):
                    if isinstance(found, SkippedSample):
                        yield found
                        continue
                    read = found.encoded
                    runs = token_runs(
                        identity.processor.tokenizer, read.token_ids, read.answer_mask, encoder.image_token_id
                    )
                    cuts = (read.num_cut_tokens, read.num_cut_answer_tokens, read.num_cut_images)
                    yield SamplePreview(found.key, tuple(runs), *cuts)
