"""What 665,000 and 100,000,000 samples cost, out of measured rates and stated assumptions.

Writes the tables of docs/scale.md.

    python -m benchmarks.scale --measure    # what a sample index and packing weigh, into results/scale.json
    python -m benchmarks.scale              # the tables of docs/scale.md between their markers
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.driver_scale import FILES, OPEN, write_index
from benchmarks.memory import PeakMemory
from benchmarks.results import RESULTS, command_line, save_result
from stages.estimate.report import EstimateConfig
from stages.samples.pack import pack_samples
from storage.codecs.codec_settings import LogitCodecConfig
from storage.samples.index import INDEX_PATH, SampleIndex
from storage.stores import open_store
from storage.streaming.order import epoch_order, shard_rows
from storage.targets.layout import ARRAYS

DOCUMENT = Path(__file__).parent.parent / "docs" / "scale.md"
MARKED = re.compile(r"(<!-- (?P<name>[a-z]+): made by benchmarks/scale.py -->\n).*?(<!-- end -->)", re.DOTALL)
CONVERSATIONS = "conversations.jsonl"
MEGA, GIGA, TERA = 1e6, 1e9, 1e12


@dataclass(frozen=True)
class Assumed:
    """What no results file says. The teacher is that of the paper in size: 4B decoder, SigLIP at 384 pixels."""

    decoder_parameters: float = 4.0e9
    vision_parameters: float = 0.43e9
    image_tokens: int = 728
    captured_layers: int = 11
    vocabulary: int = 151_936
    text_tokens: float = 200
    answer_rows: float = 100
    samples_per_map: float = 2
    image_bytes: float = 150_000
    samples_per_shard: int = 512
    request_seconds: float = 0.05
    requests_at_once: int = 32
    """As `iter_commits` reads."""
    listed_at_once: int = 1000
    commit_bytes: int = 4400
    """As those of the bundled example's store; most of it names the files."""
    link_bytes_per_s: float = 10e9 / 8
    """10 Gbit/s, for each machine of 8 GPUs."""
    gpus_per_machine: int = 8


@dataclass(frozen=True)
class Plan:
    """One extraction."""

    name: str
    samples: int
    gpus: int


PLANS = (Plan("LLaVA-665k", 665_000, 8), Plan("100M samples", 100_000_000, 512))


def load_measured(folder: Path = RESULTS) -> dict[str, Any]:
    """The figures that the tables rest on, by results file."""
    names = ("attention_codes", "capture-cpu", "driver_scale", "extraction-cpu", "scale")
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in names}


def tables(measured: dict[str, Any]) -> dict[str, str]:
    """Name of a marked place -> the table in Markdown."""
    assumed, config = Assumed(), EstimateConfig()
    codecs = measured["attention_codes"]["synthetic"]["codecs"]
    seconds = seconds_per_sample(measured, assumed, config)
    small = small_bytes(assumed)
    codec_rows = []
    for name, codec in codecs.items():
        each = codec["bytes_a_sample"] / assumed.samples_per_map + small
        sizes = [f"{each * plan.samples / TERA:,.1f} TB" for plan in PLANS]
        codec_rows.append([f"`{name}`", f"{each / MEGA:.2f} MB", *sizes])
    a_sample = codecs["sqrt4"]["bytes_a_sample"] / assumed.samples_per_map + small
    opened = measured["driver_scale"]["growth"][OPEN.format(FILES[1])]
    return {
        "assumptions": _table(["assumed", "value"], _assumption_rows(assumed, config)),
        "codecs": _table(["codec", "a sample", *(plan.name for plan in PLANS)], codec_rows),
        "plans": _table(["", *(plan.name for plan in PLANS)], _plan_rows(measured, assumed, seconds, a_sample)),
        "shards": _table(
            [
                "samples a shard",
                "bytes a shard",
                "seconds of a GPU (assumed rate)",
                "shards of 100M",
                "objects of 100M",
                "memory of 100M's open records",
            ],
            [
                [
                    f"{size:,}",
                    f"{size * a_sample / MEGA:,.0f} MB",
                    f"{size * seconds:,.0f}",
                    f"{PLANS[-1].samples / size:,.0f}",
                    f"{PLANS[-1].samples / size * objects_per_shard():,.0f}",
                    f"{PLANS[-1].samples / size * opened['bytes_a_shard'] / MEGA:,.0f} MB",
                ]
                for size in (128, 512, 2048)
            ],
        ),
    }


def seconds_per_sample(measured: dict[str, Any], assumed: Assumed, config: EstimateConfig) -> float:
    """Of one GPU: two operations for each weight and position, at the stated efficiency, with capture and waiting."""
    tokens = assumed.image_tokens + assumed.text_tokens
    operations = 2 * (assumed.decoder_parameters * tokens + assumed.vision_parameters * assumed.image_tokens)
    bare = operations / (config.gpu_tflops * TERA * config.efficiency)
    waited = measured["extraction-cpu"]["teacher_waited_share"]
    return float(bare * measured["capture-cpu"]["capture_over_sdpa"] / (1 - waited))


def small_bytes(assumed: Assumed) -> float:
    """Of a sample: answer rows as the codec makes them, and tokens before zstd."""
    row_bytes = LogitCodecConfig(vocab_size=assumed.vocabulary).row_bytes
    return assumed.answer_rows * row_bytes + 5 * (assumed.image_tokens + assumed.text_tokens)


def objects_per_shard() -> int:
    """Data and metadata of each array, the group's, and the commit record."""
    return 2 * len(ARRAYS) + 2


def _plan_rows(measured: dict[str, Any], assumed: Assumed, seconds: float, a_sample: float) -> list[list[str]]:
    index, packing, order = (measured["scale"][name] for name in ("index", "packing", "order"))
    opened = measured["driver_scale"]["growth"][OPEN.format(FILES[1])]
    columns = []
    for plan in PLANS:
        shards = -(-plan.samples // assumed.samples_per_shard)
        machine_bytes = assumed.gpus_per_machine / seconds * (a_sample + assumed.image_bytes)
        records = shards * assumed.commit_bytes
        shards_a_second = plan.gpus / seconds / assumed.samples_per_shard
        columns.append(
            {
                "GPU-hours, at the assumed rate": f"{plan.samples * seconds / 3600:,.0f}",
                f"days on {' or '.join(str(p.gpus) for p in PLANS)} GPUs, at that rate": (
                    f"{plan.samples * seconds / 86400 / plan.gpus:.1f} ({plan.gpus} GPUs)"
                ),
                "target store, `sqrt4`": f"{plan.samples * a_sample / TERA:.1f} TB",
                "sample shards": f"{plan.samples * assumed.image_bytes / TERA:.1f} TB",
                "shards": f"{shards:,}",
                "objects, and PUT requests at least": f"{shards * objects_per_shard():,}",
                "PUT requests a second, at that rate": f"{shards_a_second * objects_per_shard():,.1f}",
                "written a second, at that rate": f"{plan.gpus / seconds * a_sample / MEGA:,.0f} MB",
                "read a second, at that rate": f"{plan.gpus / seconds * assumed.image_bytes / MEGA:,.0f} MB",
                "share of a machine's link (assumed), at that rate": f"{machine_bytes / assumed.link_bytes_per_s:.0%}",
                "shards the driver sees finish a second, at that rate": f"{shards_a_second:.2f}",
                "LIST requests for the commit records": f"{-(-shards // assumed.listed_at_once):,}",
                "commit records": f"{records / MEGA:,.0f} MB",
                "fetching all of them, at the assumed time of a request": (
                    f"{shards * assumed.request_seconds / assumed.requests_at_once:,.0f} s"
                ),
                "checking them, processor time, measured": f"{shards * opened['cpu_us_a_shard'] / MEGA:,.0f} s",
                "their memory in every process that opens the store, measured": (
                    f"{shards * opened['bytes_a_shard'] / MEGA:,.0f} MB"
                ),
                "`index.json` of the samples": f"{shards * index['bytes_a_shard'] / MEGA:,.1f} MB",
                "loading it in every worker, processor time, measured": f"{shards * index['cpu_s_a_shard']:,.1f} s",
                "its memory in every worker, measured": f"{shards * index['memory_bytes_a_shard'] / MEGA:,.0f} MB",
                "memory of an epoch's order in a process that streams, measured": (
                    f"{plan.samples * order['memory_bytes_a_sample'] / GIGA:,.2f} GB"
                ),
                "memory of `cdp pack-samples`, measured": (
                    f"{plan.samples * packing['memory_bytes_a_sample'] / GIGA:,.1f} GB"
                ),
            }
        )
    return [[name, *(column[name] for column in columns)] for name in columns[0]]


def _assumption_rows(assumed: Assumed, config: EstimateConfig) -> list[list[str]]:
    return [
        [
            "teacher",
            f"{assumed.decoder_parameters / GIGA:g}B decoder, {assumed.vision_parameters / GIGA:g}B vision tower",
        ],
        ["a GPU", f"{config.gpu_tflops:g} TFLOP/s at {config.efficiency:.0%} (no GPU was measured)"],
        [
            "a sample",
            f"{assumed.image_tokens} image tokens, {assumed.text_tokens:g} others, {assumed.answer_rows:g} answer rows",
        ],
        ["samples that share a map", f"{assumed.samples_per_map:g}"],
        ["an image", f"{assumed.image_bytes / 1000:g} kB"],
        ["samples a shard", f"{assumed.samples_per_shard}"],
        ["a request", f"{assumed.request_seconds * 1000:g} ms, {assumed.requests_at_once} at once"],
        ["a commit record", f"{assumed.commit_bytes / 1000:g} kB"],
        ["a machine", f"{assumed.gpus_per_machine} GPUs, {assumed.link_bytes_per_s * 8 / GIGA:g} Gbit/s"],
    ]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def rendered(document: str, made: dict[str, str]) -> str:
    """The document with each marked place filled; every table has one, and every place a table."""
    places = [match["name"] for match in MARKED.finditer(document)]
    if sorted(places) != sorted(made):
        raise ValueError(f"the document has places for {places}, the tables are {list(made)}")
    return MARKED.sub(lambda match: f"{match[1]}{made[match['name']]}{match[3]}", document)


def measure_index(folder: Path) -> dict[str, float]:
    """Bytes, CPU seconds and peak memory of loading `index.json`, for each shard; to be called in a fresh process."""
    memory, started = PeakMemory(), time.process_time()
    index = SampleIndex.load(open_store(folder))
    seconds = time.process_time() - started
    return {
        "shards": len(index.shards),
        "bytes_a_shard": (folder / INDEX_PATH).stat().st_size / len(index.shards),
        "cpu_s_a_shard": seconds / len(index.shards),
        "memory_bytes_a_shard": memory.grown_bytes / len(index.shards),
    }


def measure_packing(folder: Path) -> dict[str, float]:
    """Peak memory of packing the conversations in `folder`, for each; to be called in a fresh process."""
    memory = PeakMemory()
    report = pack_samples(folder / CONVERSATIONS, folder, folder / "samples")
    return {"samples": report.num_samples, "memory_bytes_a_sample": memory.grown_bytes / report.num_samples}


def measure_order(num_shards: int) -> dict[str, float]:
    """Peak memory and CPU seconds of working out an epoch's order, for each sample; to be called in a fresh process."""
    size = Assumed().samples_per_shard
    memory, started = PeakMemory(), time.process_time()
    order = epoch_order([shard_rows(shard, size) for shard in range(num_shards)], 0, 0, 8)
    return {
        "samples": len(order),
        "cpu_s_a_sample": (time.process_time() - started) / len(order),
        "memory_bytes_a_sample": memory.grown_bytes / len(order),
    }


def write_conversations(folder: Path, num_samples: int) -> None:
    """Without images, each a group of its own, of which packing holds most."""
    turns = [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "A word."}]
    with (folder / CONVERSATIONS).open("w") as file:
        for number in range(num_samples):
            file.write(json.dumps({"id": f"{number:09d}", "conversations": turns}) + "\n")


def _measured_alone(what: str, value: object) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.scale", what, str(value)]
    found: dict[str, float] = json.loads(subprocess.check_output(command, text=True))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--shards", type=int, default=195_313, help="of the index that is measured")
    parser.add_argument("--samples", type=int, default=200_000, help="that are packed")
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--pack", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--order", type=int, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.load is not None:
        print(json.dumps(measure_index(flags.load)))
    elif flags.pack is not None:
        print(json.dumps(measure_packing(flags.pack)))
    elif flags.order is not None:
        print(json.dumps(measure_order(flags.order)))
    elif flags.measure:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_index(folder / "index", flags.shards, Assumed().samples_per_shard)
            write_conversations(folder, flags.samples)
            found = {
                "index": _measured_alone("--load", folder / "index"),
                "packing": _measured_alone("--pack", folder),
                "order": _measured_alone("--order", flags.shards // 10),
            }
        save_result(RESULTS / "scale.json", torch.device("cpu"), command_line("benchmarks.scale"), found)
    else:
        DOCUMENT.write_text(rendered(DOCUMENT.read_text(), tables(load_measured())))


if __name__ == "__main__":
    main()
