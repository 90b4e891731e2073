"""Settings of the teacher; they import no torch, so that a mistake in them is said at once."""

from collections.abc import Collection
from typing import Annotated, Literal

from pydantic import Field

from stages.attention.layer_selection import (
    default_num_matched,
    sliding_windows,
    visual_understanding_layers,
    with_maps,
)
from stages.settings import AtResume
from storage.codecs.codec_settings import MAX_TOP_K, MapCodecName, NumTailSamples, Temperatures
from storage.errors import UserError
from storage.strict_model import StrictModel
from storage.targets.manifest import MAX_POOLING, Cut

PrefixReuse = Literal["auto", "on", "off"]
Parallel = Literal["layers", "tensor"]


class TeacherConfig(StrictModel):
    """Which teacher, and what is stored of its attention and answers."""

    checkpoint: Annotated[str, AtResume.SAME_DATA]
    """Folder or hub id of the teacher."""
    chat_template: Annotated[str | None, AtResume.SAME_DATA] = None
    """A jinja file, or the name of a template that comes with the package (chatml, llama-3, llava-1.5, mistral), in
    place of the checkpoint's own. It is stored with the targets, and students are saved with it."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the forward pass; auto is bfloat16 on a GPU and float32 on a CPU."""
    max_length: int = Field(default=1536, ge=8, le=1_000_000)
    """Tokens of a conversation, image tokens included; longer ones are cut, and counted."""
    cut: Cut = "whole_turns"
    """Where a longer conversation ends: behind the last answer that fits whole (none: the sample is in the ledger as
    too_long), or at the last token that fits, inside an answer too, as the reference trainer does. A turn whose images
    do not fit is left out with all after it."""
    batch_size: Annotated[int | None, AtResume.MAY_CHANGE] = Field(default=None, ge=1)
    """Samples of one forward pass; None finds on a GPU what fits, and is 8 on a CPU. Changes no byte on a CPU, and
    roundings on a GPU."""
    layers: tuple[int, ...] | None = None
    """Captured decoder layers, counted from 0, consecutive among those that have attention maps; None takes those of
    the middle third."""
    num_matched: int | None = Field(default=None, ge=1)
    """Student layers the sink masks are made for; None is 7, or fewer for a shallow teacher."""
    map_codec: MapCodecName = "auto"
    """How attention maps are stored: `float16` is exact to rounding; `sqrt8`, `sqrt4`, `sqrt2` take 8, 4 and 2 bits an
    entry; `auto` 8 bits for maps of fewer than 700 image tokens and for windows of fewer than 5 layers, which need
    them, and 4 for others (docs/codecs.md#map-codecs). Sink masks and the mean of each key are exact in all."""
    logit_codec: Literal["float16", "levels"] = "levels"
    """How log-probabilities are stored: 2 bytes each, or that for 9 of them and about 4 bits for each other."""
    top_k: int | None = Field(default=None, ge=1, le=MAX_TOP_K)
    """Tokens of which each answer row keeps the log-probability, exactly or nearly; about 3 bytes each. None is 48,
    and 256 if `temperatures` are asked for; for these a vocabulary of at most 1024 is kept whole."""
    tail_samples: NumTailSamples = 30
    """Tokens sampled from the others, so that the logit loss is right in expectation; more make it less noisy."""
    temperatures: Temperatures = ()
    """Temperatures besides 1 that a student may ask for. Records grow several times. Above 1 the loss is noisier than
    at 1 unless the whole vocabulary is kept (`top_k`): far more of the mass is sampled. `cdp estimate` says both."""
    tempered_samples: NumTailSamples = 256
    """Tokens sampled for each of `temperatures`, in proportion to their probability at it; about 2 bytes each."""
    map_pooling: int = Field(default=1, ge=1, le=MAX_POOLING)
    """Image tokens along a side of the cells of neighbours that maps are of; 1 is a row and a column for each token.
    Maps of 2x2 tokens have a sixteenth of the entries. Refused for families whose image tokens form no regular grid
    (docs/codecs.md#maps-of-cells)."""
    max_image_tokens: int | None = Field(default=None, ge=1, le=1_000_000)
    """Samples with more image tokens are left out, in the ledger as too_many_image_tokens; None takes all."""
    answer_attention: bool = False
    """Whether the mean attention from each answer to the image is stored too, for a student's
    `answer_attention_weight`: 2 bytes for each captured layer, answer and image token
    (docs/codecs.md#answer-attention)."""
    prefix_reuse: PrefixReuse = "auto"
    """Whether tokens up to a sample's last image are computed once for all conversations that share them: `auto` where
    the teacher's decoder allows it, and in a store that was begun as it was begun; `on` or not at all; `off` computes
    each conversation as a whole. The two ways differ in roundings (docs/scale.md#the-image-once)."""
    parallel: Parallel = "layers"
    """How `extract.gpus_per_worker` GPUs share one teacher: `layers` in a row, which computes what one GPU does;
    `tensor` splits each layer over as many processes, which all compute at once, and adds what they find. It sums in
    another order, is part of the store's fingerprint, and is for plain decoders
    (docs/scale.md#each-layer-over-several-gpus)."""
    trust_remote_code: Annotated[bool, AtResume.MAY_CHANGE] = False
    """Runs Python code that comes with the checkpoint. Only for checkpoints you wrote or read."""


def captured_layers(
    settings: TeacherConfig, num_layers: int, able: Collection[int] | None = None
) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """Decoder layers whose maps are stored, and the windows of them that are stored exactly.

    `able` are the layers that have maps, None for all. Layers of the settings that are not among them are left in.

    Raises:
        UserError: If the layers do not rise, are not all of the decoder, or leave one out that has maps.
    """
    third = visual_understanding_layers(num_layers)
    layers = settings.layers or with_maps(third, able) or tuple(third)
    able_of_decoder = with_maps(range(num_layers), able)
    passed_over = {layer for layer in able_of_decoder if layers[0] <= layer <= layers[-1]} - {*layers}
    if not 0 <= layers[0] <= layers[-1] < num_layers or passed_over or layers != tuple(sorted({*layers})):
        raise UserError(f"layers {list(layers)} are not consecutive layers of a decoder with {num_layers}")
    num_matched = settings.num_matched or min(default_num_matched(num_layers), len(layers))
    return layers, sliding_windows(layers, num_matched)


def ranks_of(settings: TeacherConfig, gpus_per_worker: int) -> int:
    """Processes over which each layer is split; 1 unless that is asked for.

    Raises:
        UserError: If it is asked for with nothing to split over.
    """
    if settings.parallel == "layers":
        return 1
    if gpus_per_worker == 1:
        raise UserError(
            "teacher.parallel is tensor, which splits each layer of a teacher over several GPUs, and "
            "extract.gpus_per_worker is 1: set it to 2 or more, or teacher.parallel to layers"
        )
    return gpus_per_worker
