"""Tiny teachers split over two processes against whole ones: run as a script, once for each process.

Its arguments are the process's number and a folder with a checkpoint by the name of each family, and `packed` samples.
Process 0 stores what it found: for each family the largest difference of maps, of answer attention and of
log-probabilities.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stages.teacher.batching import PreparedSample, SamplePreparer
from stages.teacher.config import TeacherConfig
from stages.teacher.forward import run_teacher
from stages.teacher.prefix_forward import run_continuations, run_prefixes
from stages.teacher.teacher import Teacher, load_rank, load_teacher
from stages.teacher.tensor_split import join
from stages.teacher.timings import Timings
from storage.codecs.answer_logits import AnswerLogitsCodec
from storage.samples.image_settings import DEFAULT_IMAGES
from storage.samples.sample_set import SampleSet
from tests.stages.extracted_families import LAYERS


def main() -> None:
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    join(folder / "store", rank, 2)
    found = {}
    for checkpoint in sorted((folder / "teachers").iterdir()):
        settings = TeacherConfig.model_validate(
            {
                "checkpoint": str(checkpoint),
                "layers": LAYERS,
                "num_matched": 1,
                "answer_attention": True,
                "logit_codec": "float16",
            }
        )
        part = load_rank(settings, DEFAULT_IMAGES, 2)
        split = [said(part, folder / "packed", shares) for shares in (False, part.identity.prefix_reuse)]
        if rank == 0:
            whole = load_teacher(settings)
            expected = said(whole, folder / "packed", False)
            found[checkpoint.name] = [compared(each, expected, whole) for each in split]
    if rank == 0:
        (folder / "found.json").write_text(json.dumps(found))


def said(teacher: Teacher, samples: Path, shares_prefix: bool) -> dict[str, list[Tensor]]:
    """What a teacher says of each sample; `shares_prefix` computes what comes up to its image apart."""
    with SampleSet.open(samples).shard(0) as shard:
        prepare = SamplePreparer(teacher.encoder, shard, Timings())
        made = [sample for sample in map(prepare, range(len(shard))) if isinstance(sample, PreparedSample)]
    found: dict[str, list[Tensor]] = {"maps": [], "answers": [], "logits": []}
    for sample in (each for each in made if each.map_key is not None):
        maps: Any
        if shares_prefix:
            prefixes = run_prefixes(teacher, [sample], [sample])
            maps = prefixes.maps
            logits, answers = run_continuations(teacher, prefixes, [0], [sample])
        else:
            logits, maps, answers = run_teacher(teacher, [sample], [sample])
        found["maps"] += [map_NN for of_layers in maps.values() for map_NN in of_layers]
        found["answers"] += [each.float() for each in answers if each is not None]
        found["logits"] += [each for each in logits if each is not None]
    return found


def compared(found: dict[str, list[Tensor]], expected: dict[str, list[Tensor]], teacher: Teacher) -> dict[str, float]:
    """Largest difference of each kind; of log-probabilities, of those whose tokens are the same."""
    pairs = {name: list(zip(found[name], expected[name], strict=True)) for name in found}
    differences = {name: max(float((a - b).abs().max()) for a, b in pairs[name]) for name in ("maps", "answers")}
    codec = AnswerLogitsCodec(teacher.identity.logit_codec)
    num_rows, num_same, largest = 0, 0, 0.0
    for a, b in pairs["logits"]:
        ours, theirs = codec.decode(a), codec.decode(b)
        same_R = (ours.ids_RK == theirs.ids_RK).all(1)
        num_rows, num_same = num_rows + len(same_R), num_same + int(same_R.sum())
        if num_same:
            rows = ours.logprobs_RK[same_R].float() - theirs.logprobs_RK[same_R].float()
            largest = max(largest, float(rows.abs().amax() if rows.numel() else 0))
    return {
        **differences,
        "logprobs": largest,
        "rows": num_rows,
        "same_rows": num_same,
        "maps_seen": len(pairs["maps"]),
    }


if __name__ == "__main__":
    main()
