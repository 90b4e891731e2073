"""What a teacher's settings ask of the image tokens of a sample."""

from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch import Tensor

from stages.conversations.encoder import EncodedConversation
from stages.families.batch import pixels_and_count
from stages.families.family import Family
from stages.families.token_grids import token_cells, token_grids
from stages.unusable_sample import UnusableSample


@dataclass(frozen=True)
class ImageRules:
    """How many there may be, and which of them are a cell of the maps.

    Attributes:
        family: The teacher's.
        processor: The teacher's.
        image_token_id: The token that features replace.
        pooling: Tokens along a side of a cell.
        max_tokens: Image tokens of a sample at most; None for any number.
    """

    family: Family
    processor: Any
    image_token_id: int
    pooling: int = 1
    max_tokens: int | None = None

    def cells(self, encoded: EncodedConversation) -> Tensor | None:
        """`[X]` int32, the cell of each image token; None where each is its own, and without an image.

        Raises:
            UnusableSample: If there are too many image tokens.
            UserError: If it is not known how they lie.
        """
        found = len(encoded.image_positions)
        if self.max_tokens is not None and found > self.max_tokens:
            few = f"{found} image tokens, at most {self.max_tokens} are taken (teacher.max_image_tokens)"
            raise UnusableSample("too_many_image_tokens", few)
        if self.pooling == 1 or not found:
            return None
        grids = token_grids(self.family, self.processor, encoded.pixel_inputs, found, encoded.num_images)
        return token_cells(grids, self.pooling)

    def check(self) -> None:
        """Refuses cells where it is not known how image tokens lie, as a grey picture shows before any sample.

        Raises:
            UserError: If it is not.
        """
        if self.pooling > 1:
            picture = Image.new("RGB", (64, 48), "grey")
            pixels, count = pixels_and_count(self.family, self.processor, [picture], self.image_token_id)
            token_grids(self.family, self.processor, pixels, count, 1)
