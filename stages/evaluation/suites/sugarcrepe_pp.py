"""SugarCrepe++: two captions that say the same, and a negative that does not. Dumpala et al., 2024."""

from collections.abc import Iterator, Sequence

from stages.evaluation.suites.captions import (
    PAIR_PROTOCOLS,
    caption_questions,
    caption_scores,
    letter_questions,
    letters_right,
    share_unread,
)
from stages.evaluation.suites.suite import Answer, Counts, Item, Protocol, Suite
from stages.evaluation.suites.suite_files import SuiteFiles, fields


class SugarCrepePlusPlus(Suite):
    """ITT: both fitting captions score above the negative; Image-P1-Neg and Image-P2-Neg: one of them does.

    `average` is the unweighted mean over kinds. With `--protocol compodistill`, our choice, each fitting caption and
    the negative are asked in both orders; ITT is right in an order when both pairs are, and their mean is reported.
    A model that always answers A has 50 of it, so `ITT_all_orders` is that of pairs which are right in both. Text
    similarity alone (the makers' TOT) is not asked: a generative model has no embedding of a sentence.
    """

    name = "sugarcrepe_pp"
    source = "Sri-Harsha/scpp, VLMs/test_BLIP.py"
    fetch = (
        "data/*.json from github.com/Sri-Harsha/scpp, or the JSON files of Aman-J/SugarCrepe_pp on the Hub; val2017/ "
        "is COCO's val2017.zip from cocodataset.org"
    )
    protocols = PAIR_PROTOCOLS
    main = ("average", "ITT")
    all_kinds = ("replace_att", "replace_obj", "replace_rel", "swap_att", "swap_obj")

    def load(self, files: SuiteFiles, protocol: Protocol) -> Iterator[Item]:
        for path in files.find("data/*.json", "*.json"):
            for number, record in enumerate(files.rows(path)):
                where = f"{path}, record {number}"
                types = {"filename": str, "caption": str, "caption2": str, "negative_caption": str}
                filename, caption, caption2, negative = fields(record, where, **types)
                picture = files.picture(f"val2017/{filename}", f"images/{filename}")
                questions = (
                    (*letter_questions(caption, negative, picture), *letter_questions(caption2, negative, picture))
                    if protocol == "compodistill"
                    else caption_questions([caption, caption2, negative], [picture], protocol)
                )
                yield Item(f"{path.stem}/{number}", (path.stem,), questions, None, unit=filename)

    def count(self, item: Item, answers: Sequence[Answer], protocol: Protocol) -> Counts:
        if protocol == "compodistill":
            first, second = letters_right(answers[:2]), letters_right(answers[2:])
            both = [one and two for one, two in zip(first, second, strict=True)]
            return {
                "ITT": sum(both) / 2,
                "ITT_first_order": both[0],
                "ITT_second_order": both[1],
                "ITT_all_orders": all(both),
                "Image-P1-Neg": sum(first) / 2,
                "Image-P2-Neg": sum(second) / 2,
                "unread": share_unread(answers),
            }
        ((score, score2, negative),) = caption_scores(answers, 3, protocol)
        return {
            "ITT": score > negative and score2 > negative,
            "Image-P1-Neg": score > negative,
            "Image-P2-Neg": score2 > negative,
        }

    def chance_of(self, kind: str, metric: str, protocol: Protocol) -> float | None:
        if metric == "unread":
            return None
        if metric.startswith("Image-"):
            return 50.0
        if protocol == "compodistill":
            return 6.25 if metric == "ITT_all_orders" else 25.0
        return 100 / 3
