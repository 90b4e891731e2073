"""What differs between model families: one small file each, found by the config's `model_type`."""

from stages.families import gemma3, idefics3, internvl, llava, llava_next, llava_onevision, qwen_vl
from stages.families.family import Family
from storage.errors import UserError

FAMILIES: dict[str, Family] = {
    model_type: family
    for family in (
        llava.FAMILY,
        llava_next.FAMILY,
        llava_onevision.FAMILY,
        qwen_vl.FAMILY,
        qwen_vl.QWEN3,
        idefics3.FAMILY,
        internvl.FAMILY,
        gemma3.FAMILY,
    )
    for model_type in family.model_types
}


def family_of(model_type: str) -> Family:
    """The family a checkpoint belongs to.

    Raises:
        UserError: If no family has this `model_type`.
    """
    if model_type not in FAMILIES:
        raise UserError(
            f"model type {model_type!r} is not a known teacher family; known: {', '.join(sorted(FAMILIES))}. "
            "Released CompoDistill and TinyLLaVA checkpoints go through `cdp convert-checkpoint` first; another family "
            "is one small file in stages/families/ (docs/families.md)"
        )
    return FAMILIES[model_type]
