"""What it saves to compute the image once for all conversations about it: tokens, images, processor time, wall time.

A random LLaVA of some layers with 576 image tokens, and conversations of about 200 other tokens, most of them behind
the image; 1, 2.2 and 5 conversations an image. One worker's `Observer` takes a shard with `teacher.prefix_reuse` off
and on, one thing after the other, nothing written. Times mean little on a shared machine; the ratio of processor times
is of runs that took turns.

    python -m benchmarks.prefix_reuse --repeats 3
"""

import argparse
import json
import os
import random
import statistics
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.extraction import Size, make_teacher
from benchmarks.results import RESULTS, command_line, interleaved, median_ratio, save_result, spent
from pipeline.demo.scenes.dataset import write_dataset
from pipeline.runtime.cpu_determinism import make_cpu_deterministic
from stages.samples.pack import PackConfig, pack_samples
from stages.teacher.config import TeacherConfig
from stages.teacher.observe import Observer
from stages.teacher.teacher import Teacher, load_teacher
from storage.samples.sample_set import SampleSet

WAYS = ("off", "on")
SENTENCES = (
    "The red square is left of the blue circle.",
    "There is a green triangle above the yellow star.",
    "What is the color of the small circle?",
    "Is the square larger than the triangle?",
)


@dataclass(frozen=True)
class Data:
    """How many conversations are about how many images."""

    conversations: int
    images: int

    @property
    def per_image(self) -> float:
        """Conversations an image."""
        return self.conversations / self.images


SETS = (Data(8, 8), Data(22, 10), Data(20, 4))


def write_samples(data: Data, words: tuple[int, int], folder: Path) -> Path:
    """Conversations of one turn with so many words at least and at most, spread evenly over the images."""
    rng = random.Random(0)
    write_dataset(folder / "scenes", data.images, seed=0, num_pairs=1)
    names = sorted(path.name for path in (folder / "scenes/images").glob("*.png"))[: data.images]
    records = []
    for number in range(data.conversations):
        length, text = rng.randint(*words), list[str]()
        while len(text) < length:
            text += rng.choice(SENTENCES).split()
        half = len(text) // 2
        turns = [("human", "<image>\n" + " ".join(text[:half])), ("gpt", " ".join(text[half:]))]
        records.append({
            "id": str(number),
            "image": names[number % len(names)],
            "conversations": [{"from": who, "value": value} for who, value in turns],
        })  # fmt: skip
    (folder / "data.json").write_text(json.dumps(records))
    pack_samples(folder / "data.json", folder / "scenes/images", folder / "packed", PackConfig())
    return folder / "packed"


class Counted:
    """A teacher that counts what enters its decoder and its projector."""

    def __init__(self, teacher: Teacher) -> None:
        self.teacher, self.counts = teacher, Counter[str]()
        teacher.model.model.language_model.register_forward_pre_hook(self._decoder, with_kwargs=True)
        teacher.model.model.multi_modal_projector.register_forward_pre_hook(self._projector)

    def run(self, samples: Path) -> Counter[str]:
        """Observes the first shard; tokens, padding with them, and images."""
        self.counts.clear()
        with SampleSet.open(samples).shard(0) as shard, Observer(self.teacher, overlap=False) as observer:
            seen = observer.observe(shard)
        assert not seen.skipped, seen.skipped
        self.counts["own_tokens"] = sum(len(sample.token_ids) for sample in seen.samples)
        return Counter(self.counts)

    def _decoder(self, _: object, __: object, kwargs: dict[str, torch.Tensor]) -> None:
        self.counts["decoder_tokens"] += kwargs["inputs_embeds"].shape[:2].numel()
        self.counts["forward_passes"] += 1

    def _projector(self, _: object, args: tuple[torch.Tensor, ...]) -> None:
        self.counts["images"] += len(args[0])


def measure(size: Size, words: tuple[int, int], folder: Path, repeats: int) -> list[dict[str, Any]]:
    """Figures of each set of conversations."""
    make_teacher(size, folder / "teacher")
    settings = TeacherConfig(checkpoint=str(folder / "teacher"), batch_size=size.batch_size, top_k=32)
    teachers = {way: Counted(load_teacher(settings.model_copy(update={"prefix_reuse": way}))) for way in WAYS}
    rows = []
    for number, data in enumerate(SETS):
        (folder / str(number)).mkdir()
        samples = write_samples(data, words, folder / str(number))
        counts = {way: teachers[way].run(samples) for way in WAYS}
        taken = interleaved({way: partial(spent, partial(teachers[way].run, samples)) for way in WAYS}, repeats)
        wall = {way: [each.wall_s for each in taken[way]] for way in WAYS}
        processor = {way: [each.cpu_s for each in taken[way]] for way in WAYS}
        rows.append({
            **asdict(data),
            "conversations_an_image": data.per_image,
            "tokens_a_conversation": counts["off"]["own_tokens"] / data.conversations,
            "counts": {way: dict(counts[way]) for way in WAYS},
            "decoder_tokens_ratio": counts["on"]["decoder_tokens"] / counts["off"]["decoder_tokens"],
            "images_ratio": counts["on"]["images"] / counts["off"]["images"],
            "processor_s": {way: statistics.median(processor[way]) for way in WAYS},
            "wall_s": {way: statistics.median(wall[way]) for way in WAYS},
            "processor_ratio": median_ratio(processor["on"], processor["off"]),
            "wall_ratio": median_ratio(wall["on"], wall["off"]),
        })  # fmt: skip
        print(json.dumps(rows[-1], indent=1), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = asdict(Size(layers=6, hidden=384, heads=6, patches=24))
    for name in ("layers", "hidden", "heads", "patches", "batch_size"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=sizes[name])
    parser.add_argument("--words", type=int, nargs=2, default=(150, 190), help="of a conversation, least and most")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="of the forward pass on a CPU")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=RESULTS / f"prefix_reuse-{device.type}.json")
    flags = vars(parser.parse_args())
    repeats, threads, out, words = (flags.pop(name) for name in ("repeats", "threads", "out", "words"))
    make_cpu_deterministic()
    torch.set_num_threads(threads)
    size = Size(**flags)
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(size, tuple(words), Path(folder), repeats)
    result = {
        "device": device.type,
        "teacher": {**{name: flags[name] for name in sorted(flags)}, "image_tokens": size.patches**2},
        "threads": threads,
        "repeats": repeats,
        "load_average": os.getloadavg()[0],
        "sets": rows,
    }
    save_result(out, device, command_line("benchmarks.prefix_reuse"), result)


if __name__ == "__main__":
    main()
