"""What the project must know of a model family."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family of multimodal models.

    Attributes:
        vision_prefixes: parameter names of the vision tower and the adapter start with one of these.
        causal_image_tokens: whether an image token attends only to those before it (maps are zero above the diagonal).
        pixel_inputs: the processor's outputs that depend on the image's pixels.
    """

    vision_prefixes: tuple[str, ...]
    causal_image_tokens: bool
    pixel_inputs: tuple[str, ...]
