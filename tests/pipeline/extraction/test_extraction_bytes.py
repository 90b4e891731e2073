"""What is stored does not depend on who makes which shard, when, with how many threads or in which batches."""

import queue
import random
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from pipeline.extraction.shard_extractor import ShardExtractor
from stages.samples.pack import PackConfig, pack_samples
from stages.teacher.config import TeacherConfig
from stages.teacher.identity import identify_teacher
from storage.samples.index import SampleIndex
from storage.stores import open_store
from storage.targets.manifest import Manifest, create_or_check
from tests.checkpoints import make_llava_data, make_tiny_llava
from tests.conftest import NUM_SAMPLES, SAMPLES_PER_SHARD, TinyWorld
from tests.pipeline.processes import tree


def manifest_for(teacher: TeacherConfig, samples: Path, out: Path) -> Manifest:
    index = SampleIndex.load(open_store(samples))
    manifest = identify_teacher(teacher, on_gpu=False).manifest(index.digest, len(index.shards))
    create_or_check(open_store(out), manifest)
    return manifest


def extract_with(tiny: TinyWorld, out: Path, batch_sizes: list[int | None], seed: int | None) -> dict[str, bytes]:
    """One worker a batch size, two threads a worker; shards in order, or shuffled. All files of the store."""
    settings = [TeacherConfig(checkpoint=str(tiny.teacher), batch_size=size) for size in batch_sizes]
    manifest = manifest_for(settings[0], tiny.samples, out)
    workers = [ShardExtractor(one, str(tiny.samples), str(out), manifest, threads=1) for one in settings]
    shards = list(range(manifest.num_shards))
    if seed is not None:
        random.Random(seed).shuffle(shards)
    tasks: queue.SimpleQueue[int] = queue.SimpleQueue()
    for shard in shards:
        tasks.put(shard)

    def work(worker: ShardExtractor) -> None:
        while True:
            try:
                worker(tasks.get_nowait(), lambda _: None)
            except queue.Empty:
                return

    threads = [threading.Thread(target=work, args=(worker,)) for worker in workers for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {"forward", "coding", "preparing", "writing"} <= {name for w in workers for name in w.timings()}
    return tree(out)


@pytest.mark.slow
def test_workers_order_and_batch_size_change_no_byte(tiny: TinyWorld, tmp_path: Path) -> None:
    expected = extract_with(tiny, tmp_path / "one", [4], seed=None)
    assert sum(name.startswith("commits/") for name in expected) >= NUM_SAMPLES / SAMPLES_PER_SHARD
    for seed in (1, 2):
        assert extract_with(tiny, tmp_path / f"three-{seed}", [1, 3, None], seed) == expected


_WITH_THREADS = """
import sys
from pathlib import Path
from pipeline.extraction.shard_extractor import ShardExtractor
from stages.teacher.config import TeacherConfig
from tests.pipeline.extraction.test_extraction_bytes import manifest_for
teacher, samples, out, threads = sys.argv[1:]
settings = TeacherConfig(checkpoint=teacher, batch_size=3)
manifest = manifest_for(settings, Path(samples), Path(out))
ShardExtractor(settings, samples, out, manifest, threads=int(threads))(0, lambda _: None)
"""


@pytest.mark.slow
def test_the_number_of_threads_changes_no_byte(tmp_path: Path) -> None:
    # Large enough that matrix products are shared among threads. On processors that are not Intel's each run takes one
    # thread (`reproducible_threads`), so that there three equal runs are compared.
    teacher = make_tiny_llava(tmp_path / "teacher", num_layers=4, hidden=512, heads=8, image_size=64, patch_size=4)
    data, images = make_llava_data(tmp_path / "data", 6)
    pack_samples(data, images, tmp_path / "samples", PackConfig())
    stores = []
    for threads in (1, 2, 3):
        store = tmp_path / f"store-{threads}"
        command = [sys.executable, "-c", _WITH_THREADS, teacher, tmp_path / "samples", store, str(threads)]
        subprocess.run(command, check=True)
        stores.append({re.sub(r"-[0-9a-f]{16}\.zarr", ".zarr", name): data for name, data in tree(store).items()})
    for threads, store_files in enumerate(stores, 1):
        assert store_files.keys() == stores[0].keys()
        assert [name for name, data in store_files.items() if data != stores[0][name]] == [], f"{threads} threads"
