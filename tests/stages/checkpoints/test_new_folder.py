"""A folder that appears whole or not at all, beside folders of the user and of other processes."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from stages.checkpoints.new_folder import new_folder

KILLED = """
import sys
from storage.stores import open_store
open_store(sys.argv[1]).staging("out")
"""


def test_a_new_folder_is_cleared_of_what_dead_processes_left_and_of_nothing_else(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", KILLED, tmp_path], check=True)
    (left,) = tmp_path.iterdir()
    users = [tmp_path / "out.partial", tmp_path / "out.old.partial"]
    for folder in users:
        folder.mkdir()
        os.utime(folder, (0, 0))
    with new_folder(tmp_path / "out") as first:
        assert not left.exists()
        with new_folder(tmp_path / "out") as second:
            (second / "file").write_text("second")
        (first / "file").write_text("first")
        assert (tmp_path / "out/file").read_text() == "second"
        shutil.rmtree(tmp_path / "out")
    assert (tmp_path / "out/file").read_text() == "first"
    assert sorted(tmp_path.iterdir()) == sorted([tmp_path / "out", *users])
