import json
from pathlib import Path

import pytest

from tests.pipeline.processes import run_here
from tests.stages.samples.llava_data import image_bytes, turns


def test_what_was_not_read_as_it_stood_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = turns("What is <image>?", "A word.")
    records = [
        {"id": "a", "conversations": chat, "source": "web", "a\x1b[31m": 1},
        {"id": "a", "conversations": chat, "source": "web"},
        {"conversations": [*turns("q", "Hello")[1:], *chat]},
    ]
    (tmp_path / "data.json").write_text(json.dumps(records))
    done = run_here(
        "pack-samples", tmp_path / "data.json", "-", tmp_path / "out", monkeypatch=monkeypatch, capsys=capsys
    )
    assert done.code == 0, done.err
    shown = " ".join(done.out.replace("│", " ").split())
    assert "3 (3 without an image)" in shown
    assert "keys not read source: 2, a\\x1b[31m: 1" in shown
    for line in ("repeated records 2", "repeated ids 1", "first answers left out 1", "<image> read as text 3"):
        assert line in shown


def test_an_unknown_layout_ends_the_command_with_the_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.png").write_bytes(image_bytes())
    (tmp_path / "data.json").write_text(json.dumps([{"image": "a.png", "question": "q", "answer": "a"}]))
    done = run_here(
        "pack-samples", tmp_path / "data.json", tmp_path, tmp_path / "out", monkeypatch=monkeypatch, capsys=capsys
    )
    assert done.code == 2
    shown = " ".join(done.err.split())
    assert "Keys found: image, question, answer." in shown
    assert "Keys that are read: id, image, images, system, conversations, messages, texts" in shown
    assert not (tmp_path / "out").exists()
