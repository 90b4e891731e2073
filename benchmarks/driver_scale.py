"""What an extraction's driver costs as the number of shards grows: sample index, manifest, start, tasks, records.

No teacher and no cluster: workers that finish at once stand for them. Commit records are made by their own code and
name files that are not there; a shard's folder holds one array. Each step runs in a process of its own, and its memory
is that process's peak beyond what it began with. Time is that of the processor, as the machine may be shared.

    python -m benchmarks.driver_scale
"""

import argparse
import logging
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch
from urllib.request import ProxyHandler, Request, build_opener

import torch

from benchmarks.memory import PeakMemory
from benchmarks.results import RESULTS, command_line, save_result
from pipeline.cluster.task_queue import TaskQueue
from storage.codecs.codec_settings import LogitCodecConfig, MapCodecConfig
from storage.regular_files import MAX_BYTES
from storage.samples.image_settings import ImageConfig
from storage.samples.index import INDEX_PATH, SampleIndex, SampleShardEntry
from storage.stores import LocalStore, open_store
from storage.targets.cleaning import clean_partials
from storage.targets.commits import COMMITS, READS_AT_ONCE, CommitRecord, committed_shards, iter_commits
from storage.targets.manifest import FORMAT_VERSION, Fingerprint, Manifest, create_or_check
from storage.targets.store import TargetStore

FILES = (4, 40)
"""Files a commit record names: two numbers, so that what a shard and what a file takes can be told apart. Real ones
name about 40; the smaller number is run up to `MOST_FEW` shards only."""
MOST_FEW = 10_000
SAMPLES = 512
"""Samples a shard."""
OPEN = "open for a student, records of {} files"
DONE = 0.99
WORKERS = 256
REQUEST_S = 0.02
"""Of a store behind a network, for what reading many records at once gains."""
FORK = multiprocessing.get_context("fork")

Figures = dict[str, float]
Step = Callable[[], object]


def measure(num_shards: int, folder: Path, repeats: int) -> Iterator[tuple[str, Figures]]:
    """Every step at this number of shards, by name; `folder` is empty and is filled."""
    empty, targets = folder / "empty", folder / "targets"
    yield "create, check and load the manifest", alone(partial(make_manifest, empty, num_shards), repeats)
    yield "give out all tasks", alone(partial(give_out, num_shards), repeats)
    yield "start, nothing done", alone(partial(start, empty, num_shards), repeats)
    num_done = int(num_shards * DONE)
    alone(partial(write_store, targets, num_shards, num_done, FILES[1]))
    yield "start, 99 % done", alone(partial(start, targets, num_shards), repeats)
    samples = folder / "samples"
    alone(partial(write_index, samples, num_shards, SAMPLES))
    yield "load the sample index", alone(partial(SampleIndex.load, open_store(samples)), repeats)
    yield OPEN.format(FILES[1]), alone(partial(TargetStore.open, targets), repeats)
    yield "sums of 99 % of the records", alone(partial(sum_records, targets), repeats)
    if num_shards <= MOST_FEW:
        few = folder / "few"
        alone(partial(write_store, few, num_shards, num_done, FILES[0]))
        yield OPEN.format(FILES[0]), alone(partial(TargetStore.open, few), repeats)


def alone(step: Step, repeats: int = 1) -> Figures:
    """Medians of the step's figures, each time from a new process."""
    runs = [_in_a_process(step) for _ in range(repeats)]
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def _in_a_process(step: Step) -> Figures:
    # Forked: a process that started afresh would import for seconds what this one has.
    receiver, sender = FORK.Pipe(duplex=False)
    process = FORK.Process(target=_report, args=(step, sender))
    process.start()
    sender.close()
    try:
        figures: Figures = receiver.recv()
    except EOFError:
        raise RuntimeError(f"the process of {step} died; its error is above") from None
    finally:
        process.join()
        process.close()
    return figures


def _report(step: Step, sender: Any) -> None:
    memory, started, processor = PeakMemory(), time.perf_counter(), time.process_time()
    kept = step()
    figures = {"cpu_s": time.process_time() - processor, "wall_s": time.perf_counter() - started}
    sender.send({**figures, "bytes": memory.grown_bytes})
    del kept


def growth(by_shards: Mapping[int, Mapping[str, Figures]]) -> dict[str, Any]:
    """Of each step, from the last but one number of shards that it was run with to the last."""
    found: dict[str, Any] = {}
    for name in by_shards[min(by_shards)]:
        counts = sorted(count for count, figures in by_shards.items() if name in figures)
        if len(counts) < 2:
            continue
        few, many = counts[-2:]
        less, more = by_shards[few][name], by_shards[many][name]
        found[name] = {
            "shards": [few, many],
            "times_the_cpu_s": more["cpu_s"] / max(less["cpu_s"], 1e-9),
            "cpu_us_a_shard": (more["cpu_s"] - less["cpu_s"]) / (many - few) * 1e6,
            "bytes_a_shard": (more["bytes"] - less["bytes"]) / (many - few),
        }
    return found


def bytes_a_part(
    by_shards: Mapping[int, Mapping[str, Figures]], name: str, numbers: tuple[int, int]
) -> dict[str, float]:
    """What one more file in a record takes; `name` holds their number. From the largest run with both."""
    both = [count for count, figures in by_shards.items() if all(name.format(number) in figures for number in numbers)]
    if not both:
        return {}
    few, many = (by_shards[max(both)][name.format(number)]["bytes"] for number in numbers)
    return {"shards": max(both), "bytes": (many - few) / max(both) / (numbers[1] - numbers[0])}


# The steps.


def make_manifest(folder: Path, num_shards: int) -> Manifest:
    store, made = open_store(folder), manifest(num_shards)
    create_or_check(store, made)
    create_or_check(store, made)
    return Manifest.load(store)


def start(folder: Path | str, num_shards: int) -> list[int]:
    """What `extract` does before it gives out the first shard."""
    targets = open_store(folder)
    clean_partials(targets)
    committed = committed_shards(targets.list(COMMITS))
    return [shard for shard in range(num_shards) if shard not in committed]


def sum_records(folder: Path) -> tuple[int, int]:
    """What `extract` does with the records of earlier runs in the end."""
    targets = open_store(folder)
    samples = num_bytes = 0
    for record in iter_commits(targets, committed_shards(targets.list(COMMITS))):
        samples += record.num_samples
        num_bytes += sum(size for size, _ in record.files.values())
    return samples, num_bytes


def give_out(num_tasks: int) -> TaskQueue:
    """Every worker always has two tasks; one task in a hundred fails once."""
    logging.getLogger("pipeline.cluster.task_queue").setLevel(logging.ERROR)
    pool = TaskQueue(range(num_tasks), max_attempts=3, tasks_per_worker=2)
    workers: list[list[int]] = [[] for _ in range(WORKERS)]
    while pool.num_unfinished:
        for worker in workers:
            if worker:
                task = worker.pop(0)
                if task % 100 or task in pool.tries:
                    pool.done(task)
                else:
                    pool.failed(task, "node", 1, "made to fail")
            while (next_task := pool.next_for(worker)) is not None:
                worker.append(next_task)
    return pool


# What they work on.


def manifest(num_shards: int) -> Manifest:
    fingerprint = Fingerprint(
        teacher_weights="0" * 64,
        teacher_config={"text_config": {"num_hidden_layers": 32}},
        processor={},
        chat_template="{{ messages }}" * 100,
        tokenizer="0" * 64,
        layers=tuple(range(8, 24)),
        windows=(tuple(range(8, 24)),),
        map_codec=MapCodecConfig(name="sqrt4"),
        logit_codec=LogitCodecConfig(vocab_size=150_000, top_k=48, num_tail_samples=16, temperatures=(2.0,)),
        dtype="bfloat16",
        max_length=2048,
        cut="whole_turns",
        images=ImageConfig(),
        image_backend="pil",
        samples="0" * 64,
        capture_version=1,
    )
    return Manifest(
        format_version=FORMAT_VERSION, fingerprint=fingerprint, num_layers=32, hidden_size=4096, num_shards=num_shards
    )


def write_index(folder: Path, num_shards: int, num_samples: int) -> None:
    """An index without its tars and tables."""
    shards = tuple(
        SampleShardEntry(
            name=f"samples-{shard:06d}.tar",
            num_samples=num_samples,
            bytes=150_000 * num_samples + shard,
            sha256=f"{shard:064x}",
            table_bytes=64 * num_samples,
            table_sha256=f"{num_shards + shard:064x}",
        )
        for shard in range(num_shards)
    )
    folder.mkdir()
    (folder / INDEX_PATH).write_bytes(SampleIndex(shards).to_bytes())


def records(num_shards: int, num_done: int, num_files: int) -> Iterator[CommitRecord]:
    digest = manifest(num_shards).digest
    files = {f"array_{number:02d}/c/0/0": (4096, f"{number:064x}") for number in range(num_files)}
    counts = {name: 16 for name in CommitRecord.model_fields if name.startswith("num_")}
    for shard in range(num_done):
        yield CommitRecord.build(
            shard=shard, sample_shard=f"samples-{shard:06d}.tar", files=files, skipped=(), manifest=digest, **counts
        )


def write_store(folder: Path, num_shards: int, num_done: int, num_files: int) -> None:
    """Without the fsync of each file that the real writer makes."""
    make_manifest(folder, num_shards)
    (folder / COMMITS).mkdir()
    for record in records(num_shards, num_done, num_files):
        (folder / record.record_path).write_bytes(record.to_bytes())
        (folder / record.path / "array_00").mkdir(parents=True)
        (folder / record.path / "array_00/zarr.json").write_bytes(b"{}")


# Behind a network.


class Delayed(LocalStore):
    """Each file takes as long to come as from an object store."""

    def read(self, path: str, max_bytes: int = MAX_BYTES) -> bytes:
        """All bytes of a file, after a while."""
        time.sleep(REQUEST_S)
        return super().read(path, max_bytes)


def reading_at_once(num_shards: int, folder: Path) -> dict[str, Any]:
    """Opening a store whose every request takes `REQUEST_S`: one record at a time, and many."""
    alone(partial(write_store, folder, num_shards, num_shards, FILES[1]))
    # Wall time: it is the waiting that is shared out.
    seconds = {at_once: alone(partial(open_with, at_once, Delayed(folder)))["wall_s"] for at_once in (1, READS_AT_ONCE)}
    return {
        "shards": num_shards,
        "request_s": REQUEST_S,
        "wall_s": {str(at_once): taken for at_once, taken in seconds.items()},
        "gain": seconds[1] / seconds[READS_AT_ONCE],
    }


def open_with(reads_at_once: int, store: Any) -> TargetStore:
    with patch("storage.targets.commits.READS_AT_ONCE", reads_at_once):
        return TargetStore.open(store)


def on_s3(num_shards: int) -> dict[str, Any]:
    """Start and opening on moto's server, which has one core's share of this machine, as has the client."""
    with s3_server() as bucket:
        url = f"{bucket}/store"
        alone(partial(upload, url, num_shards))
        seconds = {
            "start": alone(partial(start, url, num_shards))["wall_s"],
            **{
                f"open, {at_once} at a time": alone(partial(_open_url, at_once, url))["wall_s"]
                for at_once in (1, READS_AT_ONCE)
            },
        }
    return {
        "shards": num_shards,
        "wall_s": seconds,
        "ms_a_shard": {name: taken / num_shards * 1e3 for name, taken in seconds.items()},
    }


def _open_url(reads_at_once: int, url: str) -> TargetStore:
    return open_with(reads_at_once, open_store(url))


def upload(url: str, num_shards: int) -> None:
    """Three objects a shard: the record and two of its folder."""
    store = open_store(url)
    create_or_check(store, manifest(num_shards))

    def put(record: CommitRecord) -> None:
        store.write(record.record_path, record.to_bytes())
        for name in ("zarr.json", "array_00/zarr.json"):
            store.write(f"{record.path}/{name}", b"{}")

    with ThreadPoolExecutor(READS_AT_ONCE) as writers:
        list(writers.map(put, records(num_shards, num_shards, FILES[1])))


@contextmanager
def s3_server() -> Iterator[str]:
    """URL of an empty bucket on moto's server, which runs as long as the block."""
    receiver, sender = FORK.Pipe(duplex=False)
    process = FORK.Process(target=_serve_s3, args=(sender,), daemon=True)
    process.start()
    endpoint = receiver.recv()
    with build_opener(ProxyHandler({})).open(Request(f"{endpoint}/shards", method="PUT")):
        pass
    environment = {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_REGION": "us-east-1",
        "NO_PROXY": "127.0.0.1",
    }
    try:
        with patch.dict(os.environ, environment):
            yield "s3://shards"
    finally:
        process.terminate()
        process.join()


def _serve_s3(sender: Any) -> None:
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    sender.send(f"http://{host}:{port}")
    while True:
        time.sleep(3600)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, nargs="+", default=[10_000, 30_000, 100_000])
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--delayed-shards", type=int, default=500)
    parser.add_argument("--s3-shards", type=int, default=2_000, help="0 leaves moto's server out")
    parser.add_argument("--out", type=Path, default=RESULTS / "driver_scale.json")
    flags = parser.parse_args()
    result: dict[str, Any] = {"repeats": flags.repeats, "workers": WORKERS}
    by_shards: dict[int, dict[str, Figures]] = {}

    def save(**more: Any) -> None:
        result.update(more)
        save_result(flags.out, torch.device("cpu"), command_line("benchmarks.driver_scale"), result)

    with tempfile.TemporaryDirectory() as folder:
        save(many_records_at_once=reading_at_once(flags.delayed_shards, Path(folder) / "delayed"))
        if flags.s3_shards:
            save(moto_s3=on_s3(flags.s3_shards))
        for count in sorted(flags.shards):
            by_shards[count] = {}
            with tempfile.TemporaryDirectory(dir=folder) as home:
                # Saved after each, as the largest takes long.
                for name, figures in measure(count, Path(home), flags.repeats):
                    by_shards[count][name] = figures
                    save(
                        by_shards={str(number): steps for number, steps in by_shards.items()},
                        growth=growth(by_shards),
                        bytes_of_a_file_in_open_records=bytes_a_part(by_shards, OPEN, FILES),
                    )
    print(flags.out.read_text())


if __name__ == "__main__":
    main()
