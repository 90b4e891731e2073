"""`cdp`, but the second process has a run folder of its own, as on a machine that does not see the first one's disk.

    python -m tests.pipeline.two_folders OTHER train-student ...

For torchrun. OTHER is that folder.
"""

import os
import sys
from unittest.mock import patch

from pipeline.cli import app
from stages.student.training import rank_consistency

if __name__ == "__main__":
    other = sys.argv.pop(1)
    if os.environ["RANK"] == "1":
        sys.argv[sys.argv.index("--output") + 1] = other
    # No network file system is behind these folders that could be late.
    with patch.object(rank_consistency, "LOOKS", 2), patch.object(rank_consistency, "PAUSE_S", 0.1):
        app.main()
