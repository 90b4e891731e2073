"""The training stream alone: what a loader process gives a second, how well it shuffles, how soon it resumes.

A synthetic store at published sizes (728 image tokens, 11 layers, 4-bit codes) is made through the real writers; a
sample has text of mixed length, and two share an image. MB are those of tars and target shards. The S3 server is that
of moto, in a process of its own on the same machine: its figures say what the client costs, not what a network gives.

    python -m benchmarks.loader                     # into results/loader.json
    python -m benchmarks.loader --shards 4 --samples 8 --out /tmp/loader.json
"""

import argparse
import io
import json
import math
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from benchmarks.attention_maps import synthetic_maps
from benchmarks.results import RESULTS, command_line, save_result
from stages.student.data.collator import Collator
from stages.student.data.config import LoaderConfig
from stages.student.data.loader import StepLoader
from stages.student.data.sample_reader import SampleReader
from storage.codecs.answer_logits import AnswerLogitsCodec
from storage.codecs.attention_maps import MapCodec
from storage.codecs.codec_settings import LogitCodecConfig, MapCodecConfig
from storage.codecs.tail_samples import row_addresses
from storage.samples.image_settings import ImageConfig
from storage.samples.index import SampleIndex
from storage.samples.members import StoredSample
from storage.samples.sample_set import SampleSet
from storage.samples.shard_writer import SampleShardWriter
from storage.stores import open_store
from storage.streaming.mixture import Mixture, Source
from storage.streaming.order import StreamConfig, deal, epoch_order, shard_rows
from storage.streaming.stream import mixture_stream
from storage.targets.manifest import FORMAT_VERSION, Fingerprint, Manifest, create_or_check
from storage.targets.sample_targets import SampleTargets
from storage.targets.shard_writer import write_shard
from storage.targets.store import TargetStore

VOCABULARY, IMAGE_TOKEN = 151_936, 151_655
CPU = torch.device("cpu")
BUCKET = "loader"
LLAVA_SHARDS, LLAVA_SHARD_SIZE = 1300, 512
"""Of LLaVA-665k, for what needs no data."""


@dataclass(frozen=True)
class Shape:
    """The synthetic store."""

    shards: int = 12
    samples: int = 24
    """Of a shard; every two share an image."""
    image_tokens: int = 728
    distinct_maps: int = 6
    """Maps that are made; the shards repeat them."""
    answer_rows: int = 100
    image_side: int = 640


def make_store(root: Path, shape: Shape) -> None:
    """Sample shards in `root/samples`, targets in `root/targets`."""
    with SampleShardWriter(root / "samples", shape.samples, 10**12) as writer:
        for shard in range(shape.shards):
            for first in range(0, shape.samples, 2):
                image = _jpeg(shape.image_side, shard * shape.samples + first)
                keys = [f"{shard:06d}-{first + n:06d}" for n in range(2)]
                writer.add_group([StoredSample(key, _conversation(key), (image,)) for key in keys])
    packed = SampleSet.open(root / "samples")
    made = synthetic_maps(shape.image_tokens, shape.distinct_maps)
    codec, logits = MapCodecConfig(name="sqrt4"), LogitCodecConfig(vocab_size=VOCABULARY)
    map_codec = MapCodec.of_layers(codec, made.layers, made.windows)
    maps = [map_codec.encode(each) for each in made.maps]
    generator = torch.Generator().manual_seed(0)
    answers = torch.randn(shape.answer_rows, VOCABULARY, generator=generator) * 3
    records = AnswerLogitsCodec(logits).encode(answers, row_addresses("loader", shape.answer_rows))
    manifest = _manifest(packed.index, made.layers, made.windows, codec, logits)
    targets = open_store(root / "targets")
    create_or_check(targets, manifest)
    lengths = text_lengths(shape.shards * shape.samples)
    for shard, entry in enumerate(packed.index.shards):
        samples = []
        for row, members in enumerate(packed.members(shard)):
            text = int(lengths[shard * shape.samples + row])
            samples.append(_targets(members.key, shape, text, records, row // 2, generator))
        chosen = [maps[(shard + number) % len(maps)] for number in range(shape.samples // 2)]
        write_shard(targets, shard, manifest, entry.name, samples, chosen, [])


def text_lengths(size: int) -> NDArray[np.int64]:
    """Tokens beside those of the image: log-normal around 180, from 40 to 800."""
    drawn = np.random.default_rng(0).lognormal(np.log(180), 0.6, size)
    return np.clip(drawn, 40, 800).astype(np.int64)


def measure(root: Path, shape: Shape, cache: Path) -> dict[str, Any]:
    """All figures."""
    mixture = _mixture(root / "samples", root / "targets", batch_size=16)
    sample_bytes = sum(f.stat().st_size for f in root.rglob("*") if f.is_file()) / (shape.shards * shape.samples)
    return {
        "shape": vars(shape),
        "bytes_a_sample": sample_bytes,
        "load_average": os.getloadavg()[0],
        "local": measure_rates(mixture, sample_bytes),
        "s3": measure_s3(root, shape, cache, sample_bytes),
        "waiting": measure_waiting(_mixture(root / "samples", root / "targets", batch_size=64)),
        "resume": measure_resume(root),
        "shuffle": shuffle_quality(),
        "padding": padding_saved(shape),
    }


def measure_rates(mixture: Mixture, sample_bytes: float) -> dict[str, Any]:
    """A process that reads an epoch, that reads and collates it, and that gets it from one or two loader processes."""
    return {
        "read": _rate(lambda: map(len, _read(mixture)), sample_bytes),
        "read_and_collate": _rate(lambda: _loaded(mixture, 0), sample_bytes),
        "from_1_loader_process": _rate(lambda: _loaded(mixture, 1), sample_bytes),
        "from_2_loader_processes": _rate(lambda: _loaded(mixture, 2), sample_bytes),
    }


def _read(mixture: Mixture) -> Any:
    return mixture_stream(mixture, rank=0, world_size=1, epochs=range(1))


def _loaded(mixture: Mixture, num_workers: int) -> Iterator[int]:
    with closing(_loader(mixture, num_workers).steps(range(1), 0)) as steps:
        for step in steps:
            yield sum(len(batch.keys) for batch in step)


def _rate(read: Callable[[], Iterable[int]], sample_bytes: float) -> dict[str, Any]:
    """Of all but what comes first, before which processes start; processor time is this process's own."""
    counts = iter(read())
    next(counts)
    wall, cpu = time.perf_counter(), time.process_time()
    num_samples = sum(counts)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {
        "samples_per_s": num_samples / wall,
        "mb_per_s": num_samples * sample_bytes / wall / 1e6,
        "processor_ms_a_sample": 1000 * cpu / num_samples,
    }


def measure_waiting(
    mixture: Mixture, paces: Sequence[tuple[float, int]] = ((12.5, 1), (25, 1), (25, 2), (50, 2))
) -> list[dict[str, float]]:
    """What share of its time a training process waits that uses so many samples a second, beside loader processes.

    A step has eight microbatches. It sleeps between steps, as one does whose GPU computes. What comes before its first
    data is given apart.
    """
    found = []
    for samples_per_s, num_workers in paces:
        begun = time.perf_counter()
        loader = _loader(mixture, num_workers)
        with closing(loader.steps(range(3), 0)) as steps:
            waits = []
            asked = begun
            for step in steps:
                waits.append(time.perf_counter() - asked)
                time.sleep(sum(len(batch.keys) for batch in step) / samples_per_s)
                asked = time.perf_counter()
            share = sum(waits[1:]) / (asked - begun - waits[0])
        pace = {"samples_per_s": samples_per_s, "loader_processes": num_workers}
        found.append({**pace, "first_batch_s": waits[0], "wait_share": share})
    return found


def measure_s3(root: Path, shape: Shape, cache: Path, sample_bytes: float) -> dict[str, Any]:
    """The same with everything in a bucket: with an empty cache, with a full one, and with one that holds a quarter."""
    with s3_server() as environment:
        os.environ.update(environment)
        os.environ["CDP_CACHE_DIR"] = str(cache)
        url = f"s3://{BUCKET}"
        store = open_store(url)
        for file in sorted(root.rglob("*")):
            if file.is_file():
                store.write(file.relative_to(root).as_posix(), file.read_bytes())
        # Two shards are mixed, so that few are needed at once and the others are loaded while these are read.
        mixture = _mixture(f"{url}/samples", f"{url}/targets", batch_size=16, shuffle_shards=2)

        def read() -> Iterator[int]:
            return map(len, _read(mixture))

        rates = {"empty_cache": _rate(read, sample_bytes), "full_cache": _rate(read, sample_bytes)}
        os.environ["CDP_CACHE_GB"] = str(shape.shards * shape.samples * sample_bytes / 4e9)
        os.environ["CDP_CACHE_DIR"] = str(cache / "bounded")
        rates["cache_of_a_quarter"] = _rate(read, sample_bytes)
        rates["cache_of_a_quarter"]["gb_left_in_it"] = (
            sum(f.stat().st_size for f in (cache / "bounded").rglob("*") if f.is_file()) / 1e9
        )
        return {"server": "moto, own process, same machine", "shuffle_shards": 2, **rates}


@contextmanager
def s3_server() -> Iterator[dict[str, str]]:
    """A server of moto in another process; the environment that opens it."""
    code = (
        "import sys; from moto.server import ThreadedMotoServer\n"
        "server = ThreadedMotoServer(ip_address='127.0.0.1', port=0, verbose=False)\n"
        "server.start(); print(*server.get_host_and_port(), flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True) as server:
        assert server.stdout is not None
        host, port = server.stdout.readline().split()
        endpoint = f"http://{host}:{port}"
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        opener.open(urllib.request.Request(f"{endpoint}/{BUCKET}", method="PUT")).close()
        yield {
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_ALLOW_HTTP": "true",
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_REGION": "us-east-1",
            "NO_PROXY": "127.0.0.1",
        }
        server.terminate()


def measure_resume(root: Path, repeats: int = 5) -> dict[str, Any]:
    """Until the first samples of a stream that begins at 1 % and at 99 % of an epoch, taken in turns."""
    mixture = _mixture(root / "samples", root / "targets", batch_size=1)
    steps = {0.01: math.ceil(0.01 * mixture.num_steps), 0.99: int(0.99 * mixture.num_steps)}
    wall: dict[float, list[float]] = {share: [] for share in steps}
    cpu: dict[float, list[float]] = {share: [] for share in steps}
    for _ in range(repeats):
        for share, step in steps.items():
            begun, used = time.perf_counter(), time.process_time()
            stream = mixture_stream(mixture, rank=0, world_size=1, epochs=range(1), start_step=step)
            with closing(iter(stream)) as batches:
                next(batches)
                wall[share].append(time.perf_counter() - begun)
                cpu[share].append(time.process_time() - used)
    order = [shard_rows(shard, LLAVA_SHARD_SIZE) for shard in range(LLAVA_SHARDS)]
    begun = time.process_time()
    epoch_order(order, 0, 0, 8)
    return {
        "steps_an_epoch": mixture.num_steps,
        "median_s": {f"{share:.0%}": float(np.median(wall[share])) for share in steps},
        "median_processor_s": {f"{share:.0%}": float(np.median(cpu[share])) for share in steps},
        "order_of_665k_samples_processor_s": time.process_time() - begun,
    }


def shuffle_quality(num_shards: int = LLAVA_SHARDS, size: int = LLAVA_SHARD_SIZE, batch: int = 128) -> dict[str, Any]:
    """How far apart neighbours of a shard end up in an epoch, and how mixed a batch is, against a full permutation."""
    parts = [shard_rows(shard, size) for shard in range(num_shards)]
    found = {}
    for shuffle_shards in (0, 1, 2, 8, 32, 128, num_shards):
        order = epoch_order(parts, 0, 0, shuffle_shards)
        place = np.empty((num_shards, size), dtype=np.int64)
        place[order[:, 0], order[:, 1]] = np.arange(len(order))
        apart = np.abs(np.diff(place, axis=1))
        whole = order[: len(order) // batch * batch, 0].reshape(-1, batch)
        found["full permutation" if shuffle_shards == num_shards else str(shuffle_shards)] = {
            "mean_samples_apart": float(apart.mean()),
            "neighbours_in_one_batch": float((np.diff(place // batch, axis=1) == 0).mean()),
            "shards_of_a_batch": float(np.mean([len(set(each)) for each in whole.tolist()])),
        }
    return {"shards": num_shards, "samples_a_shard": size, "batch": batch, "shuffle_shards": found}


def padding_saved(shape: Shape, num_samples: int = 65_536, batch: int = 128, microbatch: int = 8) -> dict[str, Any]:
    """Share of padding among the tokens of all microbatches, in the order of the stream and dealt out by length."""
    lengths = text_lengths(num_samples) + shape.image_tokens
    # A twentieth is text alone, as in LLaVA-665k.
    lengths[::17] -= shape.image_tokens
    found: dict[str, Any] = {"samples": num_samples, "batch": batch, "microbatch": microbatch}
    for ranks in (1, 8):
        shares = {}
        for by_length in (False, True):
            padded = 0
            for first in range(0, num_samples, batch):
                step = lengths[first : first + batch]
                for pieces in deal(len(step), microbatch, ranks, step if by_length else None):
                    padded += sum(len(piece) * int(step[piece].max()) for piece in pieces if len(piece))
            shares["by_length" if by_length else "as_they_come"] = 1 - lengths.sum() / padded
        found[f"padding_share_{ranks}_ranks"] = {name: float(share) for name, share in shares.items()}
    return found


def _mixture(samples: str | Path, targets: str | Path, *, batch_size: int, shuffle_shards: int = 4) -> Mixture:
    config = StreamConfig(
        seed=0, shuffle_shards=shuffle_shards, batch_size=batch_size, microbatch_size=8, bucket_by_length=True
    )
    return Mixture([Source(SampleSet.open(samples), TargetStore.open(targets))], config)


def _loader(mixture: Mixture, num_workers: int) -> StepLoader:
    reader = SampleReader(_Processor(), IMAGE_TOKEN, VOCABULARY)
    return StepLoader(
        mixture,
        Collator(reader),
        rank=0,
        world_size=1,
        device=CPU,
        config=LoaderConfig(num_workers=num_workers),
        with_maps=True,
    )


class _Processor:
    """The image half of a processor, at the published size."""

    image_token = "<image>"

    def __init__(self) -> None:
        self.image_processor = SiglipImageProcessorPil(size={"height": 384, "width": 384})

    def __call__(self, images: Sequence[Any], return_tensors: str, **_: Any) -> Any:
        return self.image_processor(images[0], return_tensors=return_tensors)


def _targets(
    key: str, shape: Shape, text: int, records: torch.Tensor, map_row: int, generator: torch.Generator
) -> SampleTargets:
    ids = torch.randint(0, 1000, (shape.image_tokens + text,), generator=generator, dtype=torch.int32)
    ids[10 : 10 + shape.image_tokens] = IMAGE_TOKEN
    answers = min(shape.answer_rows, text // 2)
    mask = torch.zeros(len(ids), dtype=torch.bool)
    mask[len(ids) - answers :] = True
    return SampleTargets(key, ids, mask, map_row, records[:answers])


def _conversation(key: str) -> dict[str, Any]:
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A picture. " * 30}]
    return {"id": key, "conversations": turns}


def _jpeg(side: int, seed: int) -> bytes:
    """About 150 kB: coarse shapes with some noise."""
    generator = np.random.default_rng(seed)
    coarse = Image.fromarray(generator.integers(0, 256, (24, 24, 3), dtype=np.uint8)).resize((side, side * 3 // 4))
    noisy = np.asarray(coarse).astype(np.int16) + generator.integers(-12, 13, (side * 3 // 4, side, 3))
    data = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(data, "JPEG", quality=88)
    return data.getvalue()


def _manifest(
    index: SampleIndex,
    layers: tuple[int, ...],
    windows: tuple[tuple[int, ...], ...],
    codec: MapCodecConfig,
    logits: LogitCodecConfig,
) -> Manifest:
    fingerprint = Fingerprint(
        teacher_weights="0" * 64,
        teacher_config={"model_type": "llava"},
        processor={},
        chat_template="",
        tokenizer="0" * 64,
        layers=layers,
        windows=windows,
        map_codec=codec,
        logit_codec=logits,
        dtype="float32",
        max_length=1536,
        cut="whole_turns",
        images=ImageConfig(),
        image_backend="pil",
        samples=index.digest,
        capture_version=1,
    )
    return Manifest(
        format_version=FORMAT_VERSION,
        fingerprint=fingerprint,
        num_layers=40,
        hidden_size=2560,
        num_shards=len(index.shards),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=Shape.shards)
    parser.add_argument("--samples", type=int, default=Shape.samples, help="of a shard, an even number")
    parser.add_argument("--image-tokens", type=int, default=Shape.image_tokens)
    parser.add_argument("--out", type=Path, default=RESULTS / "loader.json")
    flags = parser.parse_args()
    torch.set_num_threads(1)
    shape = Shape(shards=flags.shards, samples=flags.samples, image_tokens=flags.image_tokens)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "store"
        root.mkdir()
        make_store(root, shape)
        result = measure(root, shape, Path(folder) / "cache")
    save_result(flags.out, CPU, command_line("benchmarks.loader"), result)
    print(json.dumps(json.loads(flags.out.read_text()), indent=1))


if __name__ == "__main__":
    main()
