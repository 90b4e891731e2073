"""Reefknot: relations in the picture, asked by yes or no, with four options, and freely. Zheng et al., 2024."""

import re
from collections.abc import Iterator, Sequence
from typing import Any, Final

from stages.evaluation.suites.letters import leading_or_lone_letter
from stages.evaluation.suites.suite import Answer, Counts, Item, KindCounts, Metrics, Protocol, Question, Suite, ratio
from stages.evaluation.suites.suite_files import SuiteFiles, fields
from stages.evaluation.suites.yes_no import (
    YES_NO_PROTOCOLS,
    answered_yes,
    f1_of_always_yes,
    two_way_question,
    yes_no_counts,
    yes_no_metrics,
    yes_or_no_label,
)
from storage.errors import UserError

_TASKS: Final = {"yesno": "YESNO", "multichoice": "Multichoice", "vqa": "VQA"}
_TOKENS: Final = {"yesno": 2, "multichoice": 16, "vqa": 32}
_LETTERS: Final = "ABCD"
_FORMAT: Final = re.compile(r"following format:\s*(.*?)<relation>(.*)", re.DOTALL)


class Reefknot(Suite):
    """Share of wrong answers a task and relation type, and for the task of yes and no F1 with "yes" as the positive.

    `r_score` is the mean over tasks of the share of right answers. The makers judge the free answers of `vqa` by a
    model of entailment; here the relation has to be in the answer, word by word, so that their R_score of three tasks
    is not this `r_score_with_vqa_by_words`. Which F1 other papers report is not said; it is that of `yesno` here.
    """

    name = "reefknot"
    source = "JackChen-seu/Reefknot, its data and infer_LLaVA_yesandno.py; parser of yes and no: POPE's"
    fetch = (
        "Dataset/{YESNO,Multichoice,VQA}.jsonl from github.com/JackChen-seu/Reefknot; VG_100K/ and VG_100K_2/ are the "
        "images of Visual Genome from homes.cs.washington.edu/~ranjay/visualgenome"
    )
    protocols = YES_NO_PROTOCOLS
    chance = {"accuracy": 50.0}
    main = ("yesno", "f1")

    def load(self, files: SuiteFiles, protocol: Protocol) -> Iterator[Item]:
        for task, name in _TASKS.items():
            if task != "yesno" and protocol == "yes_over_no":
                continue
            path = files.first(f"Dataset/{name}.jsonl", f"{name}.jsonl")
            for position, record in enumerate(files.rows(path)):
                yield _item(files, task, position, record, f"{path}, record {position}", protocol)

    def count(self, item: Item, answers: Sequence[Answer], protocol: Protocol) -> Counts:
        (answer,), task, expected = answers, item.kinds[0], str(item.expected)
        if task == "yesno":
            is_yes = expected == "yes"
            said_yes = answered_yes(answer, is_yes)
            return {**yes_no_counts(said_yes, is_yes), "hallucination_rate": said_yes != is_yes}
        assert isinstance(answer, str)
        if task == "multichoice":
            return {"hallucination_rate": leading_or_lone_letter(answer, _LETTERS) != expected}
        return {"hallucination_rate": re.search(rf"\b{re.escape(expected)}\b", answer.lower()) is None}

    def metrics(self, counts: KindCounts) -> Metrics:
        found: dict[str, dict[str, Any]] = {}
        for kind, sums in counts.items():
            found[kind] = yes_no_metrics(sums) if kind.startswith("yesno") else {}
            found[kind]["hallucination_rate"] = 100 * ratio(sums["hallucination_rate"], sums["items"])
        rights = {task: 100 - found[task]["hallucination_rate"] for task in _TASKS if task in found}
        if {"yesno", "multichoice"} <= rights.keys():
            two = (rights["yesno"] + rights["multichoice"]) / 2
            found["all"] = {"r_score_without_vqa": two}
            if "vqa" in rights:
                found["all"]["r_score_with_vqa_by_words"] = (2 * two + rights["vqa"]) / 3
        return found

    def metrics_of_always_yes(self, counts: KindCounts) -> Metrics:
        return f1_of_always_yes(self, counts)


def _item(files: SuiteFiles, task: str, position: int, record: dict[str, Any], where: str, protocol: Protocol) -> Item:
    image, prompt, label, relation = fields(
        record, where, image_id=(str, int), query_prompt=str, label=str, relation_type=str
    )
    picture = files.picture(f"VG_100K/{image}.jpg", f"VG_100K_2/{image}.jpg", f"images/{image}.jpg")
    question = (
        two_way_question(prompt, picture, protocol, max_new_tokens=_TOKENS[task])
        if task == "yesno"
        else Question(prompt, (picture,), max_new_tokens=_TOKENS[task])
    )
    expected = _expected(task, prompt, label, where)
    return Item(f"{task}/{position}", (task, f"{task}_{relation}"), (question,), expected, unit=str(image))


def _expected(task: str, prompt: str, label: str, where: str) -> str:
    """What is right: yes or no, a letter, or the words of a relation."""
    if task == "yesno":
        return yes_or_no_label(label, where)
    if task == "vqa":
        if not (relation := _relation(prompt, label)):
            raise UserError(f"{where}: label {label!r:.100} names no relation; expected a sentence as in the question")
        return relation
    if (letter := label.strip().rstrip(".").upper()) not in tuple(_LETTERS):
        raise UserError(f"{where}: label {label!r:.100}; expected one of {', '.join(_LETTERS)}")
    return letter


def _relation(prompt: str, label: str) -> str:
    """What stands in a label where the format in its question has `<relation>`; the whole label where it has none."""
    sentence = label.strip().rstrip(".").lower()
    if found := _FORMAT.search(prompt):
        before, behind = (part.strip(" .").lower() for part in found.groups())
        sentence = sentence.removeprefix(before).removesuffix(behind)
    return sentence.strip()
