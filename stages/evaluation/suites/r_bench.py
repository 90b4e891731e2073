"""R-Bench: whether a relation holds in the picture, asked of whole images or of two marked objects. Wu et al., 2024."""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Final

from stages.evaluation.suites.pictures import Mark, MaskMark, PictureFile, SuitePicture, picture_of_cell
from stages.evaluation.suites.suite import Answer, Counts, Item, KindCounts, Metrics, Protocol, Suite, with_average
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

NUM_SUBSETS: Final = 5
EPSILON: Final = 1e-5
"""What the makers' script adds to denominators."""
_FOLDERS: Final = ("data_filterd/", "dataset/", "")
_TOKENS: Final = 128
_LEVELS: Final = ("image", "instance")
_NO_SUBSET: Final = "no_subset"
"""The kind of questions of the Hub's copy."""


class RBench(Suite):
    """F1 and its parts on each of five subsets of the questions; `average` is their mean, which the makers report.

    A question may belong to several subsets; one that belongs to none is not asked. The parser takes "NO" for a yes.
    The Hub's copy (MM-Hallu/R-Bench) does not have the subsets: all its questions of the level are one kind.
    """

    source = "mrwu-mac/R-Bench, eval.py, utils.py and demos/eval_rbench.py"
    protocols = YES_NO_PROTOCOLS
    chance = {"accuracy": 50.0}
    main = ("average", "f1")
    all_kinds = tuple(f"subset_{number}" for number in range(1, NUM_SUBSETS + 1))
    questions_file: ClassVar[str]
    subset_files: ClassVar[str]
    """With a place for the number of the subset."""

    def load(self, files: SuiteFiles, protocol: Protocol) -> Iterator[Item]:
        if tables := files.tables():
            yield from self._of_copy(files, tables, protocol)
            return
        path = files.first(*(folder + self.questions_file for folder in _FOLDERS))
        folder = path.parent.relative_to(files.folder)
        numbers = range(1, NUM_SUBSETS + 1)
        subsets = files.need(*((folder / self.subset_files.format(number)).as_posix() for number in numbers))
        kinds: dict[int, tuple[str, ...]] = {}
        for number, ids in zip(numbers, subsets, strict=True):
            listed = files.records(ids)
            if odd := [key for key in listed if not isinstance(key, int)]:
                raise UserError(f"{ids}: {odd[0]!r:.100} is no question's id; expected a list of integers")
            for key in dict.fromkeys(listed):
                kinds[key] = (*kinds.get(key, ()), f"subset_{number}")
        for position, record in enumerate(files.records(path)):
            where = f"{path}, question {position}"
            key, image, text, label = fields(record, where, question_id=int, image=str, text=str, label=str)
            if key in kinds:
                picture = files.picture(f"images/{image}", f"validation/{image}")
                prompt, shown = self.shown(text, picture, record, where, path.parent)
                question = two_way_question(prompt, shown, protocol, max_new_tokens=_TOKENS)
                yield Item(str(key), kinds[key], (question,), yes_or_no_label(label, where), unit=image)

    def _of_copy(self, files: SuiteFiles, tables: Sequence[Path], protocol: Protocol) -> Iterator[Item]:
        """The questions of this level in the Hub's copy, which does not say of which subsets they are."""
        rows = ((f"{path}, row {at}", path, row) for path in tables for at, row in enumerate(files.rows(path)))
        for where, path, record in rows:
            key, text, label, level = fields(record, where, question_id=(int, str), question=str, label=str, level=str)
            if level.split("-")[0] not in _LEVELS:
                raise UserError(f"{where}: level {level!r:.100}; expected {' or '.join(_LEVELS)}")
            if level.split("-")[0] == self.questions_file.split("-")[0]:
                picture = picture_of_cell(f"{where}, image", record.get("image"))
                prompt, shown = self.shown(text, picture, record, where, path if path.is_dir() else path.parent)
                question = two_way_question(prompt, shown, protocol, max_new_tokens=_TOKENS)
                label = yes_or_no_label(label, where)
                yield Item(str(key), (_NO_SUBSET,), (question,), label, unit=str(picture.source))

    @abstractmethod
    def shown(
        self, text: str, picture: SuitePicture, record: dict[str, Any], where: str, folder: Path
    ) -> tuple[str, SuitePicture]:
        """A question and its picture as the model gets them."""

    def count(self, item: Item, answers: Sequence[Answer], protocol: Protocol) -> Counts:
        is_yes = item.expected == "yes"
        return yes_no_counts(answered_yes(answers[0], is_yes), is_yes)

    def metrics(self, counts: KindCounts) -> Metrics:
        return with_average({kind: yes_no_metrics(counts[kind], EPSILON) for kind in sorted(counts)})

    def metrics_of_always_yes(self, counts: KindCounts) -> Metrics:
        return f1_of_always_yes(self, counts)


class RBenchImage(RBench):
    """R-Bench of whole images."""

    name = "r-bench-image"
    fetch = (
        "data_filterd/image-level_filterd.json and data_filterd/nocaps_image-level_rel_ids_{1..5}.json from the data "
        "of github.com/mrwu-mac/R-Bench; images/ is the validation set of Open Images v4. Or the Parquet files of "
        "MM-Hallu/R-Bench from the Hub, which lack the subsets"
    )
    questions_file = "image-level_filterd.json"
    subset_files = "nocaps_image-level_rel_ids_{}.json"

    def shown(
        self, text: str, picture: SuitePicture, record: dict[str, Any], where: str, folder: Path
    ) -> tuple[str, SuitePicture]:
        return text, picture


class RBenchBoxes(RBench):
    """R-Bench of two objects in boxes, the subject's red and the object's green, named in the question."""

    name = "r-bench-boxes"
    fetch = (
        "data_filterd/instance-level_filterd.json and data_filterd/instance-level_ids_{1..5}.json from the data of "
        "github.com/mrwu-mac/R-Bench; images/ is the validation set of Open Images v4. Or the Parquet files of "
        "MM-Hallu/R-Bench from the Hub, which lack the subsets"
    )
    questions_file = "instance-level_filterd.json"
    subset_files = "instance-level_ids_{}.json"

    def shown(
        self, text: str, picture: SuitePicture, record: dict[str, Any], where: str, folder: Path
    ) -> tuple[str, SuitePicture]:
        marks = Mark(_box(record, where, "sub_box"), "red"), Mark(_box(record, where, "obj_box"), "green")
        return _named(text, record, where, "bounding box"), SuitePicture(picture.source, marks=marks)


class RBenchMasks(RBench):
    """R-Bench of two objects under masks, the subject's red and the object's green, named in the question."""

    name = "r-bench-masks"
    fetch = (
        "data_filterd/instance-level_filterd.json, data_filterd/instance-level_ids_{1..5}.json and "
        "data_filterd/instance_mask/ from the data of github.com/mrwu-mac/R-Bench; images/ is the validation set of "
        "Open Images v4"
    )
    questions_file = "instance-level_filterd.json"
    subset_files = "instance-level_ids_{}.json"

    def shown(
        self, text: str, picture: SuitePicture, record: dict[str, Any], where: str, folder: Path
    ) -> tuple[str, SuitePicture]:
        mask = PictureFile(folder / "instance_mask" / f"{record['question_id']}.png")
        marks = MaskMark(mask, 1, (250, 0, 45, 120)), MaskMark(mask, 2, (100, 250, 0, 120))
        return _named(text, record, where, "mask"), SuitePicture(picture.source, marks=marks)


def _named(text: str, record: dict[str, Any], where: str, mark: str) -> str:
    """The question with the mark behind the name of each object, wherever the name stands, as the makers replace it."""
    subject, other = (name.lower() for name in fields(record, where, subject=str, object=str))
    if not (subject.strip() and other.strip()):
        # The makers' replacement would put the words between all letters of the question.
        raise UserError(
            f"{where}: subject {subject!r:.100} and object {other!r:.100}; expected the names of two things"
        )
    return text.replace(subject, f"{subject} in red {mark}").replace(other, f"{other} in green {mark}")


def _box(record: dict[str, Any], where: str, name: str) -> tuple[float, float, float, float]:
    (box,) = fields(record, where, **{name: list})
    are_parts = all(isinstance(edge, int | float) and 0 <= edge <= 1 for edge in box)
    if len(box) != 4 or not are_parts or box[0] > box[2] or box[1] > box[3]:
        raise UserError(f"{where}: {name} is {box!r:.100}; expected left, top, right, bottom as parts of the image")
    left, top, right, bottom = map(float, box)
    return left, top, right, bottom
