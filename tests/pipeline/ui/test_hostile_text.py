"""Text of others steers no terminal, wherever it is shown: tables, notes, errors, logs, bars, HTML."""

import io
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.cli.estimate import _print_facts, _print_settings
from pipeline.cluster.ray_backend import _Actor
from pipeline.demo.assets import TEACHER
from pipeline.extraction.config import ExtractConfig
from pipeline.extraction.estimation import make_estimate
from pipeline.run_file import load_run_file
from pipeline.ui import console, progress
from pipeline.ui.console import PlainConsole
from pipeline.ui.streams import GuardedStream, guard_streams, say
from pipeline.ui.tables import ReportTable, print_facts, print_notes, print_table
from storage.safe_path import code_digest
from storage.stores import open_store
from storage.targets.commits import SkippedSample
from storage.targets.manifest import create_or_check
from storage.targets.shard_writer import write_shard
from tests.conftest import TinyWorld
from tests.pipeline.processes import Ended, run_here
from tests.storage.builders import manifest, pack, shard_content

STEERING = "\x1b]0;title\x07\x1b[2J\r\x9b1A\x00\u202e\u200b\u2028\x7f"
HOSTILE = f"[/x] [red]é:bomb:{STEERING}\nwhole: 9 of 9"
"""Markup, an emoji's name, commands to a terminal, and what looks like a line of its own."""


@pytest.fixture(autouse=True)
def _streams_as_before() -> Iterator[None]:
    before = sys.stdout, sys.stderr
    yield
    sys.stdout, sys.stderr = before


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    for made_before in (console.results, console.messages):
        monkeypatch.setattr(made_before, "_width", 400)


def assert_harmless(text: str) -> None:
    assert text.replace("\n", "").isprintable(), ascii(text)
    assert not any(line.startswith("whole") for line in text.splitlines())


def assert_shown(ended: Ended, code: int) -> None:
    assert ended.code == code, ended
    assert_harmless(ended.out)
    assert_harmless(ended.err)
    assert "[/x] [red]é:bomb:" in ended.out + ended.err
    assert r"\x1b[2J\r\x9b1A\x00\u202e\u200b\u2028\x7f" in ended.out + ended.err


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`samples/` and `targets/`, whose ledger and manifest are of an enemy; all digests are right."""
    root = tmp_path_factory.mktemp("hostile")
    samples, store = pack(root / "samples", (3,)), open_store(root / "targets")
    made_for = manifest(samples=samples.index.digest, dtype=HOSTILE, processor={HOSTILE: HOSTILE})
    create_or_check(store, made_for)
    kept, maps = shard_content(made_for, ["s0-0", "s0-1"])
    skipped = [SkippedSample("s0-2", HOSTILE, HOSTILE, HOSTILE)]
    write_shard(store, 0, made_for, "samples-000000.tar", kept, maps, skipped)
    return root


def test_inspect_shows_a_hostile_ledger_as_text(
    hostile: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_shown(run_here("inspect", hostile / "targets", monkeypatch=monkeypatch, capsys=capsys), 0)


def test_verify_shows_hostile_file_names_and_keys_as_text_and_so_does_its_repair(
    hostile: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stray = hostile / "targets" / "shards" / HOSTILE.replace("/", "").replace("\0", "")
    stray.write_bytes(b"x")
    (hostile / "targets" / "shards" / os.fsdecode(b"\xff\x9b")).write_bytes(b"x")
    for words in ((), ("--repair",)):
        ended = run_here("verify", hostile / "targets", *words, monkeypatch=monkeypatch, capsys=capsys)
        assert ended.code == 1
        assert_harmless(ended.out)
        assert_harmless(ended.err)
        assert r"[x] [red]é:bomb:\x1b]0;title\x07\x1b[2J" in ended.out
        assert r"\udcff\udc9b" in ended.out
    (findings,) = hostile.glob("targets/quarantine/*/findings.json")
    assert_harmless(findings.read_text())


def test_estimate_shows_hostile_samples_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    run = load_run_file(None, ["estimate.samples=1000"], {"teacher.checkpoint": str(TEACHER)})
    assert run.teacher is not None
    made = make_estimate(run.teacher, None, ExtractConfig(), run.estimate, config_only=True)
    changed = {"unusable": {HOSTILE: 2}, "unusable_examples": (HOSTILE,), "notes": (HOSTILE,), "teacher": HOSTILE}
    guard_streams()
    estimate = made.model_copy(update=changed)
    _print_facts(estimate)
    _print_settings(estimate)
    out, err = capsys.readouterr()
    assert_shown(Ended(0, out, err), 0)


def test_evaluate_shows_hostile_kinds_as_text_and_saves_them(
    tiny: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    suite, output = tmp_path / "suite", tmp_path / "output"
    suite.mkdir()
    pairs = (tiny.pairs / "swap_obj.json").read_bytes()
    for name in (HOSTILE.replace("/", "|").replace("\0", ""), os.fsdecode(b"\xff")):
        (suite / f"{name}.json").write_bytes(pairs)
    places = ("--data", suite, "--images", tiny.pairs / "images", "--output", output, "--limit", 1)
    words = ("evaluate", tiny.teacher, "--suite", "sugarcrepe", *places)
    ended = run_here(*words, monkeypatch=monkeypatch, capsys=capsys)
    assert ended.code == 0, ended.err
    assert_harmless(ended.out)
    assert_harmless(ended.err)
    assert r"[|x] [red]é:bomb:\x1b]0;title\x07\x1b[2J\r\x9b1A\u202e" in ended.out
    result, items = ((output / "sugarcrepe" / name).read_text() for name in ("result.json", "items.jsonl"))
    assert_harmless(result)
    assert_harmless(items)
    assert len(json.loads(result)["num_items"]) == 2


def test_an_error_names_a_hostile_place_in_lines_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    where = tmp_path / HOSTILE.replace("\0", "")
    ended = run_here("inspect", where, monkeypatch=monkeypatch, capsys=capsys)
    assert ended.code == 2
    assert_harmless(ended.err)
    assert r"[red]é:bomb:\x1b]0;title\x07\x1b[2J" in ended.err
    ended = run_here("inspect", tmp_path, HOSTILE, monkeypatch=monkeypatch, capsys=capsys)
    assert ended.code == 2
    assert ended.err.replace("\n", "").isprintable()


def test_an_error_shows_a_hostile_model_type_as_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": HOSTILE}))
    words = ("estimate", "--teacher", tmp_path, "--config-only", "--set", "estimate.samples=9")
    ended = run_here(*words, monkeypatch=monkeypatch, capsys=capsys)
    assert ended.code == 2
    assert_harmless(ended.err)
    assert r"[red]é:bomb:\x1b]0;title\x07\x1b[2J" in ended.err


def test_tables_facts_and_notes_show_every_cell_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(ReportTable(HOSTILE, ["name", HOSTILE], [[HOSTILE, HOSTILE]]))
    print_facts(HOSTILE, [(HOSTILE, HOSTILE)])
    print_notes([HOSTILE])
    out = capsys.readouterr().out
    assert_harmless(out)
    assert out.count(r"[/x] [red]é:bomb:\x1b]0;title\x07\x1b[2J\r") == 8


@pytest.mark.parametrize("terminal", [True, False])
def test_bars_and_lines_of_a_log_show_names_notes_and_what_others_print_meanwhile_as_text(
    terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = io.StringIO()
    monkeypatch.setattr(sys, "stderr", raw)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv(progress.LOG_EVERY_VARIABLE, "0")
    guard_streams()
    monkeypatch.setattr(progress, "messages", PlainConsole(stderr=True, force_terminal=terminal, width=400))
    with progress.progress_display() as shown:
        task = shown.task(HOSTILE, 4)
        task.update(done=1, note=HOSTILE)
        shown.message(HOSTILE)
        print(HOSTILE, file=sys.stderr)
        task.update(done=4)
    text = raw.getvalue()
    assert ("\x1b[" in text) == terminal
    # Colours and moves of our own bars, and nothing else.
    ours = re.sub(r"\x1b\[[0-9;]*[mKA]|\x1b\[\?25[lh]|\r", "", text) if terminal else text
    assert ours.replace("\n", "").isprintable(), ascii(ours)
    assert r"\x9b1A\x00\u202e\u200b\u2028\x7f" in ours


def test_logs_and_prints_of_libraries_are_printable_on_both_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, raw)
    guard_streams()
    guard_streams()
    assert isinstance(sys.stdout, GuardedStream)
    assert sys.stdout.unguarded is raw
    logging.Handler.handle(logging.lastResort, logging.makeLogRecord({"msg": HOSTILE, "levelno": logging.ERROR}))
    print(HOSTILE)
    sys.stderr.writelines([HOSTILE, "\n"])
    say(HOSTILE)
    raw.flush()
    text = raw.buffer.getvalue().decode("ascii")  # type: ignore[attr-defined]
    assert text.replace("\n", "").isprintable()
    assert text.count(r"[/x] [red]\xe9:bomb:\x1b]0;title") == 4
    assert "\n  whole" in text


def test_a_librarys_bar_may_go_back_to_the_start_of_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = GuardedStream(io.StringIO())
    for text in ("\r 50%", "\x1b[A\x1b[A", "a\rb", "\x1b[Ab"):
        stream.write(text)
    assert stream.getvalue() == "\r 50%\x1b[A\x1b[Aa\\rb\\x1b[Ab"


def test_a_worker_of_a_cluster_writes_its_log_like_a_command(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.StringIO())
    monkeypatch.setattr("pipeline.cluster.ray_backend.end_when_stuck", lambda: None)
    _Actor(lambda: None, None, code_digest()).start()
    assert isinstance(sys.stderr, GuardedStream)


@pytest.mark.parametrize(
    "settings",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "latin-1:strict"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    ],
)
def test_a_terminal_without_utf8_gets_its_table(settings: dict[str, str], hostile: Path) -> None:
    command = [sys.executable, "-m", "pipeline.cli", "inspect", str(hostile / "targets")]
    done = subprocess.run(command, capture_output=True, env={**os.environ, **settings}, check=False)
    out, err = done.stdout.decode("latin-1"), done.stderr.decode("latin-1")
    assert done.returncode == 0, err
    assert err == ""
    assert out.replace("\n", "").isprintable()
    # Every line of a table has its frame at the same column.
    lines = [line for line in out.splitlines() if line.startswith("|")]
    assert len(lines) > 20
    assert len({len(line) for line in lines}) == 2


def test_no_text_is_read_as_markup_and_all_consoles_are_plain() -> None:
    sources = [path for part in ("pipeline", "stages", "storage") for path in Path(part).rglob("*.py")]
    assert len(sources) > 100
    others = [
        path for path in sources if re.search(r"rich\.markup|from_markup|\bConsole\(\w*=", path.read_text("utf-8"))
    ]
    assert others == []
