"""SADE: references that differ in one respect from the right one, by branch of compositionality. Ma et al., 2024."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from stages.evaluation.suites.captions import CAPTION_PROTOCOLS, caption_questions, caption_scores, is_best
from stages.evaluation.suites.suite import (
    Answer,
    Counts,
    Item,
    KindCounts,
    Metrics,
    Protocol,
    Suite,
    percent_of_items,
    with_average,
)
from stages.evaluation.suites.suite_files import SuiteFiles, fields
from storage.errors import UserError


class Sade(Suite):
    """Recall@1 of each branch and source, of each branch as the mean over its sources, `average` over branches.

    A reference's score is the mean log-probability of its tokens (VisualGPTScore). `chance` is one by the number of
    references. Which branches others average is not published: quote branches. The Comprehensive branch is
    Winoground, whose suite scores it. The makers' own file layout is not published either; ours is a line a question.
    """

    name = "sade"
    source = "TeleeMa/SADE"
    fetch = (
        "*.jsonl, a line a question: id, branch, source, image, references, answer_index, optionally box (left, top, "
        "right, bottom in pixels); image is a path within the folder. The data are linked in github.com/TeleeMa/SADE"
    )
    protocols = ("mean_likelihood", *(protocol for protocol in CAPTION_PROTOCOLS if protocol != "mean_likelihood"))
    main = ("average", "recall_at_1")
    all_kinds = ("Relation", "Attribute", "Atomic", "Negate", "Content")

    def load(self, files: SuiteFiles, protocol: Protocol) -> Iterator[Item]:
        for path in files.find("*.jsonl", "data/*.jsonl"):
            for number, record in enumerate(files.rows(path)):
                where = f"{path}, record {number}"
                key, branch, source, image = fields(record, where, id=str, branch=str, source=str, image=str)
                references, answer = fields(record, where, references=list, answer_index=int)
                if len(references) < 2 or any(type(one) is not str for one in references):
                    raise UserError(f"{where}: references {references!r:.200}; expected two texts or more")
                if "/" in branch:
                    raise UserError(f"{where}: branch {branch!r:.100}; expected a name without a slash")
                if not 0 <= answer < len(references):
                    raise UserError(f"{where}: answer_index {answer}; expected 0 to {len(references) - 1}")
                picture = replace(files.picture(image), crop=_box(record.get("box"), where))
                questions = caption_questions(references, [picture], protocol)
                yield Item(key, (f"{branch}/{source}", branch), questions, [answer, len(references)], unit=image)

    def count(self, item: Item, answers: Sequence[Answer], protocol: Protocol) -> Counts:
        assert isinstance(item.expected, list)
        answer, num_references = item.expected
        (scores,) = caption_scores(answers, num_references, protocol)
        return {"recall_at_1": is_best(scores, answer), "chance": 1 / num_references}

    def metrics(self, counts: KindCounts) -> Metrics:
        found = {kind: percent_of_items(sums) for kind, sums in counts.items() if "/" in kind}
        branches = {}
        for branch in dict.fromkeys(kind.partition("/")[0] for kind in found):
            sources = [kind for kind in found if kind.partition("/")[0] == branch]
            branches[branch] = with_average(found, sources)["average"]
        return {**found, **with_average(branches)}


def _box(box: object, where: str) -> tuple[int, int, int, int] | None:
    if box is None:
        return None
    if not isinstance(box, list) or len(box) != 4 or any(type(edge) is not int for edge in box):
        raise UserError(f"{where}: box {box!r:.100}; expected left, top, right, bottom in pixels")
    left, top, right, bottom = box
    if left >= right or top >= bottom:
        raise UserError(f"{where}: box {box} is empty; expected left, top, right, bottom in pixels")
    return left, top, right, bottom
