"""How fast suites are answered: items a second, against one `generate` call a question, and against lmms-eval.

The bundled teacher is asked pairs of captions about drawn scenes: by the authors' protocol, two questions a picture
with a written answer, and by likelihood, two captions a picture. The plain way is transformers' own: one question after
the other, each with its picture, through `model.generate` or one forward pass. Ways run in turn, several times; a ratio
is the median of those within a turn.

    python -m benchmarks.evaluation
    CDP_LMMS_PYTHON=.../bin/python python -m benchmarks.evaluation     # also lmms-eval, in an environment of its own
"""

import argparse
import json
import os
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks.results import RESULTS, Spent, command_line, interleaved, median_ratio, save_result, spent
from pipeline.demo.assets import TEACHER
from pipeline.demo.scenes.dataset import write_dataset
from pipeline.models import load_model
from stages.evaluation.answering.answerer import Answerer
from stages.evaluation.config import EvaluationConfig, SuiteConfig
from stages.evaluation.loaded_suite import LoadedSuite, load_suite
from stages.evaluation.run_suite import ask_chunk, chunks_of
from stages.evaluation.suites.suite import Protocol, Question

PROTOCOLS: Final[tuple[Protocol, ...]] = ("compodistill", "likelihood")
OURS: Final = "cdp evaluate"
PLAIN: Final = "one generate or forward call a question"
LMMS: Final = "CDP_LMMS_PYTHON"
"""Environment variable that names an interpreter with lmms-eval and this project."""


class PlainWay:
    """transformers alone: a question at a time, nothing shared."""

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.processor = model, processor

    @torch.inference_mode()
    def answer(self, question: Question) -> object:
        """The written answer, or the log-probability of each candidate."""
        images = [picture.load(10**8, "ignore") for picture in question.pictures]
        content = [*({"type": "image"} for _ in images), {"type": "text", "text": question.prompt}]
        prompt = self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        if not question.candidates:
            inputs = self.processor(text=[prompt], images=[images], return_tensors="pt")
            output = self.model.generate(**inputs, do_sample=False, max_new_tokens=question.max_new_tokens)
            return self.processor.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return [self._log_prob(prompt, f" {one}", images) for one in question.candidates]

    def _log_prob(self, prompt: str, answer: str, images: list[Any]) -> float:
        text = prompt + answer + self.processor.tokenizer.eos_token
        inputs = self.processor(text=[text], images=[images], return_tensors="pt")
        count = len(self.processor.tokenizer(answer).input_ids) + 1
        logits = self.model(**inputs, logits_to_keep=count + 1).logits[0, :-1].float()
        tokens = inputs["input_ids"][0, -count:]
        return float(logits.log_softmax(-1).gather(1, tokens[:, None]).sum())


def ask(answerer: Answerer, suite: LoadedSuite) -> None:
    """All items, as `cdp evaluate` asks them."""
    for chunk in chunks_of(suite.items):
        ask_chunk(answerer, suite, chunk)


def measure(folder: Path, num_pairs: int, repeats: int, protocols: Sequence[Protocol]) -> dict[str, Any]:
    """Items a second of each way and protocol, and the ratio to the plain way."""
    write_dataset(folder, 20, 0, "shapes", num_pairs)
    model, processor = load_model(str(TEACHER))
    answerer, plain = Answerer(model, processor, EvaluationConfig()), PlainWay(model, processor)
    found: dict[str, Any] = {}
    for protocol in protocols:
        suite = load_suite("sugarcrepe", SuiteConfig(data=folder / "pairs", protocol=protocol))
        questions = [question for item in suite.items for question in item.questions]

        def plainly(questions: Sequence[Question] = questions) -> None:
            for question in questions:
                plain.answer(question)

        ways: dict[str, Callable[[], Spent]] = {
            OURS: lambda suite=suite: spent(lambda: ask(answerer, suite)),  # type: ignore[misc]
            PLAIN: lambda plainly=plainly: spent(plainly),  # type: ignore[misc]
        }
        found[protocol] = _summed_up(interleaved(ways, repeats), len(suite.items))
    return found


def _summed_up(runs: dict[str, list[Spent]], num_items: int) -> dict[str, Any]:
    walls = {way: [one.wall_s for one in of_way] for way, of_way in runs.items()}
    cpus = {way: [one.cpu_s for one in of_way] for way, of_way in runs.items()}
    return {
        "items": num_items,
        "items_per_s": {way: round(num_items / statistics.median(of_way), 2) for way, of_way in walls.items()},
        "plain_wall_by_ours": round(median_ratio(walls[PLAIN], walls[OURS]), 2),
        "plain_processor_time_by_ours": round(median_ratio(cpus[PLAIN], cpus[OURS]), 2),
    }


def lmms_eval(folder: Path, python: str) -> dict[str, Any]:
    """The authors' questions as a local task of lmms-eval, with this project's model of it; items a second.

    The time of a run over two questions is taken off: what loading and starting cost.
    """
    suite = load_suite("sugarcrepe", SuiteConfig(data=folder / "pairs", protocol="compodistill"))
    lines = [
        {"image": str(question.pictures[0].source), "question": question.prompt, "answer": "A"}
        for item in suite.items
        for question in item.questions
    ]
    tasks = folder / "task"
    tasks.mkdir()
    (tasks / "pairs.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    (tasks / "pairs.yaml").write_text(_TASK.format(data=tasks / "pairs.jsonl"))
    (tasks / "pairs_utils.py").write_text(_TASK_FUNCTIONS)
    seconds = _seconds_of_lmms_eval(python, tasks, folder / "all") - _seconds_of_lmms_eval(
        python, tasks, folder / "two", "--limit", "2"
    )
    items = (len(lines) - 2) / 2
    return {"items": items, "seconds": round(seconds, 1), "items_per_s": round(items / seconds, 2)}


def _seconds_of_lmms_eval(python: str, tasks: Path, output: Path, *more: str) -> float:
    command = [python, "-m", "lmms_eval", "--model", "cdp", "--model_args", f"pretrained={TEACHER},batch_size=16"]
    command += ["--tasks", "cdp_pairs", "--include_path", str(tasks), "--device", "cpu", "--output_path", str(output)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "PYTHONPATH": str(Path.cwd())}
    subprocess.run([*command, *more], check=True, capture_output=True, env=environment)
    # It exits with 0 whatever happens: there are results only if it went well.
    (results,) = output.rglob("*_results.json")
    return float(json.loads(results.read_text())["total_evaluation_time_seconds"])


_TASK = """\
task: cdp_pairs
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function pairs_utils.doc_to_visual
doc_to_text: !function pairs_utils.doc_to_text
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 32, do_sample: false}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""
_TASK_FUNCTIONS = """\
from PIL import Image


def doc_to_visual(doc):
    return [Image.open(doc["image"]).convert("RGB")]


def doc_to_text(doc):
    return doc["question"]
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=20, help="of each of five kinds")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS / "evaluation.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), options.pairs, options.repeats, PROTOCOLS)
        if python := os.environ.get(LMMS):
            found["compodistill"]["lmms_eval"] = lmms_eval(Path(folder), python)
    result = {"pairs_a_kind": options.pairs, "repeats": options.repeats, "protocols": found}
    save_result(options.out, torch.device("cpu"), command_line("benchmarks.evaluation"), result)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
