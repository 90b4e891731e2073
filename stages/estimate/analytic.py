"""An extraction's bytes and seconds from configs alone, for a teacher whose weights are not here; much less exact."""

from collections.abc import Sequence
from typing import get_args

from PIL import Image
from transformers import PreTrainedModel

from stages.estimate.extrapolate import CodecCost, extrapolate
from stages.estimate.memory import empty_model, memory_notes, split_notes, teacher_memory
from stages.estimate.report import Estimate, EstimateConfig, TeacherCost
from stages.estimate.sampling import Counts, SetCounts, count_blocks, count_units, plan_blocks
from stages.teacher.config import TeacherConfig
from stages.teacher.identity import TeacherIdentity, identify_teacher
from stages.teacher.in_flight import num_in_flight
from storage.codecs.codec_settings import MapCodecConfig, MapCodecName
from storage.progress import SILENT, Progress
from storage.samples.image_settings import DEFAULT_IMAGES, ImageConfig
from storage.samples.sample_set import SampleSet
from storage.targets.layout import arrays

BYTES_PER_ENTRY: dict[MapCodecName, float] = {"float16": 1.77782, "sqrt8": 0.86340, "sqrt4": 0.42269, "sqrt2": 0.22282}
"""Of an entry of one captured layer's map, with all that is stored of the windows; from
`benchmarks/results/attention_codes.json`, synthetic maps of 728 image tokens. A test compares them."""

METADATA_BYTES_PER_ARRAY = 800
"""A `zarr.json`, as in the dump of FORMAT.md."""
TOKEN_BYTES, HALF_BYTES = 5, 2
"""Id and answer mask, and a value of answer attention, before zstd."""
PHOTOGRAPH = (640, 480)
"""Size of the image that stands for all, for processors whose number of tokens depends on it."""


def estimate_from_configs(
    settings: TeacherConfig,
    samples: SampleSet | None,
    config: EstimateConfig,
    images: ImageConfig = DEFAULT_IMAGES,
    *,
    workers: int,
    gpus_per_worker: int = 1,
    batches_in_flight: int | None = None,
    progress: Progress = SILENT,
) -> Estimate:
    """What a whole extraction by `workers` teachers takes, from config and processor of the checkpoint.

    The sample set is read and tokenised as for a measurement; without one the numbers of `config` are taken, which then
    says how many samples there will be.

    Raises:
        UserError: If extraction would refuse the teacher.
    """
    num_ranks = gpus_per_worker if settings.parallel == "tensor" else 1
    identity = identify_teacher(settings, images, on_gpu=True, with_weights=False, num_ranks=num_ranks)
    encoder = identity.encoder()
    # In maps of cells half of the entries are zeros too, which zstd leaves next to nothing of.
    causal, pooling = identity.family.causal_image_tokens, settings.map_pooling
    assumed = []
    if samples is not None:
        planned = plan_blocks(samples.index.num_samples, config)
        held = count_blocks(samples, encoder, planned, causal=causal, rules=identity.image_rules, progress=progress)
    else:
        assert config.samples is not None
        image = Image.new("RGB", PHOTOGRAPH, "gray")
        size = len(encoder.encode_pair("What is this?", "A picture.", [image]).image_positions)
        held = _assumed_counts(config, config.samples, size, pooling, causal=causal)
        assumed.append(
            f"assumed: {config.text_tokens:g} text tokens, {config.answer_rows:g} rows of one answer, "
            f"{config.samples_per_map:g} samples a map; {size} image tokens are the processor's for an "
            f"image of {PHOTOGRAPH[0]}x{PHOTOGRAPH[1]}"
        )
    # Attention maps cost nothing for a sample without an image, and once for all samples that share them.
    model = empty_model(identity)
    work = forward_work(identity, model, held.per_sample)
    operations = sum(work.values())
    busy_gpus = min(gpus_per_worker, num_in_flight(identity, gpus_per_worker, batches_in_flight))
    speed = f"{config.gpu_tflops:g} TFLOP/s at"
    teacher = TeacherCost(
        device=f"GPU of {speed} {config.efficiency:.0%}",
        gpus_per_worker=gpus_per_worker,
        memory=(memory := teacher_memory(identity, model, held.per_sample, config, batches_in_flight)),
        teacher_seconds_per_sample=operations / (config.gpu_tflops * 1e12 * config.efficiency * busy_gpus),
    )
    shares = ", ".join(f"{name} {part / operations:.1%}" for name, part in work.items())
    notes = (
        "computed from configs alone, so only roughly; `cdp estimate` with the weights measures instead",
        *memory_notes(memory, gpus_per_worker),
        *saved_notes(identity, held.per_sample),
        f"{operations / 1e12:.3g} TFLOP a sample: {shares}",
        *[f"of the {gpus_per_worker} GPUs of a teacher {busy_gpus} are taken to compute at once"]
        * (gpus_per_worker > 1),
        *split_notes(settings),
        f"{speed} an efficiency of {config.efficiency:.0%} are assumed, not measured",
        "bytes of maps as measured on synthetic ones of 728 image tokens (benchmarks/results/attention_codes.json)",
        "bytes of answer rows, answer attention and tokens are those before zstd",
        *assumed,
    )
    costs = _costs(identity, held.per_sample)
    return extrapolate(settings, identity, held, costs, teacher, workers=workers, notes=notes)


def saved_notes(identity: TeacherIdentity, per_sample: Counts) -> tuple[str, ...]:
    """How much of the decoder's work is done once for several conversations; nothing where none is."""
    saved = per_sample["repeated_tokens"] / per_sample["tokens"] if per_sample["tokens"] else 0.0
    if not saved or not identity.prefix_reuse:
        return ()
    return (f"{saved:.0%} of all tokens come up to an image that another conversation has too, and are computed once",)


def _costs(identity: TeacherIdentity, per_sample: Counts) -> dict[MapCodecName, CodecCost]:
    stores_answers = identity.settings.answer_attention
    rates = {"logit_records": identity.logit_codec.row_bytes, "token_ids": TOKEN_BYTES}
    if stores_answers:
        rates["answer_attention"] = len(identity.layers) * HALF_BYTES
    num_arrays = len(arrays(answer_attention=stores_answers, pooled=identity.settings.map_pooling > 1))
    return {
        name: CodecCost(
            rates={"map_codes": len(identity.layers) * entry_bytes, **rates},
            metadata_bytes=num_arrays * METADATA_BYTES_PER_ARRAY,
            num_files=2 * num_arrays + 1,
        )
        for name, entry_bytes in bytes_per_entry(per_sample, identity.windows).items()
    }


def _assumed_counts(
    config: EstimateConfig, num_samples: int, num_image_tokens: int, pooling: int, *, causal: bool
) -> SetCounts:
    """Of samples with one image each and with the numbers of `config`."""
    share, num_cells = 1 / config.samples_per_map, -(-num_image_tokens // pooling**2)
    per_sample = count_units(
        [config.text_tokens + num_image_tokens],
        [config.answer_rows],
        [num_cells],
        [(share, num_cells)],
        [num_image_tokens * (1 - share)],
        causal=causal,
    )
    full, rest = divmod(num_samples, config.samples_per_shard)
    return SetCounts([config.samples_per_shard] * full + [rest] * (rest > 0), per_sample)


def bytes_per_entry(per_sample: Counts, windows: Sequence[Sequence[int]]) -> dict[MapCodecName, float]:
    """As `BYTES_PER_ENTRY`; of `auto` those of a map of average size."""
    size = round(per_sample["image_tokens"] / per_sample["maps"]) if per_sample["maps"] else 0
    codecs = {name: MapCodecConfig.of_windows(name, windows, causal=True) for name in get_args(MapCodecName)}
    return {name: BYTES_PER_ENTRY[codec.of_size(size).name] for name, codec in codecs.items()}


def forward_work(identity: TeacherIdentity, model: PreTrainedModel, per_sample: Counts) -> dict[str, float]:
    """Floating-point operations of the teacher on one sample, by the part that does them.

    Two for each weight and position, and attention's products with causality used. Where samples share what comes up to
    their images (`teacher.prefix_reuse`), each has its part of it; padding is not counted. A mixture of experts is
    counted as if every expert worked.
    """
    text = identity.config.get_text_config()
    embeddings = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    sizes = {name: weight.numel() for name, weight in model.named_parameters() if id(weight) not in embeddings}
    vision = sum(size for name, size in sizes.items() if name.startswith(identity.family.vision_prefixes))
    decoder = sum(sizes.values()) - vision
    width = text.num_attention_heads * (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
    tokens, maps = per_sample["tokens"], per_sample["maps"]
    computed = tokens - per_sample["repeated_tokens"] if identity.prefix_reuse else tokens
    # The vision tower may have more positions than tokens leave it; its config says so in some families.
    vision_config = getattr(identity.config, "vision_config", None)
    size, patch = getattr(vision_config, "image_size", None), getattr(vision_config, "patch_size", None)
    patches = (size // patch) ** 2 if isinstance(size, int) and isinstance(patch, int) else 0
    image_tokens = per_sample["image_tokens"] * identity.settings.map_pooling**2
    positions = max(image_tokens / maps, patches) if maps else 0.0
    return {
        "decoder": 2.0 * decoder * computed + 2.0 * text.num_hidden_layers * width * tokens * computed,
        "vision": 2.0 * vision * positions * (maps if identity.prefix_reuse else 1.0),
        "answers": 2.0 * text.vocab_size * text.hidden_size * per_sample["answer_rows"],
        "maps": 2.0 * len(identity.layers) * width * per_sample["map_entries"] * identity.settings.map_pooling**4,
    }
