"""Commands that write a folder on a disk that is full: one error that names it, nothing that looks whole, and a repeat
with room gives what a disk with room would have got."""

import os
from pathlib import Path

import pytest

from tests.checkpoints import make_llava_data, make_tiny_llava
from tests.pipeline.processes import run_here, tree

GOLDEN = Path(__file__).parents[2] / "golden" / "released_layout_teacher"
LASTING = {"pack-samples": ("samples-", "index.json"), "convert-checkpoint": ("model", "config"), "export": ("model",)}


@pytest.mark.parametrize("command", LASTING)
@pytest.mark.parametrize("room", [4_096, 40_960])
def test_a_full_disk_is_named_and_the_same_command_with_room_finishes(
    command: str,
    room: int,
    tmp_path: Path,
    small_disk: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    sources = {
        "pack-samples": lambda: make_llava_data(tmp_path / "data", 40),
        "convert-checkpoint": lambda: (GOLDEN,),
        "export": lambda: (make_tiny_llava(tmp_path / "llava"),),
    }[command]()

    def run(out: Path) -> tuple[int, str]:
        ended = run_here(command, *sources, out, monkeypatch=monkeypatch, capsys=capsys)
        return ended.code, ended.err

    free = os.statvfs(small_disk)
    (small_disk / "filler").write_bytes(bytes(free.f_bavail * free.f_frsize - room))
    code, said = run(small_disk / "out")
    assert code == 2, said
    assert f"error: {small_disk / 'out'}" in said
    assert "No space left on device; free some space there, then run the same command again" in said
    assert not [path.name for path in small_disk.rglob("*") if path.name in ("index.json", "config.json")]
    (small_disk / "filler").unlink()
    assert run(small_disk / "out")[0] == 0
    assert run(tmp_path / "whole")[0] == 0
    assert tree(small_disk / "out", *LASTING[command]) == tree(tmp_path / "whole", *LASTING[command])
