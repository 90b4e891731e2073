"""What a stranger's JSON and YAML may hold: no reader ends in anything but an error that names the file."""

import ast
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.demo import run as demo
from pipeline.demo.report import DemoConfig
from pipeline.run_file import load_run_file
from pipeline.sweep_file import load_sweep
from stages.checkpoints.configs import check_configs, load_config
from stages.convert.released_config import read_released_config
from stages.evaluation.config import SuiteConfig
from stages.evaluation.loaded_suite import load_suite
from stages.export.model_card import read_history
from stages.student.run_folder import RunFolder, StageFolder
from stages.student.student_kind import is_student
from stages.student.training.metrics import metrics_log
from storage.digests import parse_object
from storage.errors import MAX_MESSAGE_CHARS, CorruptData, UserError
from tests.import_arrows import python_files

ROOT = Path(__file__).parent.parent
CONTENTS = {
    "nothing": b"",
    "half an object": b'{"a": 1',
    "a list": b"[1]",
    "a string": b'"a"',
    "no UTF-8": b'{"a": "\xff"}',
    "lists without an end": b"[" * 10**5,
    "objects without an end": b'{"a":' * 10**5,
    "a number of 5,000 digits": b'{"a": ' + b"9" * 5000 + b"}",
    "an infinite number": b'{"a": 1e999}',
    "an object too deep to walk through": b'{"a":' * 500 + b"1" + b"}" * 500,
    "half a surrogate pair": b'{"a": "\\ud800"}',
}


def write_summary(file: Path) -> None:
    (file.parent / "dpt").mkdir()
    file.rename(file.parent / "dpt" / "report.json")
    RunFolder(file.parent).write_summary()


def continue_metrics(file: Path) -> None:
    # A line that does not end with a bracket was cut by a kill.
    file.write_bytes(file.read_bytes() + b"}")
    with metrics_log(file.parent, (), 0, {}, enabled=True):
        pass


READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "stage": ("stage.json", lambda file: StageFolder(file.parent).begun_with()),
    "matching of a stage": ("stage.json", lambda file: StageFolder(file.parent).matching()),
    "reports of stages": ("report.json", write_summary),
    "demo": ("demo.json", lambda file: demo._check_settings(file.parent, DemoConfig())),
    "metrics": ("metrics.jsonl", continue_metrics),
    "config of a student": ("config.json", lambda file: is_student(file.parent)),
    "released config": ("config.json", lambda file: read_released_config(file.parent)),
    "config": ("config.json", lambda file: load_config(file.parent)),
    "pairs": ("kind.json", lambda file: load_suite("sugarcrepe", SuiteConfig(data=file.parent))),
}


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("reader", READERS)
def test_json_that_is_none_of_ours_is_an_error_that_names_the_file(reader: str, content: str, tmp_path: Path) -> None:
    name, read = READERS[reader]
    (tmp_path / name).write_bytes(CONTENTS[content])
    read_error(read, tmp_path / name, name)


def read_error(read: Callable[[Path], object], file: Path, name: str) -> str:
    with pytest.raises(UserError) as caught:
        read(file)
    assert str(file.parent) in str(caught.value)
    assert name in str(caught.value)
    return str(caught.value)


STAGES = {
    "no decoder": {"starts_from": "decoder", "settings": {}},
    "no former stage": {"decoder": "d", "settings": {}},
    "a former stage elsewhere": {"decoder": "d", "starts_from": "../../other/dpt", "settings": {}},
    "no former stage by its name": {"decoder": "d", "starts_from": "", "settings": {}},
    "a list of settings": {"decoder": "d", "starts_from": "decoder", "settings": [1]},
}


@pytest.mark.parametrize("case", STAGES)
def test_a_stage_that_does_not_say_what_it_is_cannot_be_gone_on_with_or_exported(case: str, tmp_path: Path) -> None:
    (tmp_path / "stage.json").write_text(json.dumps(STAGES[case]))
    report = {"stage": "dpt", "steps": 1, "samples": 1, "trained_parameters": 1, "seconds": 1, "samples_per_s": 1}
    (tmp_path / "report.json").write_text(json.dumps({**report, "wait_share": 0, "losses": {}}))
    read_error(lambda file: StageFolder(file.parent).begun_with(), tmp_path / "stage.json", "does not say settings")
    read_error(lambda file: read_history(file.parent / "student"), tmp_path / "stage.json", "does not say settings")


def test_layers_of_a_stage_that_cannot_be_matched_are_named(tmp_path: Path) -> None:
    stage = {"decoder": "d", "starts_from": "decoder", "settings": {"matching.student_layers": "all"}}
    (tmp_path / "stage.json").write_text(json.dumps(stage))
    read_error(lambda file: StageFolder(file.parent).matching(), tmp_path / "stage.json", "student_layers")


@pytest.mark.parametrize("line", ['{"loss": 1}', '{"step": null}', '{"step": [1]}', '{"step": 1.5}'])
def test_a_line_of_metrics_without_a_step_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n' + line)
    with (
        pytest.raises(CorruptData, match=r"metrics\.jsonl, line 2"),
        metrics_log(tmp_path, (), 9, {}, enabled=True),
    ):
        pass


TAGS = ["!!float ''", "!!int ''", "!!bool x", "!!timestamp x", "!!int '0b'", "!!float '.'", "!!omap [1]"]


@pytest.mark.parametrize("text", TAGS)
def test_yaml_whose_tag_does_not_fit_its_value_is_no_yaml(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.yaml").write_text(f"samples: {text}\n")
    read_error(lambda file: load_run_file(file, [], {}), tmp_path / "run.yaml", "run.yaml")
    with pytest.raises(UserError, match=r"--set train\.seed=!!"):
        load_run_file(None, [f"train.seed={text}"], {})


def test_a_setting_below_a_value_says_where_it_is_from(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^--set train\.seed\.x=1: "):
        load_run_file(None, ["train.seed=1", "train.seed.x=1"], {})
    (tmp_path / "sweep.yaml").write_text("train: 1\noutput: out\nstudents: {a: {train.seed: 1}}\n")
    read_error(lambda file: load_sweep(file, None, [], {}), tmp_path / "sweep.yaml", "sweep.yaml")


@pytest.mark.parametrize("fields", [{"model_type": ["llava"]}, {"model_type": {"a": 1}}, {"model_type": 1}])
def test_a_model_type_that_is_no_text_is_refused(tmp_path: Path, fields: object) -> None:
    (tmp_path / "config.json").write_text(json.dumps(fields))
    for read in (is_student, check_configs, load_config, read_released_config):
        read_error(lambda file, read=read: read(file.parent), tmp_path / "config.json", "model_type")  # type: ignore[misc]


@pytest.mark.parametrize("key", ["num_hidden_layers", "num_labels", "num_experts", "depth"])
@pytest.mark.parametrize("count", [2**31, -(2**31), 1e300])
def test_a_config_of_more_layers_than_any_model_has_makes_none_of_them(tmp_path: Path, key: str, count: float) -> None:
    config = {"model_type": "qwen2", "text_config": {key: count}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    read_error(lambda file: load_config(file.parent), tmp_path / "config.json", f"has {key}")


def test_what_the_library_cannot_make_of_a_config_is_named(tmp_path: Path) -> None:
    config = {"model_type": "llava", "vision_config": {"model_type": "siglip_vision_model", "patch_size": "a"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    read_error(lambda file: load_config(file.parent), tmp_path / "config.json", "cannot be read by transformers")


def test_a_message_that_holds_a_file_of_a_stranger_is_cut_in_its_middle() -> None:
    text = str(UserError("begin " + "x" * 10**6 + " end"))
    assert text.startswith("begin xxx")
    assert text.endswith("xxx end")
    assert "[995,010 characters]" in text
    assert len(text) < MAX_MESSAGE_CHARS + 50
    assert str(UserError("x" * MAX_MESSAGE_CHARS)) == "x" * MAX_MESSAGE_CHARS


def test_an_object_that_is_read_can_be_written_again() -> None:
    assert parse_object(b'{"a": "\\ud83d\\ude00"}', "here", "restore it") == {"a": "\U0001f600"}


OTHER_PARSERS = {
    "pipeline/demo/run.py": "of settings that it has just written",
    "stages/checkpoints/processors.py": "inside the error for a processor; what the library has just written",
    "stages/conversations/render_templates.py": "what the process that started it wrote",
    "stages/conversations/template_process.py": "what the process that it started wrote",
    "stages/samples/record_groups.py": "of records that it has just written",
    "stages/samples/sources/json_files.py": "a record that cannot be used has a reason and a place in the ledger",
    "stages/export/gguf_tokenizer.py": "what the library has just written",
    "stages/student/data/token_names.py": "what the library has just written",
    "stages/teacher/identity.py": "of settings that it has just written",
    "storage/stores/folder_owner.py": "any error is an unknown owner",
    "storage/strict_model.py": "of a report that it has just written",
}
"""Files that call `json.loads` themselves, and why no stranger's file ends them."""


def test_all_other_json_is_parsed_by_one_owner() -> None:
    found = {
        path.relative_to(ROOT).as_posix()
        for path in python_files(ROOT, "pipeline", "stages", "storage")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr in ("load", "loads") and ast.unparse(node.value) == "json"
    }
    assert found - {"storage/digests.py"} == OTHER_PARSERS.keys()
