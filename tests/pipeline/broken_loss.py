"""`cdp`, but with a loss that is not a number in the process that has a certain sample; for torchrun.

    python -m tests.pipeline.broken_loss KEY HOW train-student ...

HOW is `loss` for one with finite gradients, which no other process sees, `both`: what a broken forward pass gives, or
`error`: an exception in its place.
"""

import math
import sys
from typing import Any
from unittest.mock import patch

from pipeline.cli import app
from stages.student.data.batch import Batch
from stages.student.training.objective import DistillationObjective

if __name__ == "__main__":
    key, how = sys.argv.pop(1), sys.argv.pop(1)
    forward = DistillationObjective.forward

    def broken(self: DistillationObjective, batch: Batch, totals: Any) -> Any:
        loss, terms = forward(self, batch, totals)
        if key in batch.keys:
            if how == "error":
                raise RuntimeError("no kernel image is available")
            loss = loss + math.nan if how == "loss" else loss * math.nan
        return loss, terms

    with patch.object(DistillationObjective, "forward", broken):
        app.main()
