"""What answer attention costs: its share of a store's bytes, its capture's time, and what 16 bits change of sinks.

Of the bundled teacher the share is measured in stores that extraction writes. Of a teacher of 40 layers and images of
728 tokens it is computed: maps as `attention_codes` measured them, vectors as the writer stores them here, answer rows
and tokens before zstd. A vector there is the mean of the last 32 queries of a synthetic map.

    python -m benchmarks.answer_attention
"""

import argparse
import json
import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from numcodecs.zstd import Zstd
from torch import Tensor

from benchmarks.attention_maps import MapSet, synthetic_maps
from benchmarks.results import RESULTS, Spent, command_line, interleaved, median_ratio, save_result, spent
from pipeline.demo.assets import TEACHER
from pipeline.demo.scenes.dataset import write_dataset
from pipeline.extraction.shard_extractor import ShardExtractor
from stages.attention.capture import AttentionCapture, image_block_maps
from stages.attention.text_rows import AnswerQueries, answer_attention
from stages.samples.pack import PackConfig, pack_samples
from stages.student.losses.attention import answer_loss
from stages.teacher.config import TeacherConfig
from stages.teacher.identity import identify_teacher
from storage.codecs.codec_settings import LogitCodecConfig
from storage.codecs.sinks import sink_threshold
from storage.codecs.windows import window_means, window_rows
from storage.samples.index import SampleIndex
from storage.stores import open_store
from storage.targets.layout import ANSWER_ARRAYS
from storage.targets.manifest import create_or_check
from storage.targets.summary import summarize

CODECS = ("sqrt8", "sqrt4")
LAST_QUERIES, CAPTURES = 32, 51
ROWS_AN_ANSWER, TEXT_TOKENS, TOKEN_BYTES, VOCABULARY = 20, 60, 5, 151_936
"""Of a sample of 728 image tokens, beside its map: rows of each answer, and text without them."""
CHECKSUM_BYTES, INDEX_BYTES = 4, 16
_ZSTD = Zstd(level=1)
CASES = {"a caption, its own image": (1, 1), "one answer, two samples an image": (1, 2),
         "five answers, two samples an image": (5, 2)}  # fmt: skip
"""Answers of a sample, and samples that share a map."""


def measure_scenes(folder: Path, images: int, repeats: int) -> dict[str, Any]:
    """Bytes of stores of the bundled example with and without, and processor time of making one."""
    write_dataset(folder / "data", images, seed=0, num_pairs=1)
    pack_samples(folder / "data/train.json", folder / "data", folder / "samples", PackConfig())
    made = iter(range(10**6))
    found: dict[str, Any] = {}
    for codec in CODECS:
        out = folder / codec
        extract(folder / "samples", out, map_codec=codec, answer_attention=True)
        summary = summarize(out)
        stored = sum(summary.array_bytes[spec.name] for spec in ANSWER_ARRAYS)
        found[codec] = {
            "samples": summary.num_samples,
            "maps": summary.num_maps,
            "answer_attention_bytes": stored,
            "store_bytes": summary.total_bytes,
            "share": stored / summary.total_bytes,
        }

    def timed(on: bool) -> float:
        return extract(folder / "samples", folder / f"timed-{next(made)}", answer_attention=on).cpu_s

    cpu_s = interleaved({"without": partial(timed, False), "with": partial(timed, True)}, repeats)
    found["processor_time_over_without"] = median_ratio(cpu_s["with"], cpu_s["without"])
    return found


def extract(samples: Path, out: Path, **settings: Any) -> Spent:
    """All shards of the bundled teacher's targets, in this process; what they took once the teacher was loaded."""
    given = {"layers": (2, 3, 4, 5, 6), "num_matched": 3, "max_length": 512, **settings}
    teacher = TeacherConfig.model_validate({"checkpoint": str(TEACHER), **given})
    index = SampleIndex.load(open_store(samples))
    manifest = identify_teacher(teacher, on_gpu=False).manifest(index.digest, len(index.shards))
    create_or_check(open_store(out), manifest)
    worker = ShardExtractor(teacher, str(samples), str(out), manifest, torch.get_num_threads())
    taken = spent(lambda: [worker(shard, lambda _: None) for shard in range(len(index.shards))])
    worker.observer.close()
    return taken


def time_capture(num_tokens: int, repeats: int) -> float:
    """Processor time of the vectors of two answers over that of the map, of one layer with 14 heads and 2 for keys."""
    first, last = TEXT_TOKENS // 2, TEXT_TOKENS + num_tokens
    images_N = torch.arange(first, first + num_tokens)
    rows_U = torch.cat([torch.arange(at, at + ROWS_AN_ANSWER) for at in (last, last + 2 * ROWS_AN_ANSWER)])
    queries = [AnswerQueries(rows_U, (ROWS_AN_ANSWER,) * 2, images_N)]
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, heads, int(rows_U[-1]) + 2, 64, generator=generator) for heads in (14, 2))
    capture = AttentionCapture(frozenset({0}), [images_N])
    ways = {
        "answers": lambda: spent(lambda: answer_attention(query, key, None, queries, 0.125)).cpu_s,
        "map": lambda: spent(lambda: image_block_maps(query, key, None, capture, 0.125)).cpu_s,
    }
    with torch.inference_mode():
        cpu_s = interleaved(ways, repeats)
    return median_ratio(cpu_s["answers"], cpu_s["map"])


def compute_large(data: MapSet) -> dict[str, Any]:
    """Share of the bytes of a sample of 728 image tokens, by codec and case."""
    vectors_LaN = torch.stack([answer_vectors(maps) for maps in data.maps], 1).half()
    answer_bytes = vector_bytes(vectors_LaN) / len(data.maps)
    codecs = json.loads((RESULTS / "attention_codes.json").read_text())["synthetic"]["codecs"]
    row_bytes = LogitCodecConfig(vocab_size=VOCABULARY).row_bytes
    num_tokens = vectors_LaN.shape[-1]
    shares = {}
    for codec in CODECS:
        for case, (answers, sharing) in CASES.items():
            rows = answers * ROWS_AN_ANSWER
            others = codecs[codec]["bytes_a_sample"] / sharing + rows * row_bytes
            others += (num_tokens + TEXT_TOKENS + rows) * TOKEN_BYTES
            shares[f"{codec}, {case}"] = answers * answer_bytes / (answers * answer_bytes + others)
    return {"image_tokens": num_tokens, "layers": len(data.layers), "bytes_an_answer": answer_bytes, "share": shares}


def answer_vectors(maps_LNN: Tensor) -> Tensor:
    """`[L, N]`: what stands for the mean over an answer's rows."""
    return maps_LNN[:, -LAST_QUERIES:].mean(1)


def vector_bytes(vectors_LaN: Tensor) -> int:
    """Bytes on disk of these answers, each a chunk with a checksum and an entry in the index of chunks."""
    chunks = [vectors_LaN[:, answer].contiguous().numpy() for answer in range(vectors_LaN.shape[1])]
    return sum(len(_ZSTD.encode(chunk)) + CHECKSUM_BYTES + INDEX_BYTES for chunk in chunks)


def compare_sinks(data: MapSet) -> dict[str, float]:
    """Sinks told by values in 16 bits against those of the exact ones, and the loss's gradient with both."""
    rows, cosines, differing, total = window_rows(data.layers, data.windows), [], 0, 0
    generator = torch.Generator().manual_seed(0)
    for maps_LNN in data.maps:
        exact_LaN = answer_vectors(maps_LNN)[:, None]
        windows = [window_means(values, rows) for values in (exact_LaN, exact_LaN.half())]
        keep = [one <= sink_threshold(one, one.shape[-1])[..., None] for one in windows]
        differing, total = differing + int((keep[0] ^ keep[1]).sum()), total + keep[0].numel()
        student_WaN = torch.randn(windows[0].shape, generator=generator).softmax(-1).requires_grad_()
        found = [torch.autograd.grad(answer_loss(student_WaN, one).sum(), student_WaN)[0] for one in windows]
        expected, coded = (one.double().flatten() for one in found)
        cosines.append(float(torch.cosine_similarity(expected, coded, dim=0)))
    return {
        "entries": total,
        "other_sinks": differing,
        "gradient_cosine_median": statistics.median(cosines),
        "gradient_cosine_least": min(cosines),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=200, help="scenes of the bundled teacher")
    parser.add_argument("--samples", type=int, default=6, help="synthetic samples")
    parser.add_argument("--image-tokens", type=int, default=728)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS / "answer_attention.json")
    flags = parser.parse_args()
    synthetic = synthetic_maps(flags.image_tokens, flags.samples)
    with tempfile.TemporaryDirectory() as folder:
        result = {
            "scenes": measure_scenes(Path(folder), flags.images, flags.repeats),
            "synthetic": compute_large(synthetic),
            "capture_over_that_of_the_map": time_capture(flags.image_tokens, CAPTURES),
            "sinks": compare_sinks(synthetic),
        }
    save_result(flags.out, torch.device("cpu"), command_line("benchmarks.answer_attention"), result)
    print(flags.out.read_text())


if __name__ == "__main__":
    main()
