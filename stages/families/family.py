"""What the project must know of a model family."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor

Joining = Literal["cat", "pad"]
"""How an input of several samples becomes one: joined along its first axis as it is, or with the other axes padded
with zeros at their ends first (families whose images have different numbers of tiles)."""


Layout = Literal["square", "sizes", "square_tiles", "tiles_in_rows"]
"""How the image tokens of a sample lie side by side: one square for each image; a rectangle for each, whose size the
processor gives; a square for each tile; or the small whole as a square, then all tiles as one rectangle whose rows end
with a token."""

RotaryAxes = Literal["in_order", "interleaved"]
"""How rotary frequencies are shared among the axes of 3D positions: those of time first, then height, then width; or in
turns."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family of multimodal models.

    Attributes:
        model_types: `model_type` of the configs that belong to it.
        vision_prefixes: parameter names of the vision tower and the projector start with one of these.
        projector_prefixes: those of the projector alone, which a student with its own vision tower may train.
        causal_image_tokens: whether an image token attends only to those before it (maps are zero above the diagonal).
            Where it is not, an image token still sees no token after its own image: maps depend on nothing else.
        pixel_inputs: the processor's outputs that depend on the image's pixels, and how those of several samples join.
        modality_input: name of the model's input that is 1 at image tokens and 0 elsewhere, if it takes one.
        deepstack: whether the model also adds features of earlier vision layers to its image tokens, one after each of
            its first decoder layers. `get_image_features` then returns them as `deepstack_features`.
        pixels_without_text: whether the processor takes images alone.
        last_linear: name within the model of the linear layer that ends the projector, if what follows it only moves
            features or averages them with weights that sum to 1: a linear layer behind it all can be folded into it.
        layout: how image tokens lie side by side; None where it is not known from what the processor gives.
        added_vectors: names of parameters that the model puts among the features after that layer.
        decoder_alone: whether the library also reads the decoder alone out of such a checkpoint, as a causal language
            model: it can then be a student's decoder.
        marks_with_pixels: whether tokens behind an image, such as its end, get vectors of the vision part too, and only
            in a forward pass that has pixels: what follows an image cannot be computed apart from it.
        rotary_axes: how the decoder encodes positions of three axes (time, height, width), which the model computes by
            `get_rope_index` from `image_grid_thw`; None for ordinary positions.
        caps_logits: whether the model caps what its head gives, as `final_logit_softcapping` of its config says.
    """

    model_types: tuple[str, ...]
    vision_prefixes: tuple[str, ...]
    projector_prefixes: tuple[str, ...]
    causal_image_tokens: bool = True
    pixel_inputs: Mapping[str, Joining] = field(default_factory=lambda: {"pixel_values": "cat"})
    modality_input: str | None = None
    deepstack: bool = False
    pixels_without_text: bool = True
    last_linear: str | None = None
    layout: Layout | None = None
    added_vectors: tuple[str, ...] = ()
    decoder_alone: bool = False
    marks_with_pixels: bool = False
    rotary_axes: RotaryAxes | None = None
    caps_logits: bool = False

    def logits(self, from_head: "Tensor", config: Any) -> "Tensor":
        """The model's logits, of what its head gives; `config` is that of its decoder."""
        cap = getattr(config, "final_logit_softcapping", None) if self.caps_logits else None
        return from_head if cap is None else (from_head / cap).tanh() * cap

    def why_no_prefix(self) -> str | None:
        """Why its conversations cannot share what comes before them, whatever its decoder is; None if they can."""
        marked = "tokens behind an image get vectors that the model makes with its pixels only"
        return marked if self.marks_with_pixels else None

    def why_no_student(self) -> str | None:
        """Why a student cannot have such a teacher; None if it can."""
        both_ways = "its image tokens attend in both directions, a student's decoder only backwards"
        return None if self.causal_image_tokens else both_ways

    def why_no_cells(self) -> str | None:
        """Why neighbouring image tokens cannot be put together in maps; None if they can."""
        if not self.causal_image_tokens:
            return "its image tokens attend in both directions, and no student learns from its maps"
        return (
            None if self.layout else "how its image tokens lie side by side is not known from what its processor gives"
        )

    def why_not_with_own_vision(self) -> str | None:
        """Why it can neither be a student with its own vision tower and projector nor teach one; None if it can."""
        both_ways = "its image tokens attend in both directions, and only causal maps are matched"
        return None if self.causal_image_tokens else both_ways
