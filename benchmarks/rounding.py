"""What another order of the teacher's sums changes in what is stored: the size of what a batch size can do on a GPU.

On a CPU the batch size changes no byte. On a GPU the kernels follow the shape of a batch, and sums are rounded
differently. Here the same is brought about on any machine: every attention layer of the bundled scenes' teacher runs
with the fused kernel, and again with the textbook one.

    python -m benchmarks.rounding
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.results import RESULTS, command_line, save_result
from pipeline.demo.assets import TEACHER
from pipeline.demo.scenes.dataset import write_dataset
from stages.samples.pack import PackConfig, pack_samples
from stages.teacher.config import TeacherConfig
from stages.teacher.observe import Observer, ShardObservations
from stages.teacher.teacher import Teacher, load_teacher
from storage.codecs.answer_logits import AnswerLogitsCodec
from storage.codecs.attention_maps import EncodedMaps
from storage.codecs.codec_settings import MapCodecName
from storage.codecs.map_entries import code_squares
from storage.samples.sample_set import SampleSet
from storage.stores import open_store

DTYPES = ("float32", "bfloat16", "float16")


def measure(dtype: str, samples: Path, codec: MapCodecName) -> dict[str, Any]:
    """How the first shard differs between the two kernels."""
    settings = TeacherConfig(
        checkpoint=str(TEACHER),
        dtype=dtype,
        map_codec=codec,
        layers=(2, 3, 4, 5, 6),
        num_matched=3,
        top_k=32,
    )
    teacher = load_teacher(settings)
    fused, again = _observe(teacher, samples, None), _observe(teacher, samples, None)
    textbook = _observe(teacher, samples, SDPBackend.MATH)
    return {
        "samples": len(fused.samples),
        "maps": len(fused.maps),
        "rerun": _differences(teacher, fused, again),
        "other_kernel": _differences(teacher, fused, textbook),
    }


def _observe(teacher: Teacher, samples: Path, kernel: SDPBackend | None) -> ShardObservations:
    store = open_store(samples)
    with SampleSet.open(store).shard(0) as shard, Observer(teacher) as observer:
        if kernel is None:
            return observer.observe(shard)
        with sdpa_kernel(kernel):
            return observer.observe(shard)


def _differences(teacher: Teacher, one: ShardObservations, other: ShardObservations) -> dict[str, float]:
    codec = teacher.identity.map_codec
    codes, masks, values = [], [], []
    for a, b in zip(one.maps, other.maps, strict=True):
        codes.append((_codes(teacher, a) - _codes(teacher, b)).abs().flatten())
        masks.append((_masks(teacher, a) != _masks(teacher, b)).flatten())
        maps = [codec.decode(coded) for coded in (a, b)]
        values.append(float((maps[0] - maps[1]).norm() / maps[0].norm()))
    records = [torch.cat([sample.logits_RQ for sample in seen.samples]) for seen in (one, other)]
    first, second = (AnswerLogitsCodec(teacher.identity.logit_codec).decode(rows) for rows in records)
    same_R = (first.ids_RK == second.ids_RK).all(1)
    return {
        "codes_that_differ": float((torch.cat(codes) > 0).float().mean()),
        "largest_code_difference": float(torch.cat(codes).max()),
        "mask_bits_that_differ": float(torch.cat(masks).float().mean()),
        "largest_relative_map_difference": max(values),
        "answer_rows_with_other_tokens": float((~same_R).float().mean()),
        "largest_logprob_difference": float((first.logprobs_RK[:, 0] - second.logprobs_RK[:, 0]).abs().max()),
        "draws_that_differ": float((first.tail_ids[0] != second.tail_ids[0]).float().mean()),
    }


def _codes(teacher: Teacher, coded: EncodedMaps) -> torch.Tensor:
    return code_squares(teacher.identity.codec, coded.codes_LC, coded.num_tokens).sqrt()


def _masks(teacher: Teacher, coded: EncodedMaps) -> torch.Tensor:
    return teacher.identity.map_codec.decode_windows(coded)[1]


def make_samples(folder: Path, num_images: int) -> Path:
    """Scenes in one shard."""
    write_dataset(folder / "data", num_images, seed=0, num_pairs=1)
    pack_samples(folder / "data/train.json", folder / "data", folder / "samples", PackConfig())
    return folder / "samples"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=60)
    parser.add_argument("--codec", default="sqrt8", help="of the maps; 8 bits show more than 4")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=RESULTS / f"rounding-{device.type}.json")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        samples = make_samples(Path(folder), flags.images)
        result = {dtype: measure(dtype, samples, flags.codec) for dtype in DTYPES}
    save_result(flags.out, device, command_line("benchmarks.rounding"), {"codec": flags.codec, **result})
    print(flags.out.read_text())


if __name__ == "__main__":
    main()
