"""What'sUp: where one object is to another, asked of the same two objects in four places. Kamath et al., 2023."""

from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Final

from stages.evaluation.suites.captions import CAPTION_PROTOCOLS, caption_questions, caption_scores, is_best
from stages.evaluation.suites.suite import (
    Answer,
    Counts,
    Item,
    KindCounts,
    Metrics,
    Protocol,
    Suite,
    ratio,
    with_average,
)
from stages.evaluation.suites.suite_files import SuiteFiles, fields
from storage.errors import UserError

_FILES: Final = {
    "A": "controlled_images_dataset.json",
    "B": "controlled_clevr_dataset.json",
    "coco_one": "coco_qa_one_obj.json",
    "coco_two": "coco_qa_two_obj.json",
    "vg_one": "vg_qa_one_obj.json",
    "vg_two": "vg_qa_two_obj.json",
}
_CONTROLLED: Final = {"A": "controlled_images", "B": "controlled_clevr"}
_PAIRS: Final = (("left", "right"), ("on", "under"), ("in-front", "behind"))


class WhatsUp(Suite):
    """`accuracy` of pictures, with four captions (A, B) or two (COCO-QA, VG-QA); of A and B also `pair` and `set`.

    Pair: left and right both right, and on and under (A) or in front and behind (B); set: all four pictures of two
    objects. They show who answers the same whatever the picture. The makers count a tie as a hit, here it is a miss.
    """

    name = "whatsup"
    source = "amitakamath/whatsup_vlms, dataset_zoo/aro_datasets.py"
    fetch = (
        f"any of {', '.join(_FILES.values())} with controlled_images/, "
        "controlled_clevr/, COCO's val2017/ and vg_images/; their addresses are in github.com/amitakamath/whatsup_vlms"
    )
    protocols = CAPTION_PROTOCOLS
    main = ("average", "accuracy")
    all_kinds = tuple(_FILES)

    def load(self, files: SuiteFiles, protocol: Protocol) -> Iterator[Item]:
        kinds = {name: kind for kind, name in _FILES.items()}
        for path in files.find(*kinds):
            kind = kinds[path.name]
            yield from (_sets if kind in _CONTROLLED else _pictures)(files, kind, path, protocol)

    def count(self, item: Item, answers: Sequence[Answer], protocol: Protocol) -> Counts:
        kind, places = item.kinds[0], item.expected
        assert isinstance(places, list)
        scores = caption_scores(answers, 4 if kind in _CONTROLLED else 2, protocol)
        right = [is_best(of_picture, 0) for of_picture in scores]
        counts = {"pictures": len(right), "accuracy": sum(right)}
        if kind not in _CONTROLLED:
            return counts
        at = dict(zip(places, right, strict=True))
        pairs = sum(at.get(first, False) and at.get(second, False) for first, second in _PAIRS)
        return counts | {"pair": pairs, "set": sum(at.values()) == 4}

    def metrics(self, counts: KindCounts) -> Metrics:
        found = {}
        for kind, sums in counts.items():
            pictures = sums["pictures"]
            found[kind] = {"accuracy": 100 * ratio(sums["accuracy"], pictures)}
            if kind in _CONTROLLED:
                found[kind]["pair"] = 100 * ratio(sums["pair"], pictures / 2)
                found[kind]["set"] = 100 * ratio(sums["set"], pictures / 4)
        return with_average(found)

    def chance_of(self, kind: str, metric: str, protocol: Protocol) -> float | None:
        if kind in _CONTROLLED:
            return {"accuracy": 25.0, "pair": 100 / 16, "set": 100 / 256}[metric]
        return 50.0 if kind in _FILES else None


def _sets(files: SuiteFiles, kind: str, path: Path, protocol: Protocol) -> Iterator[Item]:
    """An item is the pictures of two objects; the file's name says which, and where: `mug_left_of_chair.jpeg`."""
    sets: dict[tuple[str, str], list[tuple[str, str, list[str]]]] = {}
    for number, record in enumerate(files.rows(path)):
        where = f"{path}, record {number}"
        image, captions = fields(record, where, image_path=str, caption_options=list)
        if len(words := PurePosixPath(image).stem.split("_")) < 3:
            raise UserError(f"{where}: image_path {image!r:.200}; expected a name as mug_left_of_chair.jpeg")
        if len(captions) != 4 or any(type(one) is not str for one in captions):
            raise UserError(f"{where}: caption_options {captions!r:.200}; expected four texts, the right one first")
        sets.setdefault((words[0], words[-1]), []).append((words[1], image, captions))
    for (first, second), members in sets.items():
        questions = [
            question
            for _, image, captions in members
            for picture in [
                files.picture(image, image.removeprefix("data/"), f"{_CONTROLLED[kind]}/{PurePosixPath(image).name}")
            ]
            for question in caption_questions(captions, [picture], protocol)
        ]
        yield Item(f"{kind}/{first}/{second}", (kind,), tuple(questions), [place for place, *_ in members])


def _pictures(files: SuiteFiles, kind: str, path: Path, protocol: Protocol) -> Iterator[Item]:
    """An item is a picture with the right caption and the wrong one."""
    entries = files.json(path)
    if not isinstance(entries, list):
        raise UserError(f"{path}: expected a list of [image id, right caption, wrong caption]")
    for number, entry in enumerate(entries):
        if not isinstance(entry, list) or len(entry) != 3 or {type(one) for one in entry[1:]} != {str}:
            raise UserError(f"{path}, entry {number}: {entry!r:.200}; expected [image id, right, wrong caption]")
        place = f"val2017/{str(entry[0]).zfill(12)}.jpg" if kind.startswith("coco") else f"vg_images/{entry[0]}.jpg"
        questions = caption_questions(entry[1:], [files.picture(place)], protocol)
        yield Item(f"{kind}/{number}", (kind,), questions, [], unit=place)
