"""Tries a teacher's template and processor before a cluster is started or weights are loaded."""

from contextlib import suppress
from typing import Final, get_args

from PIL import Image

from stages.conversations.encoder import NO_LIMIT, ConversationEncoder
from stages.teacher.config import TeacherConfig
from stages.teacher.identity import identify_teacher
from stages.unusable_sample import ReasonOfText, UnusableSample
from storage.errors import CorruptData, UserError
from storage.samples.sample_set import SampleSet

FIRST_SAMPLES: Final = 16
"""Samples of the first shard that are rendered, until one can be."""


def check_first_samples(settings: TeacherConfig, samples: SampleSet, num_ranks: int = 1) -> None:
    """Refuses a teacher whose processor takes no picture though samples have some, or whose template takes no sample.

    Of the samples only the text is rendered, in the process of templates: their images and tokens may end a process,
    and are left to the workers. Samples that cannot be used for another reason are left to the ledger.

    Raises:
        UserError: If it is one; as `identify_teacher` and `ConversationEncoder`.
    """
    identity = identify_teacher(settings, on_gpu=False, with_weights=False, num_ranks=num_ranks)
    template = settings.chat_template or f"that of {settings.checkpoint}"
    encoder = ConversationEncoder(identity.processor, identity.config.image_token_id, NO_LIMIT)
    if _hold_images(samples):
        try:
            encoder.encode_pair("What is in the picture?", "All is grey.", [Image.new("RGB", (64, 48), "grey")])
        except UnusableSample as error:
            raise _refusal(template, f"a question about a grey picture: {error}") from error
    if not samples.index.shards:
        return
    refusals: list[tuple[str, UnusableSample]] = []
    # What is wrong with the file is said where it is read whole.
    with suppress(CorruptData, OSError), samples.shard(0) as shard:
        for row in range(min(len(shard), FIRST_SAMPLES)):
            sample = shard.read(row)
            try:
                encoder.render(sample.record["conversations"], len(sample.images))
            except UnusableSample as error:
                refusals.append((sample.key, error))
            else:
                return
    if refusals and all(error.reason in get_args(ReasonOfText) for _, error in refusals):
        key, first = refusals[0]
        raise _refusal(template, f"any of the first {len(refusals)} samples; of {key}: {first}") from first


def _hold_images(samples: SampleSet) -> bool:
    """Whether any sample has an image; what is wrong with a table is said where its shard is read."""
    for number in range(len(samples.index.shards)):
        with suppress(CorruptData, OSError):
            if any(len(members.spans) > 1 for members in samples.members(number)):
                return True
    return False


def _refusal(template: str, found: str) -> UserError:
    return UserError(
        f"the teacher's chat template ({template}) or processor does not take {found}. Set teacher.chat_template to "
        "one that fits: a jinja file, or one that comes with the package (chatml, llama-3, llava-1.5, mistral)"
    )
