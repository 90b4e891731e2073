"""SugarCrepe: a caption and a hard negative of seven kinds. Hsieh et al., 2023."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from stages.evaluation.suites.captions import PAIR_CHANCE, PAIR_PROTOCOLS, pair_counts, pair_questions
from stages.evaluation.suites.pictures import SuitePicture
from stages.evaluation.suites.suite import Answer, Counts, Item, Protocol, Suite
from stages.evaluation.suites.suite_files import SuiteFiles, fields
from storage.errors import UserError
from storage.regular_files import is_regular

_TABLES: Final = ("*.parquet", "*/*.parquet", "*/*/*.parquet", "*/snapshots/*/data/*.parquet")
"""Of copies of the Hub: the folder is one, or has a folder for each, or is the Hub's cache."""
_SAVED: Final = ("state.json", "*/state.json", "*/*/state.json")


class SugarCrepe(Suite):
    """Each kind's accuracy; `average` is the unweighted mean over kinds, as CompoDistill's authors report it.

    A tie is a miss. With `--protocol compodistill` each pair is asked in both orders, which are also reported apart.
    Read the accuracy beside that with `--blind`: many negatives are found without the picture.
    """

    name = "sugarcrepe"
    source = "RAIVNLab/sugar-crepe, main_eval.py; protocol compodistill: ptkjw1997/CompoDistill, eval_sugarcrepe.py"
    fetch = (
        "data/*.json from github.com/RAIVNLab/sugar-crepe; val2017/ is COCO's val2017.zip from cocodataset.org. Or "
        "HuggingFaceM4/SugarCrepe_{kind} from the Hub, which hold their images, each in a folder of this name"
    )
    protocols = PAIR_PROTOCOLS
    chance = PAIR_CHANCE
    main = ("average", "accuracy")
    all_kinds = ("add_att", "add_obj", "replace_att", "replace_obj", "replace_rel", "swap_att", "swap_obj")

    def load(self, files: SuiteFiles, protocol: Protocol) -> Iterator[Item]:
        copies = _copies(files, self.all_kinds)
        for path in (files.find_any if copies else files.find)("data/*.json", "*.json"):
            if copies and (path.stem in copies or path.stem not in self.all_kinds):
                continue  # the copy stands for it, or it describes a table
            kind, entries = path.stem, files.json(path)
            if not isinstance(entries, dict) or not entries:
                raise UserError(f"{path}: expected an object of pairs, key to pair, with at least one")
            for key, entry in entries.items():
                where = f"{path}, pair {key!r}"
                filename, caption, negative = fields(entry, where, filename=str, caption=str, negative_caption=str)
                picture = files.picture(f"val2017/{filename}", f"images/{filename}")
                questions = pair_questions(caption, negative, picture, protocol)
                yield Item(f"{kind}/{key}", (kind,), questions, None, unit=filename)
        for kind, tables in copies.items():
            yield from _of_copy(files, kind, tables, protocol)

    def count(self, item: Item, answers: Sequence[Answer], protocol: Protocol) -> Counts:
        return pair_counts(answers, protocol)


def _copies(files: SuiteFiles, kinds: Sequence[str]) -> dict[str, list[Path]]:
    """The tables of each kind of which the folder has a copy of the Hub, or of all in folders of their own.

    Raises:
        UserError: If no name says of which kind a table is, or there are two copies of one kind.
    """
    tables = [*files.find_any(*_TABLES), *(path.parent for path in files.find_any(*_SAVED))]
    found: dict[str, list[Path]] = {}
    for path in tables:
        kind = _kind_of(files, path, kinds)
        if (first := found.setdefault(kind, [path])[0]) is not path:
            if first.parent != path.parent or path.is_dir():
                raise UserError(f"{first} and {path} are both of {kind}; expected one copy of it, remove the other")
            found[kind].append(path)
    return found


def _kind_of(files: SuiteFiles, path: Path, kinds: Sequence[str]) -> str:
    """The kind that is named nearest to a table: by its file, its folders, or the data set that was saved there."""
    names = [*reversed(path.relative_to(files.folder).parts)]
    # Above the folder a name counts only where that is a part of a data set's own, as in the Hub's cache.
    root = files.folder.absolute()
    names.append(root.name)
    if root.name == "data":
        root = root.parent
        names.append(root.name)
    if root.parent.name == "snapshots":
        names.append(root.parent.parent.name)
    info = files.json(path / "dataset_info.json") if is_regular(path / "dataset_info.json") else None
    if isinstance(info, dict):
        names.insert(0, str(info.get("dataset_name")))
    named = re.compile(rf"(?<![a-z])({'|'.join(kinds)})(?![a-z])", re.IGNORECASE)
    for name in names:
        if found := {str(match).lower() for match in named.findall(name)}:
            if len(found) == 1:
                return found.pop()
            raise UserError(f"{path}: {name!r:.100} names several kinds; expected one")
    raise UserError(
        f"no name says of which kind {path} is; name its folder as the Hub does, such as SugarCrepe_{kinds[0]}, with "
        f"one of {', '.join(kinds)}"
    )


def _of_copy(files: SuiteFiles, kind: str, tables: Sequence[Path], protocol: Protocol) -> Iterator[Item]:
    """The pairs of one kind in a copy of the Hub; the fitting caption is the first."""
    number = 0
    for path in tables:
        for row, record in enumerate(files.rows(path)):
            where = f"{path}, row {row}"
            picture, captions = fields(record, where, image=SuitePicture, tested_labels=list)
            if [type(caption) for caption in captions] != [str, str]:
                raise UserError(f"{where}: tested_labels {captions!r:.200}; expected the fitting caption and the other")
            questions = pair_questions(captions[0], captions[1], picture, protocol)
            yield Item(f"{kind}/{number}", (kind,), questions, None, unit=str(picture.source))
            number += 1
