"""How the pictures of samples are read and placed: settings that decide what a teacher and its students see."""

from typing import Final, Literal

from storage.strict_model import StrictModel

ExifTurn = Literal["ignore", "apply"]
ImagePosition = Literal["front", "as_written"]


class ImageConfig(StrictModel):
    """How pictures are read and placed. It is part of a store's fingerprint, and students follow it."""

    exif: ExifTurn = "ignore"
    """Whether a picture whose EXIF data say that the camera was turned is shown upright. LLaVA's trainer and the
    processors of transformers ignore it, and regions in annotations often refer to the stored pixels; `load_image` of
    transformers applies it, so that models that were tried with it saw upright pictures."""
    position: ImagePosition = "front"
    """Where the only picture of a conversation stands. `front` moves it before the text of its turn, as LLaVA's trainer
    does: conversations about one picture then share its attention maps. `as_written` leaves it where the text has
    `<image>`, which only models trained so understand."""


DEFAULT_IMAGES: Final = ImageConfig()
"""What holds where nothing else is said: a teacher or another checkpoint that is evaluated or asked by itself."""
