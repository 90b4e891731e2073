"""Commands, flags and settings in the pages are those that the command line and the run file know."""

import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from pydantic import BaseModel
from typer.main import get_command

from pipeline.cli.app import app
from pipeline.run_file import RunFile, resolve
from pipeline.sweep_file import load_sweep
from tests.docs.markdown import PAGES, ROOT, Page

COMMANDS: dict[str, Any] = get_command(app).commands  # type: ignore[attr-defined]
FLAGS = {
    name: {"--help", *(flag for p in command.params for flag in (*p.opts, *p.secondary_opts))}
    for name, command in COMMANDS.items()
}
GLOBAL = {"--help", "--version", "--install-completion", "--show-completion"}
FOREIGN = re.compile(r"^(python|pip|ray|torchrun|accelerate|docker|git|make|pytest)\b|--use_fsdp|cdp --")
SECTIONS = ("train", "teacher", "extract", "estimate", "evaluate")
_COMMAND = re.compile(r"(?:\bcdp|-m pipeline\.cli)\s+([a-z][a-z-]*)([^\n#`]*)")
_FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")
_SETTING = re.compile(rf"(?<![\w/.])(?:{'|'.join(SECTIONS)})\.[a-zA-Z_][\w.]*")
_FILE = re.compile(r"\.(json|jsonl|py|yaml|md)$")

pages = pytest.mark.parametrize("page", PAGES.values(), ids=PAGES)


def commands(page: Page) -> Iterator[tuple[str, str]]:
    """Each `cdp COMMAND` of a page with the text behind it, lines that go on joined."""
    for code in [*page.blocks("bash", "console", ""), *page.spans]:
        yield from _COMMAND.findall(re.sub(r"\\\n\s*", " ", code))


@pages
def test_every_command_and_its_flags_exist(page: Page) -> None:
    for name, text in commands(page):
        assert name in FLAGS, f"cdp {name}"
        assert set(_FLAG.findall(text)) <= FLAGS[name], f"cdp {name}{text}"


@pages
def test_every_flag_that_stands_alone_is_one_of_some_command(page: Page) -> None:
    known = GLOBAL.union(*FLAGS.values())
    alone = [span for span in page.spans if span.startswith("-") and not FOREIGN.search(span)]
    assert [span for span in alone if not set(_FLAG.findall(span)) <= known] == []


@pages
def test_every_setting_that_is_named_exists(page: Page) -> None:
    code = [*page.spans, *page.blocks("bash", "")]
    names = {name.rstrip(".") for text in code for name in _SETTING.findall(text) if not _FILE.search(name)}
    assert [name for name in sorted(names) if not exists(RunFile, name.replace(".STAGE", ".dft").split("."))] == []


def exists(kind: Any, path: list[str]) -> bool:
    """Whether a settings class, or one of a union, has a field at a path."""
    if not path:
        return True
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        field = kind.model_fields.get(path[0])
        return field is not None and exists(field.annotation, path[1:])
    return any(exists(part, path) for part in get_args(kind))


@pages
def test_every_yaml_block_is_a_run_file_or_a_sweep(page: Page, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("sugar-crepe", "val2017"):
        (tmp_path / folder).mkdir()
    pair = {"filename": "0.jpg", "caption": "a", "negative_caption": "b"}
    (tmp_path / "sugar-crepe" / "swap_obj.json").write_text(json.dumps({"0": pair}))
    (tmp_path / "val2017" / "0.jpg").touch()
    for block in page.blocks("yaml"):
        if "students:" in block:
            (tmp_path / "sweep.yaml").write_text(block)
            flags = {"samples": "samples", "targets": "targets", "output": str(tmp_path / "out")}
            assert load_sweep(tmp_path / "sweep.yaml", None, [], flags).runs
        else:
            resolve(yaml.safe_load(block), [], {}, page.path)


@pages
def test_every_extra_that_is_named_exists(page: Page) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    text = "\n".join(page.lines)
    named = [*re.findall(r"extra\s+`([\w-]+)`", text), *re.findall(r"compodistill\[([\w-]+)\]", text)]
    assert [name for name in named if name not in extras] == []


def test_the_page_of_commands_has_every_command() -> None:
    assert {name for name, _ in commands(PAGES["docs/commands.md"])} == set(FLAGS)
