"""`cdp inspect --sample` and `cdp estimate --show`: one conversation as people read it."""

import io
import json
import re
from pathlib import Path

import pytest

from pipeline.ui import sample_view
from pipeline.ui.console import PlainConsole
from pipeline.ui.sample_view import SHOWN_ROWS, print_maps, print_predictions, print_tokens
from stages.conversations.token_runs import TokenRun
from stages.inspection.stored_sample import view_sample
from stages.samples.pack import PackConfig, pack_samples
from storage.targets.store import TargetStore
from tests.conftest import NUM_SAMPLES, TinyWorld
from tests.pipeline.processes import run_here

HOSTILE = "\x1b[2J\u202ehidden\n[bold]"


def test_inspect_shows_a_sample_with_its_answers_marked_in_plain_text(
    targets: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store = TargetStore.open(targets)
    key = store.shard(0).keys[1]
    view = view_sample(store, key)
    ended = run_here("inspect", targets, "--sample", key, monkeypatch=monkeypatch, capsys=capsys)
    assert ended.code == 0, ended.err
    assert "\x1b" not in ended.out
    assert f"sample {key} of" in ended.out
    answers = [run for run in view.runs if run.part == "answer"]
    lines = [line.split() for line in ended.out.splitlines()]
    assert [line[0] for line in lines if line[1:2] == ["ANSWER"]] == [str(run.start) for run in answers]
    assert re.search(r"image +16 x <image>", ended.out)
    assert ended.out.count("<image>") == 1
    for window in view.windows:
        assert f"layer {window.layers[0]}" in ended.out
    for each in view.predictions:
        assert re.search(rf"{each.position} .*{re.escape(each.text.strip())}.*", ended.out)


def test_inspect_says_which_samples_it_has_and_why_one_has_no_targets(
    targets: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("nothing", str(NUM_SAMPLES), "00"):
        ended = run_here("inspect", targets, "--sample", name, monkeypatch=monkeypatch, capsys=capsys)
        assert ended.code == 2
        assert f"has no sample '{name}' among its {NUM_SAMPLES}" in ended.err


def test_estimate_shows_samples_before_extraction_and_says_what_is_cut(
    tiny: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    records = json.loads(tiny.data.read_text())[:4]
    long_answer = {"from": "gpt", "value": f"A red square. {HOSTILE}" * 9}
    records[0]["conversations"] += [{"from": "human", "value": "And?"}, long_answer]
    records[1]["conversations"][1] = long_answer
    greeting = [{"from": "human", "value": "Hello?"}, {"from": "gpt", "value": "Yes."}]
    records[3] |= {
        "image": records[0]["image"],
        "conversations": [*greeting, *records[0]["conversations"][:1], long_answer],
    }
    data = tmp_path / "data.json"
    data.write_text(json.dumps(records))
    pack_samples(data, tiny.images, tmp_path / "samples", PackConfig())
    words = ["estimate", "--teacher", tiny.teacher, "--samples", tmp_path / "samples", "--config-only"]
    words += ["--show", 4, "--set", "teacher.max_length=100"]
    ended = run_here(*words, monkeypatch=monkeypatch, capsys=capsys)
    assert ended.code == 0, ended.err
    assert not re.search("[\x1b\u202e]", ended.out)
    cuts = re.findall(r"([\d,]+) tokens after these, ([\d,]+) of them of answers(, and 1 of its images)?", ended.out)
    assert [bool(images) for *_, images in cuts] == [False, True]
    assert all(0 < int(answers) < int(tokens) for tokens, answers, _ in cuts)
    assert "too_long: no answer behind the last image" in ended.out
    assert re.search(rf"2 \(50.0%\), which lost {sum(int(cut[1]) for cut in cuts)} answer", ended.out)
    assert ended.out.index("ANSWER") < ended.out.index("a whole extraction")


def test_hostile_tokens_stay_text_and_answers_are_coloured_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [TokenRun("text", 0, (HOSTILE, " a")), TokenRun("answer", 2, (" b", HOSTILE))]
    shown = {}
    for terminal in (True, False):
        file = io.StringIO()
        console = PlainConsole(
            file=file, force_terminal=terminal, color_system="standard" if terminal else None, width=200
        )
        monkeypatch.setattr(sample_view, "results", console)
        print_tokens(runs)
        shown[terminal] = file.getvalue()
    assert r"2 ANSWER | b|\x1b[2J\u202ehidden\n[bold]|" in shown[False]
    for text in shown.values():
        assert "\u202e" not in text
        assert "\x1b[2J" not in text
    text_line, answer_line = shown[True].splitlines()
    assert "\x1b[1;32m" in answer_line
    assert "\x1b" not in text_line


def test_a_terminal_without_block_characters_gets_pictures_in_ascii_and_long_answers_are_shortened(
    targets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    view = view_sample(TargetStore.open(targets), "1")
    written = io.BytesIO()
    file = io.TextIOWrapper(written, encoding="ascii", errors="backslashreplace")
    monkeypatch.setattr(sample_view, "results", PlainConsole(file=file, width=100))
    print_maps(view.windows)
    print_predictions(view.predictions * SHOWN_ROWS)
    file.flush()
    shown = written.getvalue().decode()
    assert "\\u2" not in shown
    assert re.search(r"\[[ .:*#]*#[ .:*#]*\]", shown)
    assert f"and {(len(view.predictions) - 1) * SHOWN_ROWS:,} more" in shown
