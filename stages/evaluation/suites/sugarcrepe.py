"""SugarCrepe: a caption and a hard negative of seven kinds. Hsieh et al., 2023."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from stages.evaluation.suites.captions import PAIR_CHANCE, PAIR_PROTOCOLS, pair_counts, pair_questions
from stages.evaluation.suites.pictures import SuitePicture
from stages.evaluation.suites.suite import Answer, Counts, Item, Protocol, Suite
from stages.evaluation.suites.suite_files import SuiteFiles, fields
from storage.errors import UserError


class SugarCrepe(Suite):
    """Each kind's accuracy; `average` is the unweighted mean over kinds, as CompoDistill's authors report it.

    A tie is a miss. With `--protocol compodistill` each pair is asked in both orders, which are also reported apart.
    Read the accuracy beside that with `--blind`: many negatives are found without the picture.
    """

    name = "sugarcrepe"
    source = "RAIVNLab/sugar-crepe, main_eval.py; protocol compodistill: ptkjw1997/CompoDistill, eval_sugarcrepe.py"
    fetch = (
        "data/*.json from github.com/RAIVNLab/sugar-crepe; val2017/ is COCO's val2017.zip from cocodataset.org. "
        "HuggingFaceM4/SugarCrepe_swap_obj on the Hub, which holds its images, is read in place of swap_obj.json"
    )
    protocols = PAIR_PROTOCOLS
    chance = PAIR_CHANCE
    main = ("average", "accuracy")
    all_kinds = ("add_att", "add_obj", "replace_att", "replace_obj", "replace_rel", "swap_att", "swap_obj")

    def load(self, files: SuiteFiles, protocol: Protocol) -> Iterator[Item]:
        tables = files.tables()
        for path in (files.find_any if tables else files.find)("data/*.json", "*.json"):
            if tables and path.stem not in self.all_kinds:
                continue  # it describes the table
            kind, entries = path.stem, files.json(path)
            if not isinstance(entries, dict) or not entries:
                raise UserError(f"{path}: expected an object of pairs, key to pair, with at least one")
            for key, entry in entries.items():
                where = f"{path}, pair {key!r}"
                filename, caption, negative = fields(entry, where, filename=str, caption=str, negative_caption=str)
                picture = files.picture(f"val2017/{filename}", f"images/{filename}")
                questions = pair_questions(caption, negative, picture, protocol)
                yield Item(f"{kind}/{key}", (kind,), questions, None, unit=filename)
        for path in tables:
            yield from _swap_obj(files, path, protocol)

    def count(self, item: Item, answers: Sequence[Answer], protocol: Protocol) -> Counts:
        return pair_counts(answers, protocol)


def _swap_obj(files: SuiteFiles, path: Path, protocol: Protocol) -> Iterator[Item]:
    """The copy of this kind with 246 pairs that CompoDistill's authors used; the fitting caption is the first."""
    for number, record in enumerate(files.rows(path)):
        where = f"{path}, row {number}"
        picture, captions = fields(record, where, image=SuitePicture, tested_labels=list)
        if [type(caption) for caption in captions] != [str, str]:
            raise UserError(f"{where}: tested_labels {captions!r:.200}; expected the fitting caption and the other")
        questions = pair_questions(captions[0], captions[1], picture, protocol)
        yield Item(f"swap_obj/{number}", ("swap_obj",), questions, None, unit=str(picture.source))
