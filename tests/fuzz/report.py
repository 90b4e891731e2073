"""What `cdp report` reads of runs and results: settings, metrics, reports, figures of a sweep, answers of a suite."""

import json
from pathlib import Path

from pipeline.report.build import unloaded_page
from pipeline.report.runs import open_runs
from pipeline.report.suites import named_results, questions_about
from pipeline.ui.report.render import render_page
from stages.evaluation.attention.similarity import AttentionSimilarity
from tests.fuzz.attempt import Target
from tests.fuzz.runs import any_of_its_files
from tests.pipeline.report.test_runs import make_run
from tests.pipeline.report.test_suites import item, make_result

METRICS = {"step": 1, "loss": 4.0, "lm": 3.0, "kd": 1.0, "validation/loss": 3.5, "validation/lm": 2.5}


def make(root: Path) -> None:
    """A finished run of a sweep, with a suite's answers about a picture."""
    run = make_run(root / "run", [METRICS], "train.seed=1")
    similarity = AttentionSimilarity(
        student_layers=(1,), windows=((2, 3),), num_samples=4, similarity=(0.5,), alignment_loss=(0.1,)
    )
    (run / "compared.json").write_text(json.dumps({"similarity": json.loads(similarity.to_json())}))
    (root / "picture.png").write_bytes(b"picture")
    asked = item(root / "picture.png", ["Yes."], {"accuracy": 1.0})
    captions = item(root / "picture.png", [[[-3.0, 4, -1.0]]], {"accuracy": 0.0}, question={"candidates": ["red"]})
    make_result(run / "suites" / "sugarcrepe", 70, [captions])
    make_result(run / "suites" / "pope", 70, [asked], suite="pope", protocol="generate")
    (root / "picture.png").unlink()


def read(root: Path) -> None:
    """Everything, as a page."""
    runs = open_runs([root / "run"])
    results = named_results([], [], {"run": (root / "run", "w")})
    similarity = {run.name: found for run in runs if (found := run.similarity()) is not None}
    questions_about([b"picture"], results)
    render_page(unloaded_page(runs, results, similarity))


TARGETS = [Target("report files", make, read, any_of_its_files)]
