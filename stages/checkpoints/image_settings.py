"""How the pictures of a checkpoint's training were read and placed, which its config says."""

from pydantic import ValidationError
from transformers import PreTrainedConfig

from storage.errors import UserError
from storage.samples.image_settings import ImageConfig

_KEY = "image_settings"


def note_image_settings(config: PreTrainedConfig, images: ImageConfig) -> None:
    """Makes the config say it wherever it is saved; libraries other than this one do not read it."""
    setattr(config, _KEY, images.model_dump(mode="json"))


def image_settings(config: PreTrainedConfig) -> ImageConfig | None:
    """What the config says; None for a checkpoint that this project did not train.

    Raises:
        UserError: If it says something else than image settings.
    """
    if (found := getattr(config, _KEY, None)) is None:
        return None
    try:
        return ImageConfig.model_validate(found)
    except ValidationError as error:
        raise UserError(
            f"config.json of {config.name_or_path} has {_KEY} {found!r:.100}, expected exif and position as in the "
            "section images of a run file; mend or remove it"
        ) from error
