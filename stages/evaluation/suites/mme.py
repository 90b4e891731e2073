"""MME: fourteen tasks of perception and cognition, each image with a question for a yes and one for a no. Fu et al.,
2023.
"""

from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np

from stages.evaluation.suites.suite import (
    Answer,
    Counts,
    Item,
    KindCounts,
    Metrics,
    Protocol,
    Suite,
    mean_of_drawn,
    percent_of_items,
)
from stages.evaluation.suites.suite_files import SuiteFiles
from stages.evaluation.suites.vqa_answers import SHORT_ANSWER
from stages.evaluation.suites.yes_no import YES_NO_PROTOCOLS, first_is_likelier, two_way_question
from storage.errors import UserError
from storage.regular_files import is_folder

_PERCEPTION = "existence count position color posters celebrity scene landmark artwork OCR"
_COGNITION = "commonsense_reasoning numerical_calculation text_translation code_reasoning"
TASKS: Final = {"perception": tuple(_PERCEPTION.split()), "cognition": tuple(_COGNITION.split())}
_FOLDERS: Final = ("MME_Benchmark_release_version/MME_Benchmark/", "MME_Benchmark_release_version/", "MME_Benchmark/")
_ENDING: Final = " Please answer yes or no."


class Mme(Suite):
    """Points: per task the percentage of right answers and that of images with both right, added up; 200 at most.

    `total` has their sums over the ten tasks of perception (2000) and the four of cognition (800), and both in percent
    of 2800, as some papers print it. Sums are over the tasks that were asked.
    """

    name = "mme"
    source = "BradyFU/Awesome-Multimodal-Large-Language-Models, eval_tool/calculation.py; prompt: haotian-liu/LLaVA"
    fetch = (
        "MME_Benchmark_release_version.zip, unpacked, as the branch Evaluation of "
        "github.com/BradyFU/Awesome-Multimodal-Large-Language-Models says"
    )
    protocols = YES_NO_PROTOCOLS
    chance = {
        "accuracy": 50.0,
        "accuracy_plus": 25.0,
        "score": 75.0,
        "perception": 750.0,
        "cognition": 300.0,
        "sum": 1050.0,
        "percent_of_2800": 37.5,
    }
    main = ("total", "perception")

    def load(self, files: SuiteFiles, protocol: Protocol) -> Iterator[Item]:
        root = next((folder for folder in _FOLDERS if is_folder(files.folder / folder / "existence")), "")
        for task in (task for tasks in TASKS.values() for task in tasks):
            found = files.find(f"{root}{task}/questions_answers_YN/*.txt", f"{root}{task}/*.txt")
            for path in found:
                asked = [line.rsplit("\t", 1) for line in files.text(path).splitlines() if line.strip()]
                labels = [parts[-1].strip().lower().replace(".", "") for parts in asked]
                if len(asked) != 2 or any(len(parts) != 2 for parts in asked) or not {"yes", "no"} >= set(labels):
                    expected = "expected two lines, each a question, a tab and Yes or No"
                    raise UserError(f"{path}: {expected}; fetch it again: {self.fetch}")
                stems = [f"{root}{task}/{folder}{path.stem}" for folder in ("images/", "")]
                picture = files.picture(*(f"{stem}.{ending}" for stem in stems for ending in ("png", "jpeg", "jpg")))
                prompts = [text.strip().replace(_ENDING, "") + SHORT_ANSWER for text, _ in asked]
                questions = tuple(two_way_question(prompt, picture, protocol) for prompt in prompts)
                yield Item(f"{task}/{path.stem}", (task,), questions, labels)

    def count(self, item: Item, answers: Sequence[Answer], protocol: Protocol) -> Counts:
        assert isinstance(item.expected, list)
        found = [mme_answer(answer) for answer in answers]
        right = [answer == label for answer, label in zip(found, item.expected, strict=True)]
        return {
            "accuracy": sum(right) / len(right),
            "accuracy_plus": all(right),
            "yes_share": found.count("yes") / len(found),
        }

    def metrics(self, counts: KindCounts) -> Metrics:
        found = {kind: percent_of_items(sums) for kind, sums in counts.items()}
        for of_task in found.values():
            of_task["score"] = of_task["accuracy"] + of_task["accuracy_plus"]
        zero = np.zeros_like(next(iter(found.values()))["score"])
        total = {}
        for name, tasks in TASKS.items():
            scores = [found[task]["score"] for task in tasks if task in found]
            # A task that a resampled set lacks has the mean of the others.
            total[name] = len(scores) * mean_of_drawn(scores) if scores else zero
        total["sum"] = total["perception"] + total["cognition"]
        total["percent_of_2800"] = total["sum"] / 28
        return {**found, "total": total}


def mme_answer(answer: Answer) -> str:
    """What an answer says: "yes", "no" or "other", from its first four letters; "not sure" is a no.

    Source: the makers' `calculation.py`, `parse_pred_ans`.
    """
    if not isinstance(answer, str):
        return {True: "yes", False: "no", None: "other"}[first_is_likelier(answer)]
    text = answer.lower().strip().replace(".", "")
    if len(text) == 1:
        return {"y": "yes", "n": "no"}.get(text, "other")
    return next((word for word in ("yes", "no") if word in text[:4]), "other")
