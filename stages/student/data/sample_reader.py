"""How a student reads a stored sample: its token ids, its pixels, the positions of its image tokens.

A student reads the stored token ids where they mean the same to it as to the teacher. A student with another tokenizer
reads the stored conversation with its own one. It then learns from the answers and the attention maps, from the
teacher's logits only where both can be compared, and only the number of image tokens must be the stored one.
"""

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from PIL import Image
from transformers import PreTrainedConfig, ProcessorMixin

from stages.checkpoints.configs import load_config
from stages.checkpoints.processors import load_processor
from stages.conversations.cuts import StoredTurns, part_with_images
from stages.conversations.encoder import ConversationEncoder, EncodedConversation
from stages.families.batch import pixels_and_count, pixels_of
from stages.families.family import Family
from stages.families.registry import LLAVA
from stages.images import decode_image
from stages.student.data.alignment import ComparedRows, TokenAlignment
from stages.student.data.tokenizer_compatibility import student_processor, tokenizer_differences
from stages.student.data.vocabularies import other_tokenizer
from stages.student.model.build import check_decoder, deepstack_levels, teacher_family
from stages.student.model.student import register_students
from stages.student.stage_config import Alignment
from stages.student.student_kind import is_student, vision_family
from stages.unusable_sample import UnusableSample
from storage.errors import CorruptData, UserError
from storage.samples.image_settings import DEFAULT_IMAGES, ImageConfig
from storage.streaming.stream import Mixture, Source, StreamConfig, StreamedSample, mixture_stream
from storage.targets.manifest import Cut
from storage.targets.store import TargetStore

FIRST_SAMPLES = 16
"""Samples looked at before training starts."""


@dataclass(frozen=True)
class SampleReader:
    """Reads streamed samples as one student does; runs in the loader's workers.

    Attributes:
        processor: Saved with the student; makes its pixels, and with `max_length` its tokens too.
        image_token_id: The image token's id in the student's config.
        vocab_size: The student's; larger ids have no embedding.
        family: Of the vision tower.
        stored_image_id: The image token's id in the store; None where it is the student's.
        own_vision: Whether the student has its own vision tower, so that numbers of image tokens are compared.
        max_length: Tokens of a conversation for a student that reads with its own tokenizer; None reads stored ids.
        cut: Where such a student cuts a longer one.
        images: How the store's pictures were read and placed.
        alignment: Compares the teacher's tokens with the student's; None where logits need the teacher's tokenizer.
    """

    processor: ProcessorMixin
    image_token_id: int
    vocab_size: int
    family: Family = LLAVA
    stored_image_id: int | None = None
    own_vision: bool = False
    max_length: int | None = None
    cut: Cut = "whole_turns"
    images: ImageConfig = DEFAULT_IMAGES
    alignment: TokenAlignment | None = None

    @property
    def reads_anew(self) -> bool:
        """Whether the student reads conversations with its own tokenizer, not the stored ids."""
        return self.max_length is not None

    @property
    def stored_id(self) -> int:
        """The image token's id in the store."""
        return self.image_token_id if self.stored_image_id is None else self.stored_image_id

    @property
    def input_family(self) -> Family:
        """Describes the student's inputs: a decoder with the teacher's vision tower is not told where images are."""
        return self.family if self.own_vision else replace(self.family, modality_input=None)

    @cached_property
    def encoders(self) -> dict[Cut, ConversationEncoder]:
        """Encode conversations with the student's own tokenizer; empty for a student that reads stored ids.

        The first cuts as the store does. Where in the student's tokens no answer is whole or not all images are left,
        the second takes what fits, inside an answer too: the sample is the store's and cannot be left out.
        """
        if self.max_length is None:
            return {}
        cuts: dict[Cut, None] = {self.cut: None, "tokens": None}
        return {
            cut: ConversationEncoder(self.processor, self.image_token_id, self.max_length, cut=cut, images=self.images)
            for cut in cuts
        }

    def compared_rows(self, sample: StreamedSample, read: EncodedConversation) -> ComparedRows | None:
        """Which answer rows of a sample have logits to learn from, where some have none; None where all or none do."""
        if self.alignment is None or not self.reads_anew:
            return None
        targets = sample.targets
        return self.alignment.compared_rows(
            targets.token_ids.long(), targets.answer_mask, read.token_ids, read.answer_mask
        )

    def __call__(self, sample: StreamedSample) -> EncodedConversation:
        """The sample's tokens and pixels.

        Raises:
            UserError: If the student makes another number of image tokens than is stored, or cannot embed a token.
        """
        targets = sample.targets
        # A cut may have taken images of later turns, which the teacher has not seen.
        turns, num_images = part_with_images(
            sample.record["conversations"], len(sample.images), targets.answer_mask, targets.num_cut_answer_tokens
        )
        images = [decode_image(data, exif=self.images.exif) for data in sample.images[:num_images]]
        stored_T = targets.token_ids.long()
        is_image_T = stored_T == self.stored_id
        num_found = num_stored = int(is_image_T.sum())
        if self.encoders:
            read = _encoded(self.encoders, sample.key, turns, images)
            num_found = len(read.image_positions)
        else:
            # Before the image token gets the student's id, so that no word becomes an image token.
            if bool((stored_T[~is_image_T] == self.image_token_id).any()):
                raise UserError(
                    f"sample {sample.key} holds the student's image token {self.image_token_id} in its text; take a "
                    "student with another image token, or samples without that word"
                )
            if self.own_vision:
                pixels, num_found = pixels_and_count(self.family, self.processor, images, self.image_token_id)
            else:
                # The teacher's processor makes the stored number of image tokens.
                pixels = pixels_of(self.family, self.processor, images)
            read = EncodedConversation(
                token_ids=stored_T.masked_fill(is_image_T, self.image_token_id),
                answer_mask=targets.answer_mask,
                pixel_inputs=pixels,
                image_positions=is_image_T.nonzero()[:, 0],
                num_images=num_images,
            )
        if num_found != num_stored:
            raise UserError(
                f"sample {sample.key}: the student makes {num_found} image tokens of its {len(images)} images, the "
                f"teacher's targets hold {num_stored}. The maps of both must be over the same image tokens: choose a "
                "student that reads images as the teacher does (its image processor's size and patches), or give it "
                "the teacher's vision tower (--vision teacher)"
            )
        if targets.cells_X is not None and len(targets.cells_X) != num_stored:
            raise CorruptData(
                f"sample {sample.key}: its map's cells are of {len(targets.cells_X)} image tokens, its tokens hold "
                f"{num_stored}; run `cdp verify` on the targets, or extract again"
            )
        words_T = read.token_ids[read.token_ids != self.image_token_id]
        if len(words_T) and int(words_T.max()) >= self.vocab_size:
            raise UserError(
                f"sample {sample.key} holds token {int(words_T.max())}, past the student's vocabulary of "
                f"{self.vocab_size}; choose a student whose vocabulary holds every token of the data"
            )
        return read


def _encoded(
    encoders: Mapping[Cut, ConversationEncoder], key: str, turns: StoredTurns, images: Sequence[Image.Image]
) -> EncodedConversation:
    """The turns with all of the images: maps are over the tokens of them all."""
    refusals = []
    for encoder in encoders.values():
        try:
            read = encoder.encode(turns, images)
        except UnusableSample as error:
            refusals.append(str(error))
            if error.reason != "too_long":
                break
        else:
            if read.num_images == len(images):
                return read
            fitting = f"{read.num_images} of the teacher's {len(images)} images fit into {encoder.max_length} tokens"
            refusals.append(f"image_beyond_max_length: {fitting}")
    raise UserError(
        f"sample {key} cannot be read by the student's own tokenizer: {refusals[-1]}. The targets hold it, so it "
        "cannot be left out in silence: take a student with the teacher's tokenizer, or extract from samples without it"
    )


@dataclass(frozen=True)
class ReaderSpec:
    """What one student needs in order to read one store; `resolve_reader_spec` makes it.

    Attributes:
        reader: Reads samples of the store.
        decoder: Config of the student's decoder.
        teacher_folder: `teacher/` of the store, whose digests were checked.
        teacher_processor: Loaded from it.
        notes: For the user.
    """

    reader: SampleReader
    decoder: PreTrainedConfig
    teacher_folder: Path
    teacher_processor: ProcessorMixin
    notes: tuple[str, ...] = ()


def resolve_reader_spec(
    targets: TargetStore, folder: Path, *, own_vision: bool, kd_weight: float, kd_alignment: Alignment = "same"
) -> ReaderSpec:
    """Finds out how the student in `folder` reads a store's samples.

    The folder is the checkpoint of a bare decoder, of a student that an earlier stage saved, or with `own_vision` of a
    multimodal model, which keeps its vision tower and projector. `kd_weight` and `kd_alignment` are the stage's.

    Raises:
        UserError: If the folder is no such checkpoint, its family cannot be matched with the teacher's maps, or its
            token ids mean something else while a logit loss is asked for that needs the teacher's.
    """
    register_students()
    teacher_folder = targets.teacher_folder()
    teacher = load_processor(teacher_folder)
    teacher_config, config = load_config(teacher_folder), load_config(folder)
    family = _family(folder, config, teacher_config, own_vision=own_vision)
    differences = tokenizer_differences(teacher, folder)
    if differences and kd_weight > 0 and kd_alignment == "same":
        raise other_tokenizer(folder, differences)
    bare = not own_vision and not is_student(folder)
    if bare:
        # A student that was never saved takes the teacher's image token, or one that its tokenizer gets here.
        processor, image_token_id = teacher, teacher_config.image_token_id
        if differences:
            image_token = teacher.tokenizer.convert_ids_to_tokens(image_token_id)
            processor = student_processor(teacher, folder, image_token)
            image_token_id = processor.tokenizer.convert_tokens_to_ids(image_token)
    else:
        processor = load_processor(folder) if own_vision or differences else teacher
        image_token_id = config.image_token_id
    reader = SampleReader(
        processor,
        image_token_id,
        config.get_text_config().vocab_size,
        family,
        stored_image_id=teacher_config.image_token_id,
        own_vision=own_vision,
        max_length=targets.manifest.fingerprint.max_length if differences else None,
        cut=targets.manifest.fingerprint.cut,
        images=targets.manifest.fingerprint.images,
    )
    logits = "does not learn from logits"
    if kd_weight > 0 and kd_alignment != "same":
        sides = (teacher, teacher_config.image_token_id, targets.store.url), (processor, image_token_id, str(folder))
        reader = replace(reader, alignment=TokenAlignment.of_processors(*sides))
        logits = "learns from logits where both have read the same text"
    note = f"{folder} has another tokenizer than the teacher, so it reads with its own and {logits}: "
    notes = tuple(note + difference for difference in differences[:1])
    return ReaderSpec(reader, config.get_text_config(), teacher_folder, teacher, notes)


def _family(folder: Path, config: PreTrainedConfig, teacher: PreTrainedConfig, *, own_vision: bool) -> Family:
    """Family of the vision tower; refuses a checkpoint that is not of the kind that `own_vision` says."""
    family = vision_family(folder, config.model_type, teacher.model_type, own_vision=own_vision)
    if not own_vision:
        levels = deepstack_levels(teacher, teacher_family(teacher))
        if not is_student(folder):
            check_decoder(folder, config, levels)
    return family


def check_first_samples(source: Source, reader: SampleReader) -> tuple[int, int]:
    """Reads the first samples of a store, so that a student that cannot read them is refused before it is loaded.

    Returns:
        How many of their answer rows have logits that the student is compared with, where not all have them; and how
        many rows there are.

    Raises:
        UserError: As `SampleReader`; if logits are to be compared and no row has any.
    """
    # The training stream itself checks whether the store is complete.
    config = StreamConfig(seed=0, shuffle_shards=0, batch_size=FIRST_SAMPLES, allow_incomplete=True)
    stream = mixture_stream(Mixture([source], config), rank=0, world_size=1, epochs=range(1), with_maps=False)
    with closing(iter(stream)) as batches:
        samples = next(batches)
    num_compared = num_rows = 0
    for sample in samples:
        read = reader(sample)
        if (found := reader.compared_rows(sample, read)) is not None:
            num_compared += len(found)
            num_rows += int(read.answer_mask.sum())
    if num_rows and not num_compared:
        raise UserError(
            f"none of the {num_rows} answer rows of the first {len(samples)} samples of {source.targets.store.url} can "
            "be compared with the student's: the two tokenizers spell no answer alike. Take a student with the "
            "teacher's tokenizer, or set kd_weight to 0"
        )
    return num_compared, num_rows
