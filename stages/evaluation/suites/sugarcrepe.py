"""SugarCrepe: a caption and a hard negative of seven kinds. Hsieh et al., 2023."""

from collections.abc import Iterator, Sequence

from stages.evaluation.suites.captions import (
    CAPTION_PROTOCOLS,
    caption_questions,
    caption_scores,
    letter_questions,
    letters_right,
)
from stages.evaluation.suites.suite import Answer, Counts, Item, Protocol, Suite
from stages.evaluation.suites.suite_files import SuiteFiles, fields
from storage.errors import UserError


class SugarCrepe(Suite):
    """Each kind's accuracy; `average` is the unweighted mean over kinds, as CompoDistill's authors report it.

    A tie is a miss. With `--protocol compodistill` each pair is asked in both orders, which are also reported apart.
    """

    name = "sugarcrepe"
    source = "RAIVNLab/sugar-crepe, main_eval.py; protocol compodistill: ptkjw1997/CompoDistill, eval_sugarcrepe.py"
    fetch = "data/*.json from github.com/RAIVNLab/sugar-crepe; val2017/ is COCO's val2017.zip from cocodataset.org"
    protocols = (*CAPTION_PROTOCOLS, "compodistill")
    chance = {"accuracy": 50.0, "accuracy_first_order": 50.0, "accuracy_second_order": 50.0}
    main = ("average", "accuracy")

    def load(self, files: SuiteFiles, protocol: Protocol) -> Iterator[Item]:
        for path in files.find("data/*.json", "*.json"):
            kind, entries = path.stem, files.json(path)
            if not isinstance(entries, dict) or not entries:
                raise UserError(f"{path}: expected an object of pairs, key to pair, with at least one")
            for key, entry in entries.items():
                where = f"{path}, pair {key!r}"
                filename, caption, negative = fields(entry, where, filename=str, caption=str, negative_caption=str)
                picture = files.picture(f"val2017/{filename}", f"images/{filename}")
                questions = (
                    letter_questions(caption, negative, picture)
                    if protocol == "compodistill"
                    else caption_questions([caption, negative], [picture], protocol)
                )
                yield Item(f"{kind}/{key}", (kind,), questions, None, unit=filename)

    def count(self, item: Item, answers: Sequence[Answer], protocol: Protocol) -> Counts:
        if protocol == "compodistill":
            first, second = letters_right(answers)
            return {
                "accuracy": (first + second) / 2,
                "accuracy_first_order": first,
                "accuracy_second_order": second,
            }
        ((fitting, negative),) = caption_scores(answers, 2, protocol)
        return {"accuracy": fitting > negative}
