"""The suites by name."""

from typing import Final

from stages.evaluation.suites.pope import Pope
from stages.evaluation.suites.sugarcrepe import SugarCrepe
from stages.evaluation.suites.suite import Protocol, Suite
from storage.errors import UserError

SUITES: Final[dict[str, Suite]] = {suite.name: suite for suite in (SugarCrepe(), Pope())}


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
