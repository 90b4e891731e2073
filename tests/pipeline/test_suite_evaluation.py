"""`cdp evaluate` on a suite: who says how it is asked, what a finished run costs, several processes, a cluster."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.demo.assets import TEACHER
from pipeline.suite_evaluation import evaluate_suites
from stages.evaluation.answered_items import read_items
from stages.evaluation.answering.answerer import Answerer
from stages.evaluation.comparison import compare_results
from stages.evaluation.config import EvaluationConfig, SuiteConfig
from stages.evaluation.loaded_suite import LoadedSuite, load_suite
from stages.evaluation.result import SuiteResult
from storage.errors import UserError
from tests.conftest import TinyWorld
from tests.pipeline.processes import cdp, run_here
from tests.processes import PATIENCE_S

SUITE = "sugarcrepe"


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def evaluate(tiny: TinyWorld, output: Path, **config: Any) -> SuiteResult:
    suites = {SUITE: load_suite(SUITE, SuiteConfig(data=tiny.pairs))}
    return evaluate_suites(str(tiny.teacher), suites, EvaluationConfig(**config), output)[SUITE]


def lasting(result: SuiteResult) -> dict[str, Any]:
    return result.model_dump(exclude={"seconds", "items_per_s"})


@pytest.mark.parametrize(
    ("words", "protocol"),
    [
        ((), "likelihood"),
        (("--set", "evaluate.suites.sugarcrepe.protocol=compodistill"), "compodistill"),
        (("--config", "run.yaml"), "compodistill"),
        (("--config", "run.yaml", "--protocol", "mean_likelihood"), "mean_likelihood"),
    ],
)
def test_the_run_file_says_how_a_suite_is_asked_unless_a_flag_does(
    words: tuple[str, ...],
    protocol: str,
    tiny: TinyWorld,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(f"evaluate: {{suites: {{sugarcrepe: {{data: {tiny.pairs}, protocol: compodistill}}}}}}")
    words = (*words, "--set", f"evaluate.suites.sugarcrepe.data={tiny.pairs}")
    command = (
        "evaluate",
        tiny.teacher,
        "--suite",
        "all",
        "--limit",
        1,
        "--output",
        "out",
        "--report",
        "r.json",
        *words,
    )
    done = run_here(*command, monkeypatch=monkeypatch, capsys=capsys)
    assert done.code == 0, done.err
    (result,) = json.loads(Path("r.json").read_text()).values()
    assert result["run"]["protocol"] == protocol
    assert json.loads(Path("out/sugarcrepe/result.json").read_text()) == result
    assert f"sugarcrepe {tiny.teacher.name}: 2 of 2 items" in done.err


def test_a_finished_suite_is_summed_up_again_without_its_model(
    tiny: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = evaluate(tiny, tmp_path)
    monkeypatch.setattr("pipeline.suite_evaluation.load_model", None)
    again = evaluate(tiny, tmp_path)
    assert lasting(again) == lasting(first)
    assert again.items_per_s == 0


def test_a_finished_suite_is_counted_again_from_its_answers(tiny: TinyWorld, tmp_path: Path) -> None:
    first = evaluate(tiny, tmp_path)
    items = tmp_path / SUITE / "items.jsonl"
    items.write_text(re.sub(r'"counts": {[^}]*}', '"counts": {"accuracy": 0.25}', items.read_text()))
    (tmp_path / SUITE / "items-1.jsonl").write_text(items.read_text())
    assert lasting(evaluate(tiny, tmp_path)) == lasting(first)
    # What was counted anew is saved, as `cdp compare` reads it.
    assert [path.name for path in items.parent.glob("items*")] == ["items.jsonl"]
    compared = compare_results({"a": items.parent, "b": items.parent})
    assert compared.metrics["average"]["accuracy"].differences["b"].value == 0


def two_suites(tiny: TinyWorld, folder: Path) -> dict[str, LoadedSuite]:
    """One of them with grey pictures; its files are written into the folder."""
    folder.mkdir()
    for path in tiny.pairs.glob("*.json"):
        pairs = [one | {"caption2": "red"} for one in json.loads(path.read_text()).values()]
        (folder / path.name).write_text(json.dumps(pairs))
    grey = SuiteConfig(data=folder, images=tiny.pairs / "images", limit=1, blind=True)
    return {
        SUITE: load_suite(SUITE, SuiteConfig(data=tiny.pairs, limit=1)),
        "sugarcrepe_pp": load_suite("sugarcrepe_pp", grey),
    }


def test_several_suites_load_and_try_a_model_once_and_no_suites_time_has_it(
    tiny: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suites = two_suites(tiny, tmp_path / "twice")
    made: list[Answerer] = []
    slow_s = 3.0

    class Slow(Answerer):
        def __init__(self, *args: Any, **settings: Any) -> None:
            time.sleep(slow_s)
            super().__init__(*args, **settings)
            made.append(self)

    monkeypatch.setattr("pipeline.suite_evaluation.Answerer", Slow)
    results = evaluate_suites(str(tiny.teacher), suites, EvaluationConfig(), tmp_path / "out")
    assert len(made) == 1
    assert all(result.seconds < slow_s for result in results.values())
    del suites[SUITE]
    evaluate_suites(str(tiny.teacher), suites, EvaluationConfig(), tmp_path / "alone")
    assert len(made) == 2
    assert read_items(tmp_path / "alone/sugarcrepe_pp") == read_items(tmp_path / "out/sugarcrepe_pp")


def test_a_suites_result_is_told_before_the_next_suite_is_asked(tiny: TinyWorld, tmp_path: Path) -> None:
    suites, begun, output = two_suites(tiny, tmp_path / "twice"), list[list[str]](), tmp_path / "out"

    def finished(result: SuiteResult) -> None:
        begun.append(sorted(path.name for path in output.iterdir()))
        assert (output / result.run.suite / "result.json").exists()

    evaluate_suites(str(tiny.teacher), suites, EvaluationConfig(), output, finished=finished)
    assert begun == [[SUITE], [SUITE, "sugarcrepe_pp"]]


def test_a_word_that_the_tokenizer_lacks_is_named_before_anything_is_asked(
    tiny: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.suite_evaluation.load_model", None)
    suites = {
        SUITE: load_suite(SUITE, SuiteConfig(data=tiny.pairs, protocol="yes_probability")),
    }
    with pytest.raises(
        UserError, match=r"sugarcrepe by yes_probability: the tokenizer does not have 'Yes': .*likelihood"
    ):
        evaluate_suites(str(TEACHER), suites, EvaluationConfig(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_answers_of_another_model_are_refused(tiny: TinyWorld, tmp_path: Path) -> None:
    evaluate(tiny, tmp_path)
    run = tmp_path / SUITE / "run.json"
    run.write_text(run.read_text().replace('"weights": "', '"weights": "0'))
    with pytest.raises(UserError, match="answers of another run: its weights is 0"):
        evaluate(tiny, tmp_path)


def test_grey_pictures_are_another_run(tiny: TinyWorld, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    words = ("evaluate", tiny.teacher, "--suite", SUITE, "--data", tiny.pairs, "--output", tmp_path)
    assert run_here(*words, monkeypatch=monkeypatch, capsys=capsys).code == 0
    done = run_here(*words, "--blind", monkeypatch=monkeypatch, capsys=capsys)
    assert (done.code, "its blind is False, this command's is True" in done.err) == (2, True)
    done = run_here(*words[:-1], tmp_path / "blind", "--blind", monkeypatch=monkeypatch, capsys=capsys)
    assert (done.code, "grey pictures" in " ".join(done.out.split())) == (0, True)


@pytest.mark.slow
def test_two_processes_answer_what_one_does(tiny: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = evaluate(tiny, tmp_path / "alone")
    # So that both have something to do.
    script = tmp_path / "cdp.py"
    script.write_text(
        "import stages.evaluation.run_suite as module\nmodule.ITEMS_AT_ONCE = 2\n"
        "from pipeline.cli.app import main\nmain()\n"
    )
    words = ["evaluate", tiny.teacher, "--suite", SUITE, "--data", tiny.pairs, "--output", tmp_path / "two"]
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", script, *words]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == 0, done.stderr
    files = sorted(path.name for path in (tmp_path / "two" / SUITE).glob("items*"))
    assert files == ["items-1.jsonl", "items.jsonl"]
    together = SuiteResult.model_validate_json((tmp_path / "two" / SUITE / "result.json").read_text())
    assert lasting(together) == lasting(alone)
    assert done.stdout.count("guessing") == 1
    assert "8 of 8 items" in done.stderr


def test_of_several_processes_one_says_which_student_is_asked(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for rank, said in (("0", True), ("1", False)):
        monkeypatch.setenv("RANK", rank)
        done = cdp("evaluate", undisturbed, "--suite", SUITE, "--data", tmp_path / "none", "--output", tmp_path / "out")
        assert (done.code, "student: " in done.err) == (2, said)


def test_workers_of_a_cluster_answer_what_one_process_does(tiny: TinyWorld, tmp_path: Path) -> None:
    alone = evaluate(tiny, tmp_path / "alone")
    spread = evaluate(tiny, tmp_path / "spread", num_workers=2)
    assert lasting(spread) == lasting(alone)
    assert read_items(tmp_path / "spread" / SUITE).keys() == read_items(tmp_path / "alone" / SUITE).keys()
