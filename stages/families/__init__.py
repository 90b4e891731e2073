"""What differs between model families: one small file each, found by the config's `model_type`."""

from stages.families import llava
from stages.families.family import Family
from storage.errors import UserError

_FAMILIES: dict[str, Family] = {"llava": llava.FAMILY}


def family_of(model_type: str) -> Family:
    """The family a checkpoint belongs to.

    Raises:
        UserError: a `model_type` nobody described yet.
    """
    if model_type not in _FAMILIES:
        raise UserError(
            f"model type {model_type!r} is not a known teacher family; known: {', '.join(sorted(_FAMILIES))}. "
            "Describe it in stages/families/"
        )
    return _FAMILIES[model_type]
