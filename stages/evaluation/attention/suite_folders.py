"""The folders of answers that `cdp evaluate` left, and what they are of."""

from pathlib import Path

from stages.evaluation.result import IDENTITY_FILE, SuiteRun
from stages.evaluation.suites.registry import find_suite
from storage.errors import UserError, first_line
from storage.regular_files import read_regular


def suite_folders(folder: Path) -> list[Path]:
    """The folders of suites' answers: the folder itself, or those in it.

    Raises:
        UserError: If there is none.
    """
    found = [path for path in (folder, *sorted(folder.glob("*"))) if (path / IDENTITY_FILE).is_file()]
    if not found:
        raise UserError(f"{folder} holds no answers of `cdp evaluate` ({IDENTITY_FILE}); name its --output")
    return found


def read_run(folder: Path) -> SuiteRun:
    """The run whose answers a suite's folder holds.

    Raises:
        UserError: If it is none of this version, or of grey pictures.
    """
    try:
        run = SuiteRun.model_validate_json(read_regular(folder / IDENTITY_FILE))
        find_suite(run.suite, run.protocol)
    except (ValueError, UserError) as error:
        found = f"{folder / IDENTITY_FILE} is no run of `cdp evaluate` ({first_line(error)})"
        raise UserError(f"{found}; evaluate again") from error
    if run.blind:
        raise UserError(f"{folder} holds answers to grey pictures; give those of `cdp evaluate` without --blind")
    return run
