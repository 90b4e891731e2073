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
    answer_weight: float = 0.0
    """Of the loss on what the answers' rows look at, in the same layers and of the same kind."""


_BOTH = (0, 1)
_POOLED = Arm(logits=True, attention=True, layers=_BOTH)
_ROWS = replace(_POOLED, kind="row_kl", weight=10.0)
CLAIMED = {
    "SFT": Arm(),
    "logits, own projector": Arm(logits=True),
    "logits": Arm(logits=True, fetched_projector=True),
    "logits and attention": _POOLED,
    "all": replace(_POOLED, fetched_projector=True),
    "all, published mask": replace(_POOLED, fetched_projector=True, sink_mask=True),
    "rows": _ROWS,
    "all, rows": replace(_ROWS, fetched_projector=True),
    "answers": Arm(logits=True, layers=_BOTH, answer_weight=1.0),
}
"""Run on the test pictures with the seeds of the claim; PROTOCOL.md says which differences are claimed."""
CEILING = {"oracle": Arm(oracle=True)}
REFERENCES = ("SFT", "logits, own projector", "logits", "logits and attention", "all")
"""Arms to which all others are compared."""

EXPLORED = {
    "logits, own projector": CLAIMED["logits, own projector"],
    "logits and attention": _POOLED,
    "attention alone": replace(_POOLED, logits=False),
    "published mask": replace(_POOLED, sink_mask=True),
    "kl": replace(_POOLED, kind="kl"),
    "mse, weight 1e4": replace(_POOLED, kind="mse", weight=1e4),
    "early": replace(_POOLED, layers=(0,)),
    "late": replace(_POOLED, layers=(1,)),
    "group": replace(_POOLED, grouped=True),
    "weight 0.1": replace(_POOLED, weight=0.1),
    "weight 0.3": replace(_POOLED, weight=0.3),
    "weight 3": replace(_POOLED, weight=3.0),
    "falling to 0 at half": replace(_POOLED, until=0.5),
    "8 bits": replace(_POOLED, codec="sqrt8"),
    "4 bits": replace(_POOLED, codec="sqrt4"),
    "2 bits": replace(_POOLED, codec="sqrt2"),
    "rows": _ROWS,
    "rows, weight 1": replace(_ROWS, weight=1.0),
    "rows, weight 3": replace(_ROWS, weight=3.0),
    "rows, early": replace(_ROWS, layers=(0,)),
    "rows, late": replace(_ROWS, layers=(1,)),
    "rows, published mask": replace(_ROWS, sink_mask=True),
    "rows, falling to 0 at half": replace(_ROWS, until=0.5),
    "rows, 8 bits": replace(_ROWS, codec="sqrt8"),
    "rows, 4 bits": replace(_ROWS, codec="sqrt4"),
    "answers": CLAIMED["answers"],
    "answers, kl": replace(CLAIMED["answers"], kind="kl"),
    "answers, weight 10": replace(CLAIMED["answers"], answer_weight=10.0),
    "rows and answers": replace(_ROWS, answer_weight=1.0),
}
"""One setting changed at a time, on the validation pictures; nothing is claimed of them."""
