"""An extraction's bytes and seconds from configs alone, for a teacher whose weights are not here. Coarse.

Shape letters: T tokens, N image tokens, L captured layers, R answer rows.
"""

from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from stages.conversations import ConversationEncoder
from stages.estimate.extrapolate import answer_bytes, longest_share
from stages.estimate.report import Estimate, EstimateConfig, SettingEstimate
from stages.estimate.sampling import UNITS, count_runs, plan_runs
from stages.teacher.identity import TeacherConfig, TeacherIdentity, identify_teacher
from storage.codecs.config import MapCodecName, num_entries
from storage.errors import UserError
from storage.samples.index import SampleIndex
from storage.stores import Store
from storage.targets.layout import ARRAYS
from storage.targets.sample_targets import SkippedSample

BYTES_PER_ENTRY: dict[MapCodecName, float] = {
    "float16": 1.77782,
    "sqrt8": 0.86340,
    "sqrt4": 0.42269,
    "sqrt2": 0.22282,
}
"""Of an entry of one captured layer's map, with all that is stored of the windows; from
`benchmarks/results/attention_codes.json`, synthetic maps of 728 image tokens. A test compares them."""

METADATA_BYTES_PER_ARRAY = 800
"""A `zarr.json`, as in the dump of FORMAT.md."""
TOKEN_BYTES = 5
"""Id and answer mask, before zstd."""
PHOTOGRAPH = (640, 480)
"""Size of the image that stands for all, for processors whose number of tokens depends on it."""


@dataclass(frozen=True)
class Work:
    """Floating-point operations of the teacher on one sample."""

    decoder: float
    vision: float
    head: float
    capture: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.decoder + self.vision + self.head + self.capture


def estimate_from_configs(
    settings: TeacherConfig, samples: Store | None, config: EstimateConfig, *, workers: int
) -> Estimate:
    """What a whole extraction takes, without the teacher's weights.

    Args:
        settings: as for extraction; of the checkpoint only config and processor are read.
        samples: the sample set, read and tokenised as for a probe; None takes the numbers of `config`.
        config: what is assumed.
        workers: GPUs side by side.

    Raises:
        UserError: neither samples nor their number, or a teacher that extraction would refuse.
    """
    identity = identify_teacher(settings, on_gpu=True, with_weights=False)
    encoder = ConversationEncoder(identity.processor, identity.config.image_token_id, settings.max_length)
    skipped: list[SkippedSample] = []
    num_read = 0
    if samples is not None:
        index = SampleIndex.load(samples)
        shard_sizes = [entry.num_samples for entry in index.shards]
        runs = plan_runs(index.num_samples, config.runs, config.counted_samples, config.seed)
        counted = count_runs(samples, index, encoder, runs, causal=identity.codec.causal)
        num_read = sum(run.num_read for run in counted)
        per_sample = {unit: sum(run.counts[unit] for run in counted) / num_read for unit in UNITS}
        skipped = [one for run in counted for one in run.skipped]
        maps = per_sample["maps"]
        num_image_tokens = per_sample["image_tokens"] / maps if maps else 0.0
    elif config.samples is not None:
        full = [config.samples_per_shard] * (config.samples // config.samples_per_shard)
        rest = config.samples - sum(full)
        shard_sizes = [*full, rest] if rest else full
        num_image_tokens = _image_tokens(encoder)
        per_sample = _assumed(config, int(num_image_tokens), causal=identity.codec.causal)
    else:
        raise UserError(
            "neither sample shards nor how many samples there will be: give --samples, or --set estimate.samples=NUMBER"
        )
    num_samples = sum(shard_sizes)
    # A sample without an image has none to look at; the map is taken once for all who share it.
    work = forward_work(identity, per_sample, num_image_tokens)
    seconds = work.total / (config.gpu_tflops * 1e12 * config.efficiency)
    share = longest_share(shard_sizes, workers)
    return Estimate(
        basis="configs",
        teacher=settings.checkpoint,
        samples_url=None if samples is None else samples.url,
        num_samples=num_samples,
        num_shards=len(shard_sizes),
        counted_samples=num_read,
        probed_samples=0,
        per_sample=per_sample,
        unusable=_by_reason(skipped),
        unusable_examples=tuple(f"{one.key}: {one.reason}: {one.detail}" for one in skipped[:5]),
        device=f"GPU of {config.gpu_tflops:g} TFLOP/s at {config.efficiency:.0%}",
        workers=workers,
        threads=1,
        load_seconds=0.0,
        teacher_seconds_per_sample=seconds,
        coding_seconds_per_map={},
        writing_seconds_per_shard={},
        chosen=settings.map_codec,
        settings={
            name: _setting(identity, name, per_sample, num_samples, len(shard_sizes), seconds, share)
            for name in BYTES_PER_ENTRY
        },
        answer_bytes_by_top_k=answer_bytes(identity.logit_codec, per_sample["answer_rows"] * num_samples, 1.0),
        files_per_shard=2 * len(ARRAYS) + 2,
        notes=(
            "coarse: from configs alone; `cdp estimate` with the weights measures instead",
            _shares_of(work),
            f"{config.gpu_tflops:g} TFLOP/s at an efficiency of {config.efficiency:.0%} are assumed, not measured",
            "bytes of maps as measured on synthetic ones of 728 image tokens (benchmarks/results/attention_codes.json)",
            "records of answer rows and tokens as before zstd",
        )
        + (() if samples is not None else (_assumptions(config, num_image_tokens),))
        + identity.notes,
    )


def forward_work(identity: TeacherIdentity, per_sample: dict[str, float], num_image_tokens: float) -> Work:
    """Two operations for each weight and position, and attention's products with causality used.

    A mixture of experts is counted as if every expert worked.
    """
    text = identity.config.get_text_config()
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(
            identity.config, trust_remote_code=identity.settings.trust_remote_code
        )
    embeddings = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    vision = decoder = 0
    for name, weight in model.named_parameters():
        if name.startswith(identity.family.vision_prefixes):
            vision += weight.numel()
        elif id(weight) not in embeddings:
            decoder += weight.numel()
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    width = text.num_attention_heads * head_dim
    tokens, rows = per_sample["tokens"], per_sample["answer_rows"]
    has_image = 1.0 if num_image_tokens else 0.0
    return Work(
        decoder=2.0 * decoder * tokens + 2.0 * text.num_hidden_layers * width * tokens**2,
        vision=2.0 * vision * max(num_image_tokens, _patches(identity.config)) * has_image,
        head=2.0 * text.vocab_size * text.hidden_size * rows,
        capture=2.0 * len(identity.layers) * width * per_sample["map_entries"],
    )


def _patches(config: Any) -> int:
    """Positions of the vision tower where its config says so; there may be more than tokens that leave it."""
    vision = getattr(config, "vision_config", None)
    size, patch = getattr(vision, "image_size", None), getattr(vision, "patch_size", None)
    return (size // patch) ** 2 if isinstance(size, int) and isinstance(patch, int) else 0


def _image_tokens(encoder: ConversationEncoder) -> float:
    image = Image.new("RGB", PHOTOGRAPH, "gray")
    return float(len(encoder.encode_pair("What is this?", "A picture.", [image]).image_positions))


def _assumed(config: EstimateConfig, num_tokens: int, *, causal: bool) -> dict[str, float]:
    maps = 1 / config.samples_per_map
    return {
        "samples": 1.0,
        "tokens": config.text_tokens + num_tokens,
        "answer_rows": config.answer_rows,
        "maps": maps,
        "image_tokens": maps * num_tokens,
        "map_entries": maps * num_entries(num_tokens, causal),
    }


def _shares_of(work: Work) -> str:
    parts = {"decoder": work.decoder, "vision": work.vision, "answers": work.head, "maps": work.capture}
    shares = ", ".join(f"{name} {part / work.total:.1%}" for name, part in parts.items())
    return f"{work.total / 1e12:.3g} TFLOP a sample: {shares}"


def _assumptions(config: EstimateConfig, num_image_tokens: float) -> str:
    return (
        f"assumed: {config.text_tokens:g} text tokens, {config.answer_rows:g} answer rows, "
        f"{config.samples_per_map:g} samples a map; {num_image_tokens:g} image tokens are the processor's for an image "
        f"of {PHOTOGRAPH[0]}x{PHOTOGRAPH[1]}"
    )


def _setting(
    identity: TeacherIdentity,
    codec: MapCodecName,
    per_sample: dict[str, float],
    num_samples: int,
    num_shards: int,
    seconds: float,
    share: float,
) -> SettingEstimate:
    entries = per_sample["map_entries"] * len(identity.layers)
    by_array = {
        "maps and windows": round(num_samples * entries * BYTES_PER_ENTRY[codec]),
        "logit_records": round(num_samples * per_sample["answer_rows"] * identity.logit_codec.row_bytes),
        "tokens": round(num_samples * per_sample["tokens"] * TOKEN_BYTES),
        "(metadata)": num_shards * len(ARRAYS) * METADATA_BYTES_PER_ARRAY,
    }
    total = sum(by_array.values())
    return SettingEstimate(
        shard_bytes=total,
        shard_bytes_95=None,
        bytes_by_array=by_array,
        store_bytes=total,
        worker_seconds=seconds * num_samples,
        wall_seconds=seconds * num_samples * share,
    )


def _by_reason(skipped: list[SkippedSample]) -> dict[str, int]:
    reasons = [one.reason for one in skipped]
    return {reason: reasons.count(reason) for reason in sorted(set(reasons))}
