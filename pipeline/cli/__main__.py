"""`python -m pipeline.cli`, for a checkout; elsewhere type `cdp`, since `-m` imports from the current folder first."""

import sys
from pathlib import Path

here = Path.cwd()
if not sys.flags.safe_path and Path(__file__).parents[2] != here:
    sys.path[:] = [folder for folder in sys.path if folder not in ("", str(here))]

from pipeline.cli.app import main  # noqa: E402, only now nothing of the current folder is imported

main()
