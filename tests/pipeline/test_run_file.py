import os
import re
from pathlib import Path

import pytest

from pipeline.run_file import RunFile, load_run_file, save_run_file
from stages.samples.pack import PackConfig
from stages.settings import RENAMED, sections_of, validated
from storage.errors import UserError
from storage.stores import open_store

YAML = """\
samples: from-yaml
output: out
teacher:
  checkpoint: teacher-from-yaml
  max_length: 100
train:
  seed: 3
  dft:
    learning_rate: 1.0e-3
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "run.yaml"
    file.write_text(YAML)
    return file


def test_flags_win_over_set_and_set_wins_over_the_file(path: Path) -> None:
    run = load_run_file(
        path,
        ["teacher.max_length=200", "train.seed=5", "samples=from-set", "extract.workers=4"],
        {"samples": "from-flag", "teacher.checkpoint": None, "extract.workers": 2},
    )
    assert run.samples == "from-flag"
    assert run.extract.workers == 2
    assert run.train.seed == 5
    assert run.output == "out"
    assert run.teacher is not None
    assert (run.teacher.checkpoint, run.teacher.max_length) == ("teacher-from-yaml", 200)
    assert run.train.dft.learning_rate == 1e-3


def test_what_is_not_given_has_its_default() -> None:
    assert load_run_file(None, [], {}) == RunFile()
    assert load_run_file(None, [], {}).train.dft.batch_size == 128


def test_an_empty_file_is_all_defaults(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("# nothing yet\n")
    assert load_run_file(tmp_path / "run.yaml", [], {}) == RunFile()


def test_values_of_set_are_read_as_yaml() -> None:
    run = load_run_file(
        None,
        ["train.matching.student_layers=[2, 3]", "train.dpt.max_steps=null", "teacher.checkpoint=a=b", "train.seed=7"],
        {},
    )
    assert run.train.matching.student_layers == (2, 3)
    assert run.train.dpt.max_steps is None
    assert run.teacher is not None
    assert run.teacher.checkpoint == "a=b"


def test_a_saved_run_file_says_everything_and_loads_to_the_same_settings(path: Path, tmp_path: Path) -> None:
    run = load_run_file(path, ["train.matching.student_layers=[2, 3]", "teacher.layers=[2, 3, 4]"], {})
    saved = tmp_path / "new" / "run.yaml"
    save_run_file(run, open_store(saved.parent), saved.name)
    assert load_run_file(saved, [], {}) == run
    assert "microbatch_size: 8" in saved.read_text()


def test_a_run_file_is_replaced_in_one_step_when_the_run_goes_on(path: Path, tmp_path: Path) -> None:
    saved = tmp_path / "new" / "run.yaml"
    save_run_file(load_run_file(path, [], {}), open_store(saved.parent), saved.name)
    # The file as whoever opened it has it: not cut while the new one is written.
    os.link(saved, tmp_path / "before")
    before = saved.read_bytes()
    save_run_file(load_run_file(path, ["train.seed=17"], {}), open_store(saved.parent), saved.name)
    assert (tmp_path / "before").read_bytes() == before
    assert load_run_file(saved, [], {}).train.seed == 17


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("train.dft.lerning_rate=1", r"rate: there is no such setting .*; did you mean train.dft.learning_rate\?"),
        ("teacher.lyers=[1]", r"teacher.lyers: .*; did you mean teacher.layers\?"),
        ("trian.seed=1", r"trian.seed: .*; did you mean train.seed\?$"),
        ("nonsense=1", r"nonsense: there is no such setting \(found 1\)$"),
        ("max_skipped_fraction=0.1", r"did you mean extract.max_skipped_fraction\?$"),
        ("lr=1", r"did you mean train.dpt.learning_rate or train.dft.learning_rate or train.sft.learning_rate\?$"),
        ("learning_rate=1", r"mean train.dpt.learning_rate or train.dft.learning_rate or train.sft.learning_rate\?$"),
        ("train.dft.lr=1", r"did you mean train.dft.learning_rate\?$"),
        ("dft.learning_rate=1", r"dft.learning_rate: .*did you mean train.dft.learning_rate\?$"),
        ("dft.batch_size=1", r"dft.batch_size: .*did you mean train.dft.batch_size\?$"),
        ("train.learning_rate=1", r"did you mean train.dpt.learning_rate or train.dft.learning_rate or train.sft.lear"),
        (
            "train.lr=1",
            r"did you mean train.dpt.learning_rate or train.dft.learning_rate or train.sft.learning_rate\?$",
        ),
        ("trian.dft.lr=1", r"trian.dft.lr: .*; did you mean train.dft.learning_rate\?$"),
        ("loader.prefetch=1", r"loader.prefetch: .*; did you mean train.loader.prefetch\?$"),
        ("warmup=1", r"did you mean train.dpt.warmup_ratio or train.dft.warmup_ratio or train.sft.warmup_ratio\?$"),
        ("train.max_length=1", r"did you mean teacher.max_length or evaluate.max_length\?$"),
        ("batch_size=1", r"did you mean teacher.batch_size or train.dpt.batch_size or .* or evaluate.batch_size\?$"),
        ("train.batch_size=1", r"did you mean train.dpt.batch_size or train.dft.batch_size or train.sft.batch_size\?$"),
        ("mikrobatch_size=1", r"did you mean train.loader.microbatch_size\?$"),
        ("train.adapter=own", r"train.adapter: there is no such setting .*; it is called train.vision now$"),
        ("train.own_adapter=frozen", r"it is called train.projector now$"),
        ("train.matching=one_to_one", r"train.matching: .*found 'one_to_one'\); it is called train.matching.kind now$"),
        ("train.parallel=fsdp", r"it is called train.parallel.strategy now$"),
        ("teacher.tail_draws=3", r"it is called teacher.tail_samples now$"),
        ("log_every=3", r"did you mean train.logging.every\?$"),
        ("train.seed=abc", "train.seed: .*integer.*found 'abc'"),
        ("train.seed=-1", "train.seed: .*greater than or equal to 0"),
        ("extract.workers=0", "extract.workers: .*greater than or equal to 1"),
        ("train.dpt.trains=everything", "train.dpt.trains: .*'post_connector', 'lora' or 'full'"),
        ("train.stages=[dpt, rlhf]", "train.stages.1: .*'dpt', 'dft' or 'sft'.*found 'rlhf'"),
        ("train.stages=[dpt, dpt]", "train.stages: .*some of dpt, dft, sft, each once and in this order"),
        ("train.stages=[dft, dpt]", "train.stages: .*some of dpt, dft, sft, each once and in this order"),
        ("train.stages=[]", "train.stages: .*at least 1 item"),
        ("train=5", "train: "),
        ("train.seed", "expected section.field=value"),
        ("train.seed=[1", "--set train.seed=.* is not YAML"),
        ("samples.folder=x", "samples is a value, not a section"),
    ],
)
def test_a_wrong_setting_is_one_message_that_names_it(setting: str, message: str, path: Path) -> None:
    with pytest.raises(UserError, match=message):
        load_run_file(path, [setting], {})


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_every_setting_of_an_earlier_version_is_refused_with_the_name_of_one_that_there_is(old: str, new: str) -> None:
    assert new in {setting.name for section in sections_of(RunFile) for setting in section.settings}
    with pytest.raises(UserError, match=rf"{re.escape(old)}: .*; it is called {re.escape(new)} now"):
        load_run_file(None, ["teacher.checkpoint=x", f"{old}=x"], {})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: [unclosed", "is not YAML"),
        ("train:\n  seed: 1\n  log_every: 2\n  'seed': 3\n", "run.yaml: line 4 has seed again, after line 2; only one"),
        ("- a\n- b\n", "holds a list, expected sections"),
        ("train:\n  sed: 3\n", "train.sed: there is no such setting"),
        ("!!python/object/apply:os.system ['echo']", "is not YAML"),
    ],
)
def test_a_wrong_file_is_one_message_that_names_it(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        load_run_file(file, [], {})
    assert str(file) in str(caught.value)


def test_an_anchor_may_be_laid_under_settings_of_its_names(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("train:\n  dpt: &shared {batch_size: 4, epochs: 2}\n  dft: {<<: *shared, epochs: 5}\n")
    train = load_run_file(file, [], {}).train
    assert (train.dft.batch_size, train.dft.epochs, train.dpt.epochs) == (4, 5, 2)


def test_a_missing_or_binary_file_is_one_message(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        load_run_file(tmp_path / "none.yaml", [], {})
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot be read"):
        load_run_file(tmp_path / "binary.yaml", [], {})


def test_settings_of_other_models_are_checked_the_same_way() -> None:
    assert validated(PackConfig, {"max_skipped_fraction": 0.5}, "the flags").max_skipped_fraction == 0.5
    with pytest.raises(UserError, match=r"the flags:\n  max_skipped_fraction: .*less than or equal to 1 \(found 2.0\)"):
        validated(PackConfig, {"max_skipped_fraction": 2.0}, "the flags")
