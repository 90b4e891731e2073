"""How a student reads a stored sample: which token ids, which pixels, and where its image tokens are.

A student reads the stored ids, so long as they mean to it what they mean to the teacher. One whose tokenizer is another
reads the stored conversation by its own; then nothing of the teacher's words is left, and what remains are the
answers and the maps, for which only the number of image tokens must be the stored one.

Shape letters: T tokens, N image tokens.
"""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image
from torch import Tensor
from transformers import PreTrainedConfig, ProcessorMixin

from stages.checkpoints import load_config, load_processor, refuse_code
from stages.conversations import ConversationEncoder, UnusableConversation
from stages.families import FAMILIES, family_of, llava
from stages.families.batch import pixels_and_count, pixels_of
from stages.families.family import Family
from stages.images import decode_image
from stages.student.data.own_tokenizer import students_processor
from stages.student.data.tokenizers import other_tokenizer, tokenizer_differences
from stages.student.model.build import able_family, check_decoder, is_student, register_students
from storage.errors import UserError
from storage.streaming.stream import Mixture, Source, StreamConfig, StreamedSample, mixture_stream
from storage.targets.store import TargetStore

FIRST_SAMPLES = 16
"""Samples looked at before training starts."""


@dataclass(frozen=True)
class ReadSample:
    """One sample as the student reads it.

    Attributes:
        token_ids: `[T]` int64 with the student's own image token.
        answer_mask: `[T]` bool.
        image_positions: `[N]` positions of image tokens.
        pixels: the inputs of the image side, empty without an image.
    """

    token_ids: Tensor
    answer_mask: Tensor
    image_positions: Tensor
    pixels: dict[str, Tensor]


class SampleReader:
    """Streamed sample -> `ReadSample`; runs in the loader's workers.

    Args:
        processor: its image half makes the pixels; with `max_length` it makes the tokens too.
        image_token_id: the placeholder's id in the student's config.
        vocab_size: the student's; ids past it cannot be embedded.
        family: of the model that sees the pixels.
        stored_image_id: the placeholder's id in the store, when another.
        own_vision: whether the student has a tower of its own, whose number of image tokens must be compared.
        max_length: for a student that reads its own tokens, how many of a conversation; None reads the stored ones.
    """

    def __init__(
        self,
        processor: ProcessorMixin,
        image_token_id: int,
        vocab_size: int,
        family: Family = llava.FAMILY,
        *,
        stored_image_id: int | None = None,
        own_vision: bool = False,
        max_length: int | None = None,
    ) -> None:
        self.processor, self.image_token_id, self.vocab_size = processor, image_token_id, vocab_size
        # A decoder behind the teacher's eyes has plain positions and is not told where images are.
        self.family = family if own_vision else replace(family, modality_input=None)
        self.stored_image_id = image_token_id if stored_image_id is None else stored_image_id
        self.own_vision = own_vision
        self.encoder = None if max_length is None else ConversationEncoder(processor, image_token_id, max_length)

    def __call__(self, sample: StreamedSample) -> ReadSample:
        """The sample's tokens and pixels.

        Raises:
            UserError: another number of image tokens than is stored, or a token that the student cannot embed.
        """
        images = [decode_image(data) for data in sample.images]
        stored_T = sample.targets.token_ids.long()
        is_image_T = stored_T == self.stored_image_id
        if self.encoder is not None:
            read = self._own_tokens(self.encoder, sample, images)
            num_found = len(read.image_positions)
        else:
            # Compared before the placeholder gets the student's id: no word may become one.
            self._check_no_image(sample.key, stored_T[~is_image_T])
            pixels, num_found = self._pixels(images, num_stored=int(is_image_T.sum()))
            read = ReadSample(
                token_ids=stored_T.masked_fill(is_image_T, self.image_token_id),
                answer_mask=sample.targets.answer_mask,
                image_positions=is_image_T.nonzero()[:, 0],
                pixels=pixels,
            )
        self._check_count(sample.key, len(images), num_found, int(is_image_T.sum()))
        self._check_ids(sample.key, read.token_ids[read.token_ids != self.image_token_id])
        return read

    def _pixels(self, images: Sequence[Image.Image], num_stored: int) -> tuple[dict[str, Tensor], int]:
        """With the teacher's own processor the count is the stored one, and no text need be made for it."""
        if not self.own_vision:
            return pixels_of(self.family, self.processor, images), num_stored
        return pixels_and_count(self.family, self.processor, images)

    def _own_tokens(
        self, encoder: ConversationEncoder, sample: StreamedSample, images: Sequence[Image.Image]
    ) -> ReadSample:
        try:
            encoded = encoder.encode(sample.record["conversations"], images)
        except UnusableConversation as error:
            raise UserError(
                f"sample {sample.key} cannot be read by the student's own tokenizer: {error}. The targets hold it, so "
                "it cannot be left out in silence: take a student with the teacher's tokenizer, or extract from "
                "samples without it"
            ) from error
        return ReadSample(encoded.token_ids, encoded.answer_mask, encoded.image_positions, encoded.pixel_inputs)

    def _check_count(self, key: str, num_images: int, found: int, stored: int) -> None:
        if found != stored:
            raise UserError(
                f"sample {key}: the student makes {found} image tokens of its {num_images} images, the teacher's "
                f"targets hold {stored}. The maps of both must be over the same image tokens: choose a student that "
                "reads images as the teacher does (its image processor's size and patches), or let it see with the "
                "teacher's eyes (--vision teacher)"
            )

    def _check_no_image(self, key: str, text_ids: Tensor) -> None:
        if bool((text_ids == self.image_token_id).any()):
            raise UserError(
                f"sample {key} holds the student's image token {self.image_token_id} in its text; take a student with "
                "another placeholder, or samples without that word"
            )

    def _check_ids(self, key: str, ids: Tensor) -> None:
        if len(ids) and int(ids.max()) >= self.vocab_size:
            raise UserError(
                f"sample {key} holds token {int(ids.max())}, past the student's vocabulary of {self.vocab_size}; "
                "choose a student whose vocabulary holds every token of the data"
            )


@dataclass(frozen=True)
class ReaderSpec:
    """What a `SampleReader` for one student and one store is made of; `resolve_reader_spec` makes one.

    Attributes:
        processor: saved with the student; reads what the student reads.
        image_token_id: of the student's config.
        vocab_size: of the student's decoder.
        decoder: config of the student's decoder.
        family: of the model that sees the pixels.
        stored_image_id: the placeholder's id in the store.
        own_vision: whether the student keeps its own tower and adapter.
        max_length: set when the student reads its own tokens.
        teacher_folder: `teacher/` of the store, checked just now.
        teacher_processor: what is in it.
        notes: for the user.
    """

    processor: ProcessorMixin
    image_token_id: int
    vocab_size: int
    decoder: PreTrainedConfig
    family: Family
    stored_image_id: int
    own_vision: bool
    max_length: int | None
    teacher_folder: Path
    teacher_processor: ProcessorMixin
    notes: tuple[str, ...] = ()

    def reader(self) -> SampleReader:
        """Reads samples of the store."""
        return SampleReader(
            self.processor,
            self.image_token_id,
            self.vocab_size,
            self.family,
            stored_image_id=self.stored_image_id,
            own_vision=self.own_vision,
            max_length=self.max_length,
        )


def resolve_reader_spec(targets: TargetStore, folder: Path, *, own_vision: bool, kd_weight: float) -> ReaderSpec:
    """How the student in `folder` reads a store's samples.

    Args:
        targets: the store.
        folder: checkpoint of a bare decoder, of a student that an earlier stage saved, or with `own_vision` of a
            multimodal model.
        own_vision: whether it keeps its own tower and adapter.
        kd_weight: the largest weight of the logit loss among the stages that train it.

    Raises:
        UserError: the folder is not such a checkpoint, its family cannot be matched with the teacher's maps, or its
            token ids mean something else while a logit loss is asked for.
    """
    register_students()
    refuse_code(folder)
    teacher_folder = targets.teacher_folder()
    teacher = load_processor(teacher_folder)
    teacher_config, config = load_config(teacher_folder), load_config(folder)
    family = _family(folder, config, teacher_config.model_type, own_vision=own_vision)
    differences = tokenizer_differences(teacher, folder)
    if differences and kd_weight > 0:
        raise other_tokenizer(folder, differences)
    bare = not own_vision and not is_student(folder)
    if bare:
        # Until it is saved for the first time, its image token is one that its tokenizer gets or the teacher's.
        processor = students_processor(teacher, folder) if differences else teacher
        image_token_id = processor.image_token_id if differences else teacher_config.image_token_id
    else:
        processor = load_processor(folder) if own_vision or differences else teacher
        image_token_id = config.image_token_id
    note = f"{folder} has another tokenizer than the teacher, so it reads its own tokens and learns nothing of logits: "
    return ReaderSpec(
        processor=processor,
        image_token_id=image_token_id,
        vocab_size=config.get_text_config().vocab_size,
        decoder=config.get_text_config(),
        family=family,
        stored_image_id=teacher_config.image_token_id,
        own_vision=own_vision,
        max_length=targets.manifest.fingerprint.max_length if differences else None,
        teacher_folder=teacher_folder,
        teacher_processor=teacher,
        notes=(note + differences[0],) if differences else (),
    )


def _family(folder: Path, config: PreTrainedConfig, teacher_type: str, *, own_vision: bool) -> Family:
    """The family of the eyes; own ones take a whole model, the teacher's a decoder without any."""
    model_type = config.model_type
    if not own_vision:
        if model_type in FAMILIES:
            raise UserError(
                f"{folder} is a whole multimodal model ({model_type}); give --vision own for it to keep its tower and "
                "adapter, or name a causal language model as the student's decoder"
            )
        family = able_family(teacher_type)
        if not is_student(folder):
            check_decoder(folder, config)
        return family
    if model_type not in FAMILIES:
        raise UserError(
            f"{folder} is of type {model_type}, which has no vision tower and adapter of its own; name a multimodal "
            f"checkpoint ({', '.join(sorted(FAMILIES))}), or let it see with the teacher's eyes (--vision teacher)"
        )
    for role, name in (("student", model_type), ("teacher", teacher_type)):
        if (reason := family_of(name).why_not_with_own_vision()) is not None:
            raise UserError(f"a student with its own eyes cannot be trained with a {role} of type {name}: {reason}")
    return FAMILIES[model_type]


def check_first_samples(source: Source, reading: ReaderSpec) -> None:
    """Reads the first samples of a store, so that what does not fit is known before a model is loaded.

    Raises:
        UserError: as `SampleReader`.
    """
    # Whether the store is complete, the training stream itself asks.
    config = StreamConfig(seed=0, shuffle_shards=0, batch_size=FIRST_SAMPLES, allow_incomplete=True)
    stream = mixture_stream(Mixture([source], config), rank=0, world_size=1, epochs=range(1), with_maps=False)
    read = reading.reader()
    with closing(iter(stream)) as batches:
        for sample in next(batches):
            read(sample)
