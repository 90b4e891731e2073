"""Whether something can be written at a path, tried before the work whose result is to lie there."""

import tempfile
from pathlib import Path

from storage.errors import UserError
from storage.regular_files import home_expanded, refuse_unusable


def check_writable(folder: Path) -> None:
    """Tries to make something in a folder, or where it is to be made; leaves nothing behind.

    Raises:
        UserError: If nothing can be made there; says why.
    """
    refuse_unusable(folder)
    folder = home_expanded(folder).absolute()
    above = folder
    while not above.exists():
        above = above.parent
    if not above.is_dir():
        how = "is a file" if above == folder else f"leads through {above}, which is a file"
        raise UserError(f"{folder} {how}; name a folder")
    try:
        if above == folder:
            # A file without a name, where the system has those: nobody who lists the folder sees it.
            tempfile.TemporaryFile(dir=above).close()
        else:
            Path(tempfile.mkdtemp(dir=above)).rmdir()
    except OSError as error:
        found = f"nothing can be written in {above} ({error.strerror})"
        raise UserError(f"{found}, which {folder} needs; mend that or name another place") from error
