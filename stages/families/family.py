"""What the project must know of a model family."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Joining = Literal["cat", "pad"]
"""How an input of several samples becomes one: joined along its first axis as it is, or with the other axes padded
with zeros at their ends first (families whose images have different numbers of tiles)."""


Layout = Literal["square", "sizes", "square_tiles", "tiles_in_rows"]
"""How the image tokens of a sample lie side by side: one square for each image; a rectangle for each, whose size the
processor gives; a square for each tile; or the small whole as a square, then all tiles as one rectangle whose rows end
with a token."""


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
        features_enter_once: image features replace the placeholders' embeddings and reach the decoder nowhere else, so
            a student can be given them through its post-connector.
        pixels_without_text: whether the processor takes images alone.
        last_linear: name within the model of the linear layer that ends the projector, if what follows it only moves
            features or averages them with weights that sum to 1: a linear layer behind it all can be folded into it.
        layout: how image tokens lie side by side; None where it is not known from what the processor gives.
        added_vectors: names of parameters that the model puts among the features after that layer.
    """

    model_types: tuple[str, ...]
    vision_prefixes: tuple[str, ...]
    projector_prefixes: tuple[str, ...]
    causal_image_tokens: bool = True
    pixel_inputs: Mapping[str, Joining] = field(default_factory=lambda: {"pixel_values": "cat"})
    modality_input: str | None = None
    features_enter_once: bool = True
    pixels_without_text: bool = True
    last_linear: str | None = None
    layout: Layout | None = None
    added_vectors: tuple[str, ...] = ()

    def why_no_student(self) -> str | None:
        """Why a student cannot have such a teacher; None if it can."""
        if not self.causal_image_tokens:
            return "its image tokens attend in both directions, a student's decoder only backwards"
        if not self.features_enter_once:
            return "it also adds image features inside its decoder, where a student cannot take them"
        return None

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
