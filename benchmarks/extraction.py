"""Samples a second of one extraction worker, against the bare forward loop and against the same without overlap.

The teacher is random and large enough that its forward pass is most of the work; the data are scenes. Without Ray: one
worker, given shards by two threads, as the cluster gives them. Rates are of wall time, and mean little on a shared
machine; the processor's time, of all threads together, tells how much work there is beside the forward pass.

    python -m benchmarks.extraction --repeats 3
"""

import argparse
import os
import shutil
import statistics
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoProcessor, LlavaForConditionalGeneration

from benchmarks.results import RESULTS, Spent, command_line, interleaved, median_ratio, save_result, spent
from pipeline.demo.assets import TEACHER
from pipeline.demo.scenes.dataset import write_dataset
from pipeline.extraction.extract import SHARDS_IN_FLIGHT
from pipeline.extraction.shard_extractor import ShardExtractor
from stages.samples.pack import PackConfig, pack_samples
from stages.teacher.batching import BatchSize, LengthBatcher, PreparedSample, SamplePreparer
from stages.teacher.config import TeacherConfig
from stages.teacher.forward import model_inputs
from stages.teacher.identity import identify_teacher
from stages.teacher.observe import Observer
from stages.teacher.teacher import Teacher
from stages.teacher.timings import Timings, waited_share
from storage.samples.sample_set import SampleSet
from storage.stores import open_store
from storage.targets.manifest import Manifest, create_or_check

WAYS = ("forward_loop", "overlapped", "one_after_the_other")


@dataclass(frozen=True)
class Size:
    """Sizes of the random teacher and of the data."""

    layers: int = 12
    hidden: int = 512
    heads: int = 8
    patches: int = 16
    """A side of the image; its square is N."""
    images: int = 24
    samples_per_shard: int = 12
    batch_size: int = 8


class Bench:
    """A worker on a packed data set, and the ways to run it."""

    def __init__(self, size: Size, folder: Path, threads: int) -> None:
        make_teacher(size, folder / "teacher")
        write_dataset(folder / "data", size.images, seed=0, num_pairs=1)
        pack = PackConfig(max_samples_per_shard=size.samples_per_shard)
        pack_samples(folder / "data/train.json", folder / "data", folder / "samples", pack)
        # As the bare loop does: what prefix reuse saves is another question (`prefix_reuse.py`).
        self.settings = TeacherConfig(
            checkpoint=str(folder / "teacher"),
            batch_size=size.batch_size,
            max_length=1024,
            top_k=32,
            prefix_reuse="off",
        )
        self.folder, self.threads = folder, threads
        self.samples = SampleSet.open(folder / "samples")
        self.index = self.samples.index
        identity = identify_teacher(self.settings, on_gpu=torch.cuda.is_available())
        self.manifest: Manifest = identity.manifest(self.index.digest, len(self.index.shards))
        self.worker = self._new_worker(folder / "first")
        self.teacher: Teacher = self.worker.teacher
        self.batches = list(self._ready_batches())
        self.waited: list[float] = []

    @property
    def num_samples(self) -> int:
        """Of the data set."""
        return self.index.num_samples

    @torch.inference_mode()
    def forward_loop(self) -> Spent:
        """The limit: every batch through the model, ready beforehand, nothing captured, coded or written."""

        def run() -> None:
            for batch in self.batches:
                self.teacher.model.model(**model_inputs(self.teacher, batch), use_cache=False)
            _wait()

        return spent(run)

    def overlapped(self) -> Spent:
        """The worker as the cluster runs it."""
        with self._emptied_store():
            self.worker.observer = Observer(self.teacher)

            def run() -> None:
                with ThreadPoolExecutor(SHARDS_IN_FLIGHT) as threads:
                    list(threads.map(lambda shard: self.worker(shard, lambda _: None), range(len(self.index.shards))))

            taken = spent(run)
            self.waited.append(waited_share(self.worker.timings()) or 0.0)
            self.worker.observer.close()
        return taken

    def one_after_the_other(self) -> Spent:
        """Read, prepare, forward, code and write in turn."""
        with self._emptied_store():
            self.worker.observer = Observer(self.teacher, overlap=False)

            def run() -> None:
                for shard in range(len(self.index.shards)):
                    self.worker(shard, lambda _: None)

            return spent(run)

    def _new_worker(self, out: Path) -> ShardExtractor:
        create_or_check(open_store(out), self.manifest)
        return ShardExtractor(self.settings, str(self.folder / "samples"), str(out), self.manifest, self.threads)

    @contextmanager
    def _emptied_store(self) -> Iterator[None]:
        out = self.folder / "targets"
        create_or_check(open_store(out), self.manifest)
        self.worker.targets = open_store(out)
        yield
        shutil.rmtree(out)

    def _ready_batches(self) -> Iterator[list[PreparedSample]]:
        batcher = LengthBatcher(BatchSize(self.settings.batch_size, on_gpu=False))
        for number in range(len(self.index.shards)):
            with self.samples.shard(number) as shard:
                maker = SamplePreparer(self.teacher.encoder, shard, Timings())
                for sample in map(maker, range(len(shard))):
                    if isinstance(sample, PreparedSample) and (batch := batcher.add(sample)) is not None:
                        yield batch
            yield from batcher.rest()


def make_teacher(size: Size, folder: Path) -> None:
    """The scenes' teacher, untrained, with a larger decoder and a larger image."""
    config = AutoConfig.from_pretrained(TEACHER, trust_remote_code=False)
    text = config.text_config
    text.hidden_size, text.intermediate_size, text.num_hidden_layers = size.hidden, 3 * size.hidden, size.layers
    text.num_attention_heads = text.num_key_value_heads = size.heads
    text.layer_types = ["full_attention"] * size.layers
    config.vision_config.image_size = config.vision_config.patch_size * size.patches
    config.image_seq_length = size.patches**2
    config.dtype = torch.float32
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlavaForConditionalGeneration(config).save_pretrained(folder)
    processor = AutoProcessor.from_pretrained(TEACHER, trust_remote_code=False)
    side = config.vision_config.image_size
    processor.image_processor.size = {"height": side, "width": side}
    processor.save_pretrained(folder)


def measure(size: Size, folder: Path, repeats: int, threads: int) -> dict[str, Any]:
    """All figures of one run."""
    bench = Bench(size, folder, threads)
    for way in WAYS:
        getattr(bench, way)()
    bench.waited.clear()
    taken = interleaved({way: getattr(bench, way) for way in WAYS}, repeats)
    wall = {way: [each.wall_s for each in taken[way]] for way in WAYS}
    processor = {way: [each.cpu_s for each in taken[way]] for way in WAYS}
    return {
        "size": {**asdict(size), "image_tokens": size.patches**2},
        "decoder_parameters": sum(p.numel() for p in bench.teacher.model.model.language_model.parameters()),
        "samples": bench.num_samples,
        "shards": len(bench.index.shards),
        "repeats": repeats,
        "load_average": os.getloadavg()[0],
        "samples_per_s": {way: bench.num_samples / statistics.median(wall[way]) for way in WAYS},
        "rate_over_forward_loop": {way: median_ratio(wall["forward_loop"], wall[way]) for way in WAYS},
        "processor_s_a_sample": {way: statistics.median(processor[way]) / bench.num_samples for way in WAYS},
        "processor_over_forward_loop": {way: median_ratio(processor[way], processor["forward_loop"]) for way in WAYS},
        "teacher_waited_share": statistics.median(bench.waited),
    }


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in asdict(Size()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="of the forward pass on a CPU")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=RESULTS / f"extraction-{device.type}.json")
    flags = vars(parser.parse_args())
    repeats, threads, out = (flags.pop(name) for name in ("repeats", "threads", "out"))
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Size(**flags), Path(folder), repeats, threads)
    save_result(out, device, command_line("benchmarks.extraction"), {"device": device.type, **result})
    print(out.read_text())


if __name__ == "__main__":
    main()
