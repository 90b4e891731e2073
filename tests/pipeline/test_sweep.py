"""Several students against one store by one command: trained in turn, compared, finished ones left as they are."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.demo.assets import STUDENT_LM
from pipeline.run_file import RunFile, load_run_file
from pipeline.runtime.interruption import Interrupted
from pipeline.suite_evaluation import evaluate_suites
from pipeline.sweep import SweepReport, SweptStudent, in_turn, run_sweep, sweep_table
from pipeline.sweep_file import compared_data, load_sweep
from stages.evaluation.answered_items import AnsweredItem
from stages.evaluation.config import SuiteConfig
from stages.evaluation.loaded_suite import LoadedSuite, load_suite
from stages.evaluation.metrics import ScoredItem
from stages.evaluation.result import SuiteResult, make_result
from stages.student.run_folder import StageReport
from storage.errors import StoreUnavailable, UserError
from tests.conftest import TinyWorld
from tests.pipeline.processes import run_here, tree
from tests.suite_runs import suite_run

SHARED = """\
train:
  loader: {microbatch_size: 4, num_workers: 0}
  logging: {every: 1}
  lora: {rank: 4, alpha: 8}
  dpt: {batch_size: 4, max_steps: 2}
  dft: {batch_size: 4, max_steps: 2, learning_rate: 1.0e-3}
"""
STUDENTS = """\
students:
  compodistill:
  logits: {train.dft.attention_weight: 0}
  sft: {train: {dpt: {kd_weight: 0}, dft: {kd_weight: 0.0, attention_weight: 0.0}}}
"""


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_students_are_trained_in_turn_compared_and_left_alone_when_finished(
    tiny: TinyWorld, targets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    places = f"samples: {tiny.samples}\ntargets: {targets}\nstudent: {tiny.student_lm}\n"
    suites = f"suites: {{sugarcrepe: {{data: {tiny.pairs}, limit: 2}}}}"
    compare = f"compare: {{{suites}, similarity_samples: 4, pictures: 2}}\n"
    base = write(tmp_path / "base.yaml", places + SHARED)
    sweep = write(tmp_path / "sweep.yaml", compare + STUDENTS)
    output = tmp_path / "out"
    arguments = ("--sweep", sweep, "--config", base, "--output", output, "--stage", "dft")
    read: list[str] = []

    def load_once(name: str, config: SuiteConfig) -> LoadedSuite:
        read.append(name)
        return load_suite(name, config)

    monkeypatch.setattr("pipeline.sweep_file.load_suite", load_once)
    done = run_here("train-student", *arguments, monkeypatch=monkeypatch, capsys=capsys)
    assert done.code == 0, done.err
    assert read == ["sugarcrepe"]
    report = SweepReport.model_validate_json((output / "sweep.json").read_text())
    assert list(report.students) == ["compodistill", "logits", "sft"]
    assert not report.failures
    losses = {name: set(student.stages["dft"].losses) - {"loss"} for name, student in report.students.items()}
    assert losses == {"compodistill": {"lm", "kd", "attention"}, "logits": {"lm", "kd"}, "sft": {"lm"}}
    for name, student in report.students.items():
        assert student.suites["sugarcrepe"].num_items == {"replace_att": 2, "swap_obj": 2}
        assert student.similarity is not None
        assert student.samples_per_s > 0
        assert (output / name / "dft" / "student" / "config.json").is_file()
        assert name in done.out
    header = ["student", "last stage", "lm", "kd", "attention", "seconds", "samples/s", "sugarcrepe", "similarity"]
    table = sweep_table(report)
    assert table.header == header
    assert table.rows[2][3:5] == ["", ""]
    assert [row[0] for row in table.rows] == list(report.students)
    page = (output / "report.html").read_text()
    (shown,) = re.findall(r'id="data">(.*?)</script>', page)
    names = [panel["name"] for panel in json.loads(shown)[0]["panels"]]
    assert names == ["teacher", "compodistill", "logits", "sft"]
    assert all(f"{student.suites['sugarcrepe'].main.value:.1f} [" in page for student in report.students.values())

    before = {name: tree(output / name / "dft") for name in report.students}
    monkeypatch.setattr("pipeline.sweep.evaluate_suites", None)
    again = run_here("train-student", *arguments, monkeypatch=monkeypatch, capsys=capsys)
    assert again.code == 0, again.err
    assert {name: tree(output / name / "dft") for name in report.students} == before
    assert SweepReport.model_validate_json((output / "sweep.json").read_text()) == report


@pytest.mark.slow
def test_figures_of_a_student_are_measured_again_once_it_or_what_it_is_compared_on_is_another(
    tiny: TinyWorld, targets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = tmp_path / "pairs"
    shutil.copytree(tiny.pairs, pairs)
    text = f"samples: {tiny.samples}\ntargets: {targets}\nstudent: {tiny.student_lm}\ntrain.stages: [dft]\n{SHARED}"
    compare = f"compare: {{suites: {{sugarcrepe: {{data: {pairs}}}}}, similarity_samples: 2}}\nstudents: {{a: {{}}}}\n"
    sweep, output = write(tmp_path / "s.yaml", text + compare), tmp_path / "out"
    measured: list[str] = []
    as_ever = evaluate_suites

    def counted(*arguments: Any, **options: Any) -> dict[str, SuiteResult]:
        measured.append(str(arguments[0]))
        return as_ever(*arguments, **options)

    monkeypatch.setattr("pipeline.sweep.evaluate_suites", counted)

    def times_measured(*settings: str) -> int:
        done = run_here(
            "train-student", "--sweep", sweep, "--output", output, *settings, monkeypatch=monkeypatch, capsys=capsys
        )
        assert done.code == 0, done.err
        return len(measured)

    assert times_measured() == 1
    assert times_measured() == 1
    # As many steps of the same stage, with other settings.
    shutil.rmtree(output / "a" / "dft")
    assert times_measured("--set", "train.dft.learning_rate=0.01") == 2
    kind = next(pairs.glob("*.json"))
    kind.write_text(kind.read_text().replace('"caption": "', '"caption": "now '))
    assert times_measured("--set", "train.dft.learning_rate=0.01") == 3
    # As an older version left it.
    (output / "a" / "compared.json").write_text('{"steps": {"dft": 2}}')
    assert times_measured("--set", "train.dft.learning_rate=0.01") == 4


def test_a_student_that_fails_is_reported_and_the_others_are_trained(
    tiny: TinyWorld, targets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    places = f"samples: {tiny.samples}\ntargets: {targets}\nstudent: {tiny.student_lm}\n"
    students = "students:\n  broken: {student: no-such-folder}\n  whole: {}\n"
    sweep = write(tmp_path / "sweep.yaml", places + SHARED + students)
    output = tmp_path / "out"
    arguments = ("--sweep", sweep, "--output", output, "--stage", "dpt", "--set", "train.dpt.max_steps=1")
    done = run_here("train-student", *arguments, monkeypatch=monkeypatch, capsys=capsys)
    assert done.code == 1
    # Within seconds, and again beside the results.
    assert "warning: student broken will fail, the others are trained: no checkpoint at no-such-folder" in done.err
    assert "student broken failed: no checkpoint at no-such-folder" in done.err
    report = SweepReport.model_validate_json((output / "sweep.json").read_text())
    assert list(report.failures) == ["broken"]
    assert report.students["whole"].stages["dpt"].steps == 1
    assert not report.students["whole"].suites
    assert sweep_table(report).rows[1][:2] == ["broken", "failed"]

    sweep.write_text(sweep.read_text().replace("no-such-folder", str(tiny.student_lm)))
    mended = run_here("train-student", *arguments, monkeypatch=monkeypatch, capsys=capsys)
    assert mended.code == 0, mended.err
    assert json.loads((output / "sweep.json").read_text())["students"].keys() == {"broken", "whole"}


def test_a_suite_whose_answers_the_students_tokenizer_lacks_is_refused_before_anything_trains(
    tiny: TinyWorld, targets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    places = f"samples: {tiny.samples}\ntargets: {targets}\nstudent: {STUDENT_LM}\ntrain: {{dft: {{kd_weight: 0}}}}\n"
    suite = f"compare: {{suites: {{sugarcrepe: {{data: {tiny.pairs}, protocol: yes_probability}}}}}}\n"
    sweep = write(tmp_path / "sweep.yaml", places + suite + "students: {a: , b: }\n")
    words = ("train-student", "--sweep", sweep, "--output", tmp_path / "out", "--stage", "dft")
    done = run_here(*words, monkeypatch=monkeypatch, capsys=capsys)
    assert done.code == 2
    assert "error: student a: sugarcrepe by yes_probability: the tokenizer does not have 'Yes'" in done.err
    assert not (tmp_path / "out").exists()


def test_what_is_said_closest_to_the_command_wins(tmp_path: Path) -> None:
    base = write(tmp_path / "base.yaml", "train: {seed: 1, logging: {every: 1}, dft: {batch_size: 4, epochs: 2}}\n")
    students = "students:\n  a: {train.seed: 3, train: {dft: {epochs: 5}}}\n  b:\n"
    text = f"config: {base}\ntrain.logging.every: 2\n{students}"
    sweep = load_sweep(write(tmp_path / "s.yaml", text), None, ["train.dft.batch_size=16"], {"output": "out"})
    a, b = sweep.runs["a"], sweep.runs["b"]
    assert (a.output, b.output) == ("out/a", "out/b")
    assert (a.train.seed, b.train.seed) == (3, 1)
    assert (a.train.logging.every, b.train.logging.every) == (2, 2)
    assert (a.train.dft.epochs, b.train.dft.epochs) == (5, 2)
    assert (a.train.dft.batch_size, b.train.dft.batch_size) == (16, 16)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {seed: 1}\n", "names no students"),
        ("students: {}\n", "names no students"),
        ("students: {a: {train.sed: 1}}\n", r"student a:\n  train.sed: there is no such setting .*mean train.seed\?"),
        (
            "students: {a: {lr: 1}}\n",
            r"student a:\n  lr: there is no such setting .*did you mean train.dpt.learning_rate",
        ),
        ("students: {a: {train.adapter: own}}\n", r"train.adapter: .*it is called train.vision now"),
        ("students: {../a: {}}\n", "student '../a' cannot name a folder"),
        ("students: {a: 3}\n", "student a is 3, expected settings"),
        (
            "students: {a: {}}\ncompare: {suits: x}\n",
            r"compare:\n  suits: there is no such setting .*did you mean suites\?",
        ),
        (
            "students: {a: {}}\nconfig: {train: {seed: 1}}\n",
            "config is {'train': {'seed': 1}}, expected the path of a run",
        ),
        (
            "students:\n  a: {train.seed: 1}\n  b: {}\n  a: {train.seed: 2}\n",
            "s.yaml: line 4 has a again, after line 2; ",
        ),
        ("students: {a: {}}\nconfig: nowhere\n", "nor a recipe of that name; recipes are demo, "),
        ("students: {Sweep.json: {}}\n", "student Sweep.json: the sweep's folder has files of such names"),
        ("students: {a.partial: {}}\n", "student a.partial: the sweep's folder has files of such names"),
        ("students: {a: &own {train: *own}}\n", "nests too deep for settings; does a YAML anchor hold"),
        ("students: {a: {}}\ncompare: {similarity_samples: 4}\n", "student a: .* needs samples and targets"),
        (
            "students: {a: {}}\ncompare: {suites: {sugarcrepe: {data: nowhere}}}\n",
            "nowhere is not a folder; expected one with data/",
        ),
    ],
)
def test_a_mistake_in_the_file_is_found_before_anything_trains(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        load_sweep(write(tmp_path / "s.yaml", text), None, [], {"output": str(tmp_path / "out")})
    with pytest.raises(
        UserError, match=r"(--output is missing)|no such setting|names no|cannot|expected|recipe|such|again"
    ):
        load_sweep(tmp_path / "s.yaml", None, [], {})
    assert not (tmp_path / "out").exists()


def test_students_of_several_sources_are_compared_on_the_first(
    tiny: TinyWorld, targets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sources = f"train.data.sources: [{{samples: {tiny.samples}, targets: {targets}}}, {{samples: x, targets: y}}]\n"
    run = load_sweep(write(tmp_path / "two.yaml", sources + "students: {a: }\n"), None, [], {"output": "out"}).runs["a"]
    assert compared_data(run) == (str(tiny.samples), str(targets))
    one = sources.replace(", {samples: x, targets: y}", "")
    text = f"student: {tiny.student_lm}\n{SHARED}{one}compare: {{similarity_samples: 4}}\nstudents: {{a: }}\n"
    sweep, output = write(tmp_path / "one.yaml", text), tmp_path / "out"
    arguments = ("--sweep", sweep, "--output", output, "--stage", "dpt")
    done = run_here("train-student", *arguments, monkeypatch=monkeypatch, capsys=capsys)
    assert done.code == 0, done.err
    similarity = SweepReport.model_validate_json((output / "sweep.json").read_text()).students["a"].similarity
    assert similarity is not None
    assert similarity.layers_from == "training"


def test_each_student_can_have_stages_of_its_own_and_the_flag_has_the_last_word(
    tiny: TinyWorld, targets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (
        f"samples: {tiny.samples}\ntargets: {targets}\nstudent: {tiny.student_lm}\n{SHARED}  stages: [dpt, dft]\n"
        "students:\n  with-dpt: {}\n  without: {train.stages: [dft]}\n"
    )
    sweep, output = write(tmp_path / "sweep.yaml", text), tmp_path / "out"
    done = run_here("train-student", "--sweep", sweep, "--output", output, monkeypatch=monkeypatch, capsys=capsys)
    assert done.code == 0, done.err
    report = SweepReport.model_validate_json((output / "sweep.json").read_text())
    stages = {name: list(student.stages) for name, student in report.students.items()}
    assert stages == {"with-dpt": ["dpt", "dft"], "without": ["dft"]}
    begun = {name: json.loads((output / name / "dft/stage.json").read_text()) for name in stages}
    assert {name: stage["starts_from"] for name, stage in begun.items()} == {"with-dpt": "dpt", "without": "decoder"}

    # Other stages are no other settings: what is finished stays as it is.
    before = {name: tree(output / name / "dft") for name in stages}
    flag = ("--sweep", sweep, "--output", output, "--stage", "dft")
    done = run_here("train-student", *flag, monkeypatch=monkeypatch, capsys=capsys)
    assert done.code == 0, done.err
    report = SweepReport.model_validate_json((output / "sweep.json").read_text())
    assert all(list(student.stages) == ["dft"] for student in report.students.values())
    assert {name: tree(output / name / "dft") for name in stages} == before
    for name in stages:
        assert load_run_file(output / name / "run.yaml", [], {}).train.stages == ("dft",)


def test_a_suite_whose_labels_a_server_has_leaves_its_cell_empty() -> None:
    scored = [AnsweredItem(str(at), ("x",), ScoredItem(("all",), str(at), {"accuracy": at})) for at in (0, 1)]
    suites = {
        name: make_result(
            suite_run(suite=name, protocol="generate"),
            scored if name == "gqa" else [one._replace(scored=ScoredItem(("all",), one.id, {})) for one in scored],
            [],
            100,
            1.0,
            2,
        )
        for name in ("gqa", "vqav2-test-dev")
    }
    students = {"a": SweptStudent(stages={"dpt": finished("a")}, suites=suites)}
    table = sweep_table(SweepReport(students=students, failures={}))
    assert (table.header[-1], table.rows[0][-1]) == ("gqa", "50.0")
    del suites["gqa"]
    alone = SweptStudent(stages={"dpt": finished("a")}, suites=suites)
    assert sweep_table(SweepReport(students={"a": alone}, failures={})).header[-1] == "samples/s"


def finished(name: str) -> StageReport:
    losses = {"loss": 1.0, "lm": 1.0}
    return StageReport(
        stage="dpt",
        steps=1,
        samples=4,
        trained_parameters=1,
        seconds=2.0,
        samples_per_s=2.0,
        first_batch_s=0.0,
        wait_share=0.0,
        losses=losses,
        notes=[name],
    )


def test_what_breaks_in_one_student_spares_the_next_and_an_interruption_ends_the_sweep(tmp_path: Path) -> None:
    path = write(tmp_path / "s.yaml", "students: {broken: {}, first: {}, second: {}}\n")
    sweep = load_sweep(path, None, [], {"output": str(tmp_path / "out")})
    asked_to_stop = [True]

    def train(name: str, run: RunFile) -> list[StageReport]:
        assert run.output == str(tmp_path / "out" / name)
        if name == "broken":
            raise RuntimeError("out of memory")
        if name == "second" and asked_to_stop:
            asked_to_stop.clear()
            raise Interrupted(15)
        return [finished(name)]

    with pytest.raises(Interrupted):
        run_sweep(sweep, in_turn(sweep, train))
    saved = SweepReport.model_validate_json((tmp_path / "out/sweep.json").read_text())
    assert (list(saved.students), saved.failures) == (["first"], {"broken": "RuntimeError: out of memory"})
    report = run_sweep(sweep, in_turn(sweep, train))
    assert "means over the last tenth" in sweep_table(report).title
    assert list(report.students) == ["first", "second"]
    assert report.students["second"].samples_per_s == 2.0
    assert sweep_table(report).rows[1] == ["second", "dpt", "1.000", "2", "2.0"], (
        "columns that nothing is in are left out"
    )


def test_a_full_disk_is_one_error_and_no_failure_of_each_student(tmp_path: Path) -> None:
    path = write(tmp_path / "s.yaml", "students: {first: {}, second: {}}\n")
    begun: list[str] = []

    def train(name: str, _: RunFile) -> list[StageReport]:
        begun.append(name)
        raise StoreUnavailable("no space left")

    with pytest.raises(StoreUnavailable, match="no space left"):
        run_sweep(sweep := load_sweep(path, None, [], {"output": str(tmp_path / "out")}), in_turn(sweep, train))
    assert begun == ["first"]
