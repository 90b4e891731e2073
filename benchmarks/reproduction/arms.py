"""Arms of the comparison: what each student learns from, beside the same answers."""

from dataclasses import dataclass, replace

from stages.student.stage_config import AttentionLoss
from storage.codecs.codec_settings import EntryCodecName


@dataclass(frozen=True)
class Arm:
    """What a student learns from. `attention` is the teacher's; `oracle` has maps by construction in its place."""

    logits: bool = False
    attention: bool = False
    oracle: bool = False
    fetched_projector: bool = False
    """The teacher's projector, frozen, with a new linear layer behind it; else one of the student's own."""
    layers: tuple[int, ...] = (0,)
    """Layers of student and teacher that are matched one to one."""
    grouped: bool = False
    """Each of `layers` is drawn to the mean of all the teacher's layers."""
    weight: float = 1.0
    until: float | None = None
    """Share of the steps over which the weight falls to 0."""
    kind: AttentionLoss = "cosine"
    sink_mask: bool = False
    codec: EntryCodecName = "float16"


_GUIDED = Arm(logits=True, attention=True)
CLAIMED = {
    "SFT": Arm(),
    "logits, own projector": Arm(logits=True),
    "logits": Arm(logits=True, fetched_projector=True),
    "logits and attention": _GUIDED,
    "logits and attention, published mask": replace(_GUIDED, sink_mask=True),
    "all": replace(_GUIDED, fetched_projector=True),
    "all, published mask": replace(_GUIDED, fetched_projector=True, sink_mask=True),
    "oracle": Arm(oracle=True),
}
"""Run on the test pictures with the seeds of the claim."""
REFERENCES = ("SFT", "logits, own projector", "logits")
"""Arms to which all others are compared."""

EXPLORED = {
    "attention alone": replace(_GUIDED, logits=False),
    "kl": replace(_GUIDED, kind="kl"),
    "mse, weight 1e3": replace(_GUIDED, kind="mse", weight=1e3),
    "mse, weight 1e5": replace(_GUIDED, kind="mse", weight=1e5),
    "late": replace(_GUIDED, layers=(1,)),
    "both layers": replace(_GUIDED, layers=(0, 1)),
    "group, early": replace(_GUIDED, grouped=True),
    "weight 0.1": replace(_GUIDED, weight=0.1),
    "weight 0.3": replace(_GUIDED, weight=0.3),
    "falling to 0 at half": replace(_GUIDED, until=0.5),
    "8 bits": replace(_GUIDED, codec="sqrt8"),
    "4 bits": replace(_GUIDED, codec="sqrt4"),
    "2 bits": replace(_GUIDED, codec="sqrt2"),
}
"""Variants of `logits and attention`, on the validation pictures; nothing is claimed of them."""
