"""Whether a target store serves a stage of training, known from its manifest and the student's depth."""

from collections.abc import Iterable, Mapping

from stages.student.layer_matching import MatchingConfig, match_layers
from stages.student.stage_config import StageConfig, StageName
from storage.errors import FingerprintMismatch, UserError
from storage.targets.manifest import Fingerprint, Manifest, check_answer_attention


def check_served(
    name: StageName, stage: StageConfig, matching: MatchingConfig, url: str, manifest: Manifest, num_layers: int | None
) -> None:
    """Refuses a stage whose losses the store at `url` does not hold what they need for.

    Args:
        name: Of the stage.
        stage: Its settings.
        matching: Which layers are matched.
        url: Where the store lies.
        manifest: Of the store.
        num_layers: Decoder layers of the student; None where they are not known yet: then no layers are matched.

    Raises:
        UserError: If it lacks the temperature of the logit loss, or layers that an attention loss matches.
    """
    check_temperature(name, stage, url, manifest.fingerprint)
    if stage.matches_layers and num_layers is not None:
        match_layers(num_layers, manifest, matching)


def check_answers(name: StageName, stage: StageConfig, stores: Iterable[tuple[str, Fingerprint]]) -> None:
    """Refuses stores without answer attention, each an address and its fingerprint, for a stage that learns from it.

    Raises:
        UserError: If one holds none.
    """
    if stage.answer_attention_weight > 0:
        for url, fingerprint in stores:
            check_answer_attention(f"{name} has an answer_attention_weight, but {url}", fingerprint)


def check_temperature(name: StageName, stage: StageConfig, url: str, fingerprint: Fingerprint) -> None:
    """Refuses a temperature of the logit loss that the targets do not serve.

    Raises:
        UserError: If they do not; names those that they do.
    """
    codec, wanted = fingerprint.logit_codec, stage.kd_temperature
    if stage.kd_weight > 0 and not codec.serves(wanted):
        raise UserError(
            f"kd_temperature of {name} is {wanted}, but {url} holds what a student needs at "
            f"{[1.0, *codec.temperatures]} only; choose one of them, or extract again with it in teacher.temperatures"
        )


def check_one_teacher(teachers: Mapping[StageName, str]) -> None:
    """Refuses stages with targets of several teachers, by the digests of their weights.

    Raises:
        FingerprintMismatch: If they are several: a student keeps the vision tower of one.
    """
    if len(set(teachers.values())) > 1:
        raise FingerprintMismatch(
            "the stages have targets of different teachers (sha256 of weights: "
            + ", ".join(f"{name} {digest[:12]}" for name, digest in teachers.items())
            + "), but a student has the vision tower of one; extract the targets of all stages with the same teacher"
        )
