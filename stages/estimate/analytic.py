"""An extraction's bytes and seconds from configs alone, for a teacher whose weights are not here; much less exact.

Shape letters: T tokens, N image tokens, L captured layers, R answer rows.
"""

from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from stages.conversations.encoder import ConversationEncoder
from stages.estimate.extrapolate import METADATA, answer_bytes, longest_share
from stages.estimate.report import Estimate, EstimateConfig, SettingEstimate, unusable_fields
from stages.estimate.sampling import Counts, SetCounts, sample_set
from stages.teacher.identity import TeacherConfig, TeacherIdentity, identify_teacher
from storage.codecs.config import MapCodecName, num_entries
from storage.errors import UserError
from storage.progress import SILENT, Progress
from storage.samples.sample_set import SampleSet
from storage.targets.layout import ARRAYS

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

Work = dict[str, float]
"""Floating-point operations of the teacher on one sample, by the part that does them."""


def estimate_from_configs(
    settings: TeacherConfig,
    samples: SampleSet | None,
    config: EstimateConfig,
    *,
    workers: int,
    progress: Progress = SILENT,
) -> Estimate:
    """What a whole extraction takes, without the teacher's weights.

    Args:
        settings: as for extraction; only config and processor of the checkpoint are read.
        samples: the sample set, read and tokenised as for a measurement; None takes the numbers of `config`.
        config: what is assumed.
        workers: GPUs side by side.
        progress: where the samples read are shown.

    Raises:
        UserError: If neither samples nor their number are given, or extraction would refuse the teacher.
    """
    identity = identify_teacher(settings, on_gpu=True, with_weights=False)
    encoder = ConversationEncoder(identity.processor, identity.config.image_token_id, settings.max_length)
    assumed: tuple[str, ...] = ()
    if samples is not None:
        held = sample_set(samples, encoder, config, causal=identity.codec.causal, progress=progress)
    elif config.samples is not None:
        image = Image.new("RGB", PHOTOGRAPH, "gray")
        num_image_tokens = len(encoder.encode_pair("What is this?", "A picture.", [image]).image_positions)
        held = _assumed(config, config.samples, num_image_tokens, causal=identity.codec.causal)
        assumed = (_assumptions(config, num_image_tokens),)
    else:
        raise UserError(
            "neither sample shards nor how many samples there will be: give --samples, or --set estimate.samples=NUMBER"
        )
    # A sample without an image has none to look at; the map is taken once for all who share it.
    work = forward_work(identity, held.per_sample)
    seconds = sum(work.values()) / (config.gpu_tflops * 1e12 * config.efficiency)
    num_rows = held.per_sample["answer_rows"] * held.num_samples
    return Estimate(
        basis="analytic",
        teacher=settings.checkpoint,
        samples_url=None if samples is None else samples.store.url,
        num_samples=held.num_samples,
        num_shards=len(held.shard_sizes),
        num_sampled=held.num_read,
        num_measured=0,
        per_sample=held.per_sample,
        **unusable_fields(held.skipped),
        device=f"GPU of {config.gpu_tflops:g} TFLOP/s at {config.efficiency:.0%}",
        workers=workers,
        threads=1,
        load_seconds=0.0,
        teacher_seconds_per_sample=seconds,
        coding_seconds_per_map={},
        writing_seconds_per_shard={},
        chosen=settings.map_codec,
        settings={name: _setting(identity, name, held, seconds, workers) for name in BYTES_PER_ENTRY},
        answer_bytes_by_top_k=answer_bytes(identity.logit_codec, num_rows, 1.0),
        files_per_shard=2 * len(ARRAYS) + 2,
        notes=(
            "computed from configs alone, so only roughly; `cdp estimate` with the weights measures instead",
            _shares_of(work),
            f"{config.gpu_tflops:g} TFLOP/s at an efficiency of {config.efficiency:.0%} are assumed, not measured",
            "bytes of maps as measured on synthetic ones of 728 image tokens (benchmarks/results/attention_codes.json)",
            "bytes of answer rows and tokens are those before zstd",
            *assumed,
            *identity.notes,
        ),
    )


def forward_work(identity: TeacherIdentity, per_sample: Counts) -> Work:
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
    tokens, maps = per_sample["tokens"], per_sample["maps"]
    positions = max(per_sample["image_tokens"] / maps, _patches(identity.config)) if maps else 0.0
    return {
        "decoder": 2.0 * decoder * tokens + 2.0 * text.num_hidden_layers * width * tokens**2,
        "vision": 2.0 * vision * positions,
        "answers": 2.0 * text.vocab_size * text.hidden_size * per_sample["answer_rows"],
        "maps": 2.0 * len(identity.layers) * width * per_sample["map_entries"],
    }


def _patches(config: Any) -> int:
    """Positions of the vision tower where its config says so; there may be more than tokens that leave it."""
    vision = getattr(config, "vision_config", None)
    size, patch = getattr(vision, "image_size", None), getattr(vision, "patch_size", None)
    return (size // patch) ** 2 if isinstance(size, int) and isinstance(patch, int) else 0


def _assumed(config: EstimateConfig, num_samples: int, num_image_tokens: int, *, causal: bool) -> SetCounts:
    full, rest = divmod(num_samples, config.samples_per_shard)
    maps = 1 / config.samples_per_map
    per_sample = {
        "samples": 1.0,
        "tokens": config.text_tokens + num_image_tokens,
        "answer_rows": config.answer_rows,
        "maps": maps,
        "image_tokens": maps * num_image_tokens,
        "map_entries": maps * num_entries(num_image_tokens, causal),
    }
    return SetCounts([config.samples_per_shard] * full + ([rest] if rest else []), per_sample)


def _shares_of(work: Work) -> str:
    total = sum(work.values())
    shares = ", ".join(f"{name} {part / total:.1%}" for name, part in work.items())
    return f"{total / 1e12:.3g} TFLOP a sample: {shares}"


def _assumptions(config: EstimateConfig, num_image_tokens: int) -> str:
    return (
        f"assumed: {config.text_tokens:g} text tokens, {config.answer_rows:g} answer rows, "
        f"{config.samples_per_map:g} samples a map; {num_image_tokens} image tokens are the processor's for an image "
        f"of {PHOTOGRAPH[0]}x{PHOTOGRAPH[1]}"
    )


def _setting(
    identity: TeacherIdentity, codec: MapCodecName, held: SetCounts, seconds: float, workers: int
) -> SettingEstimate:
    """The whole extraction with one codec, at so many seconds of the teacher for a sample."""
    each, num_samples = held.per_sample, held.num_samples
    entries = each["map_entries"] * len(identity.layers)
    by_array = {
        "maps and windows": round(num_samples * entries * BYTES_PER_ENTRY[codec]),
        "logit_records": round(num_samples * each["answer_rows"] * identity.logit_codec.row_bytes),
        "tokens": round(num_samples * each["tokens"] * TOKEN_BYTES),
        METADATA: len(held.shard_sizes) * len(ARRAYS) * METADATA_BYTES_PER_ARRAY,
    }
    total = sum(by_array.values())
    return SettingEstimate(
        shard_bytes=total,
        shard_bytes_95=None,
        bytes_by_array=by_array,
        store_bytes=total,
        worker_seconds=seconds * num_samples,
        wall_seconds=seconds * num_samples * longest_share(held.shard_sizes, workers),
    )
