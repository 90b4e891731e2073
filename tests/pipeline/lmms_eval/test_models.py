"""The plug-in as lmms-eval runs it, in an environment of its own: `CDP_LMMS_PYTHON` names its interpreter.

There `compodistill` is installed (docs/harnesses.md), so that its entry point is found; the code is this checkout's.
"""

import json
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from pipeline.demo.assets import TEACHER
from pipeline.demo.scenes.dataset import write_dataset
from pipeline.models import load_model
from stages.conversations.encoder import NO_LIMIT, ConversationEncoder
from stages.export.export import export_student
from stages.student.model.chat import Chat
from tests.requirements import ROOT

PYTHON = os.environ.get("CDP_LMMS_PYTHON", "")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="CDP_LMMS_PYTHON names no interpreter with lmms-eval"),
]

NUM_TOKENS = 24
TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
doc_to_visual: !function pictures.of
doc_to_text: "{{{{question}}}}"
{settings}
"""
QUESTIONS = f"""\
output_type: generate_until
doc_to_target: answer
generation_kwargs: {{max_new_tokens: {NUM_TOKENS}, temperature: 0, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]"""
CHOICES = """\
output_type: multiple_choice
doc_to_target: gold
doc_to_choice: choices
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]"""
PICTURES = "from PIL import Image\n\n\ndef of(doc):\n    return [Image.open(doc['image'])]\n"

MENDED = """
import runpy
from lmms_eval import evaluator
of_text = evaluator.unwrap_generation_output
evaluator.unwrap_generation_output = lambda found: (found, None) if isinstance(found, tuple) else of_text(found)
runpy.run_module("lmms_eval", run_name="__main__")
"""
"""lmms-eval with likelihoods left as they are; 0.7.3 makes texts of them."""


@dataclass(frozen=True)
class Suite:
    """Tasks in a folder, and their documents."""

    tasks: Path
    questions: list[dict[str, Any]]
    choices: list[dict[str, Any]]


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Suite:
    folder = tmp_path_factory.mktemp("suite")
    write_dataset(folder, 12, seed=7, num_pairs=4)
    samples = [sample for sample in json.loads((folder / "train.json").read_text()) if "image" in sample]
    questions = [
        {
            "image": str(folder / sample["image"]),
            "question": sample["conversations"][0]["value"].removeprefix("<image>\n"),
            "answer": sample["conversations"][1]["value"],
        }
        for sample in samples
    ]
    choices = []
    for file in sorted((folder / "pairs").glob("*.json")):
        for number, pair in enumerate(json.loads(file.read_text()).values()):
            document = {"image": str(folder / "pairs" / "images" / pair["filename"]), "question": "Describe the image."}
            captions = [pair["caption"], pair["negative_caption"]]
            # Of the captions of one kind the false one counts as right, so that a good model errs.
            gold = number % 2 if file.stem != "swap_att" else 1 - number % 2
            choices.append({**document, "choices": captions[:: -1 if number % 2 else 1], "gold": gold})
    write_task(folder, "scene_questions", questions, QUESTIONS)
    write_task(folder, "scene_choices", choices, CHOICES)
    return Suite(folder / "tasks", questions, choices)


def write_task(folder: Path, name: str, documents: Sequence[dict[str, Any]], settings: str) -> None:
    (folder / "tasks").mkdir(exist_ok=True)
    (folder / "tasks" / "pictures.py").write_text(PICTURES)
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps(document) + "\n" for document in documents))
    (folder / "tasks" / f"{name}.yaml").write_text(TASK.format(name=name, file=file, settings=settings))


@dataclass(frozen=True)
class Outcome:
    """What lmms-eval wrote; `scores` is None if it wrote no results."""

    scores: dict[str, Any] | None
    samples: list[dict[str, Any]]
    said: str


def lmms_eval(
    model: Path, tasks: Path, task: str, out: Path, *flags: str, start: Sequence[str] = ("-m", "lmms_eval")
) -> Outcome:
    named = ("--model", "cdp", "--model_args", f"pretrained={model},batch_size=4", "--device", "cpu")
    places = ("--tasks", task, "--include_path", str(tasks), "--output_path", str(out), "--log_samples")
    done = subprocess.run(
        [PYTHON, *start, *named, *places, *flags],
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HOME": str(out / "home"), "HF_DATASETS_OFFLINE": "1"},
        cwd=out.parent,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    results = [json.loads(file.read_text()) for file in out.rglob("*_results.json")]
    lines = [line for file in out.rglob("*_samples_*.jsonl") for line in file.read_text().splitlines()]
    samples = sorted(map(json.loads, lines), key=lambda sample: int(sample["doc_id"]))
    return Outcome(results[0]["results"][task] if results else None, samples, said)


def asked_one_by_one(model: Path, suite: Suite) -> list[str]:
    """The answers of greedy decoding to one question at a time."""
    loaded, processor = load_model(str(model))
    answers = []
    for document in suite.questions:
        with Image.open(document["image"]) as image:
            chat = Chat(loaded, processor, image.convert("RGB"), NUM_TOKENS)
        answers.append(chat.ask(document["question"], lambda _: None))
    return answers


def likeliest_choices(model: Path, suite: Suite) -> list[int]:
    """The number of the choice whose tokens, the end token included, have the largest sum of log-probabilities."""
    loaded, processor = load_model(str(model))
    encoder = ConversationEncoder(processor, loaded.config.image_token_id, NO_LIMIT)
    found = []
    for document in suite.choices:
        with Image.open(document["image"]) as image:
            encoded = [encoder.encode_pair(document["question"], text, [image]) for text in document["choices"]]
        sums = []
        for one in encoded:
            with torch.no_grad():
                logits_TV = loaded(input_ids=one.token_ids[None], **one.pixel_inputs).logits[0].double()
            at = one.answer_mask.nonzero()[:, 0]
            sums.append(float(logits_TV.log_softmax(-1)[at - 1, one.token_ids[at]].sum()))
        found.append(sums.index(max(sums)))
    return found


@pytest.mark.parametrize("kind", ["a checkpoint", "a run folder", "an export"])
def test_answers_and_score_are_those_of_the_model_itself(
    kind: str, suite: Suite, undisturbed: Path, tmp_path: Path
) -> None:
    models = {"a checkpoint": TEACHER, "a run folder": undisturbed, "an export": tmp_path / "export"}
    if kind == "an export":
        export_student(undisturbed / "sft" / "student", models[kind])
    expected = asked_one_by_one(models[kind], suite)
    outcome = lmms_eval(models[kind], suite.tasks, "scene_questions", tmp_path / "out")
    assert [sample["filtered_resps"] for sample in outcome.samples] == expected
    right = [text == document["answer"] for text, document in zip(expected, suite.questions, strict=True)]
    assert outcome.scores is not None, outcome.said
    assert outcome.scores["exact_match,none"] == pytest.approx(sum(right) / len(right))
    assert kind != "a checkpoint" or 0 < sum(right) < len(right)


def test_two_processes_share_the_documents(suite: Suite, tmp_path: Path) -> None:
    start = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "lmms_eval")
    outcome = lmms_eval(TEACHER, suite.tasks, "scene_questions", tmp_path / "out", start=start)
    assert outcome.scores is not None, outcome.said
    assert [sample["filtered_resps"] for sample in outcome.samples] == asked_one_by_one(TEACHER, suite)


def test_a_document_that_cannot_be_asked_is_named_and_leaves_no_results(suite: Suite, tmp_path: Path) -> None:
    long = {**suite.questions[1], "question": "what is " * 500}
    write_task(tmp_path, "too_long", [suite.questions[0], long], QUESTIONS)
    outcome = lmms_eval(TEACHER, tmp_path / "tasks", "too_long", tmp_path / "out")
    assert outcome.scores is None
    assert "UserError: document 1 of too_long: prompt_beyond_max_length" in outcome.said


def test_likelihoods_that_lmms_eval_could_not_read_are_refused_before_the_work(suite: Suite, tmp_path: Path) -> None:
    outcome = lmms_eval(TEACHER, suite.tasks, "scene_choices", tmp_path / "out", "--force_simple")
    assert outcome.scores is None
    assert "makes texts of likelihoods and then cannot score them; choose a task of output_type" in outcome.said


def test_of_choices_the_likeliest_is_taken_once_lmms_eval_reads_them(suite: Suite, tmp_path: Path) -> None:
    chosen = likeliest_choices(TEACHER, suite)
    right = [number == document["gold"] for number, document in zip(chosen, suite.choices, strict=True)]
    script = ("-c", MENDED)
    outcome = lmms_eval(TEACHER, suite.tasks, "scene_choices", tmp_path / "out", "--force_simple", start=script)
    assert outcome.scores is not None, outcome.said
    assert sum(right) not in (0, len(right) / 2, len(right))
    assert outcome.scores["acc,none"] == pytest.approx(sum(right) / len(right))
