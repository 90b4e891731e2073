"""ARO: which of two captions names a relation, or two attributes, the right way round. Yuksekgonul et al., 2023."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from stages.evaluation.suites.captions import PAIR_CHANCE, PAIR_PROTOCOLS, pair_counts, pair_questions
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
    ratio,
    with_average,
)
from stages.evaluation.suites.suite_files import SuiteFiles, fields
from storage.errors import UserError

MIN_ITEMS: Final = 25
"""Pairs of attributes with fewer items are left out of the mean over pairs."""

_TASKS: Final = {"relation": "visual_genome_relation.json", "attribution": "visual_genome_attribution.json"}

_SYMMETRIC: Final = """
    adjusting, around, attached to, beside, between, bigger than, biting, boarding, brushing, by, chewing, cleaning,
    climbing, close to, coming from, coming out of, contain, crossing, dragging, draped over, drinking, drinking from,
    driving, driving down, driving on, eating from, eating in, enclosing, exiting, facing, filled with, floating in,
    floating on, flying, flying above, flying in, flying over, flying through, full of, going down, going into, going
    through, grazing in, growing in, growing on, guiding, hanging from, hanging in, hanging off, hanging over, higher
    than, holding onto, hugging, in between, jumping off, jumping on, jumping over, kept in, larger than, leading,
    leaning over, leaving, licking, longer than, looking in, looking into, looking out, looking over, looking through,
    lying next to, lying on top of, making, mixed with, mounted on, moving, near, next to, of, on the back of, on the
    edge of, on the front of, on the other side of, on the side of, opening, painted on, parked at, parked beside,
    parked by, parked in, parked in front of, parked near, parked next to, perched on, petting, piled on, playing,
    playing in, playing on, playing with, pouring, reaching for, reading, reflected on, riding on, running in, running
    on, running through, seen through, sitting behind, sitting beside, sitting by, sitting in front of, sitting near,
    sitting next to, sitting under, skiing down, skiing on, sleeping in, sleeping on, smiling at, sniffing, splashing,
    sprinkled on, stacked on, standing against, standing around, standing behind, standing beside, standing in front of,
    standing near, standing next to, staring at, stuck in, surrounding, swimming in, swinging, talking to, topped with,
    touching, traveling down, traveling on, tying, typing on, underneath, wading in, waiting for, walking across,
    walking by, walking down, walking next to, walking through, with, working in, working on, worn on, wrapped around,
    wrapped in
"""
SYMMETRIC: Final = frozenset(" ".join(name.split()) for name in _SYMMETRIC.split(","))
"""Relations that the makers leave out of the mean over relations."""


class Aro(Suite):
    """VG-Relation and VG-Attribution: `macro_accuracy` is the makers' number, `accuracy` that over items.

    The first is the mean over relations that are not symmetric, and over pairs of attributes with at least 25 items.

    The picture is cropped to the box of the two objects first. A language model alone finds many of the negatives:
    read the accuracy beside that with `--blind`. COCO-Order and Flickr30k-Order, which shuffle words, are not asked.
    """

    name = "aro"
    source = "mertyg/vision-language-models-are-bows, dataset_zoo/aro_datasets.py and the notebook that replicates ARO"
    fetch = (
        "visual_genome_relation.json, visual_genome_attribution.json (one of them is enough) and images/ of "
        "vgr_vga_images.zip, whose addresses are in github.com/mertyg/vision-language-models-are-bows"
    )
    protocols = PAIR_PROTOCOLS
    chance = PAIR_CHANCE | {"macro_accuracy": 50.0}
    main = ("average", "macro_accuracy")
    all_kinds = tuple(_TASKS)

    def load(self, files: SuiteFiles, protocol: Protocol) -> Iterator[Item]:
        tasks = {name: task for task, name in _TASKS.items()}
        for path in files.find(*tasks):
            task = tasks[path.name]
            for number, record in enumerate(files.rows(path)):
                where = f"{path}, record {number}"
                types = {"image_path": str, "true_caption": str, "false_caption": str}
                image, caption, negative = fields(record, where, **types)
                left, top, width, height = fields(record, where, bbox_x=int, bbox_y=int, bbox_w=int, bbox_h=int)
                if width < 1 or height < 1:
                    raise UserError(f"{where}: a box of {width} x {height} pixels; expected at least one pixel")
                picture = replace(files.picture(f"images/{image}"), crop=(left, top, left + width, top + height))
                if task == "relation":
                    (group,) = fields(record, where, relation_name=str)
                else:
                    group = "_".join(map(str, fields(record, where, attributes=list)[0]))
                questions = pair_questions(caption, negative, picture, protocol)
                yield Item(f"{task}/{number}", (task, f"{task}/{group}"), questions, None, unit=image)

    def count(self, item: Item, answers: Sequence[Answer], protocol: Protocol) -> Counts:
        return pair_counts(answers, protocol)

    def metrics(self, counts: KindCounts) -> Metrics:
        found = {}
        for task in _TASKS:
            if task in counts:
                groups = {kind.partition("/")[2]: sums for kind, sums in counts.items() if kind.startswith(f"{task}/")}
                found[task] = {"macro_accuracy": _mean_over(task, groups)} | percent_of_items(counts[task])
        return with_average(found)


def _mean_over(task: str, groups: Mapping[str, Mapping[str, NDArray[np.float64]]]) -> NDArray[np.float64]:
    """In percent, over the makers' groups; over all where none is of these. What was not drawn is left out."""
    chosen = [
        sums
        for name, sums in groups.items()
        if (name not in SYMMETRIC if task == "relation" else sums["items"][0] >= MIN_ITEMS)
    ] or list(groups.values())
    return 100 * mean_of_drawn([ratio(sums["accuracy"], sums["items"]) for sums in chosen])
