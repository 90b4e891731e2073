"""The suites by name."""

from typing import Final

from stages.evaluation.suites.aro import Aro
from stages.evaluation.suites.bivlc import BiVLC
from stages.evaluation.suites.gqa import Gqa
from stages.evaluation.suites.mme import Mme
from stages.evaluation.suites.mmvp import Mmvp
from stages.evaluation.suites.natural_bench import NaturalBench
from stages.evaluation.suites.pope import Pope
from stages.evaluation.suites.r_bench import RBenchBoxes, RBenchImage, RBenchMasks
from stages.evaluation.suites.reefknot import Reefknot
from stages.evaluation.suites.sade import Sade
from stages.evaluation.suites.sugarcrepe import SugarCrepe
from stages.evaluation.suites.sugarcrepe_pp import SugarCrepePlusPlus
from stages.evaluation.suites.suite import Protocol, Suite
from stages.evaluation.suites.text_vqa import TextVqa, TextVqaOcr
from stages.evaluation.suites.viz_wiz import VizWiz, VizWizTest
from stages.evaluation.suites.vqa_v2 import VqaV2, VqaV2TestDev
from stages.evaluation.suites.vsr import Vsr
from stages.evaluation.suites.whatsup import WhatsUp
from stages.evaluation.suites.winoground import Winoground
from storage.errors import UserError

_COMPOSITION: Final[tuple[Suite, ...]] = (
    *(SugarCrepe(), SugarCrepePlusPlus(), BiVLC(), Winoground()),
    *(Sade(), Aro(), WhatsUp(), Vsr()),
)
_HALLUCINATION: Final[tuple[Suite, ...]] = (Pope(), RBenchBoxes(), RBenchImage(), RBenchMasks(), Reefknot())
_QUESTIONS: Final[tuple[Suite, ...]] = (
    *(Gqa(), Mme(), Mmvp(), NaturalBench()),
    *(TextVqa(), TextVqaOcr(), VizWiz(), VizWizTest(), VqaV2(), VqaV2TestDev()),
)

SUITES: Final[dict[str, Suite]] = {suite.name: suite for suite in (*_COMPOSITION, *_HALLUCINATION, *_QUESTIONS)}


def find_suite(name: str, protocol: Protocol | None) -> tuple[Suite, Protocol]:
    """The suite of a name, and how it is asked: its makers' way unless another is named.

    Raises:
        UserError: If there is no such suite, or it cannot be asked so.
    """
    if name not in SUITES:
        raise UserError(f"no suite {name!r}; there are {', '.join(SUITES)}")
    suite = SUITES[name]
    if protocol is not None and protocol not in suite.protocols:
        raise UserError(f"suite {name} cannot be asked by {protocol}; it takes {', '.join(suite.protocols)}")
    return suite, protocol or suite.protocols[0]
