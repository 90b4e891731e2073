"""How much of GPUs' memory a teacher takes, from its config alone, and so how many GPUs one teacher needs.

Weights, caches and maps are counted. What a layer makes and frees is that of its largest products. What coding takes
was found by counting its tensors (`tests/stages/estimate/coding_memory.py`). What the driver takes is assumed.
"""

import torch
from transformers import AutoModelForImageTextToText, PreTrainedModel

from stages.attention.capture import GPU_BLOCK_ENTRIES
from stages.checkpoints.configs import unfit_named
from stages.checkpoints.quantization import bits_per_weight
from stages.estimate.report import EstimateConfig, TeacherMemory
from stages.estimate.sampling import Counts
from stages.teacher.batching import GPU_FIRST_TRY
from stages.teacher.config import TeacherConfig
from stages.teacher.forward import LOGIT_ROWS
from stages.teacher.identity import TeacherIdentity
from stages.teacher.in_flight import num_in_flight
from stages.teacher.map_coder import UNCODED_BATCHES
from stages.teacher.placement import MEMORY_FOR_WEIGHTS
from stages.teacher.tensor_split import check_split, splits

DRIVER_BYTES = 10**9
"""Of each GPU: context, kernels, and what the allocator cannot use; assumed."""
CODED_LAYERS, CODED_WINDOWS = {True: 1.6, False: 1.0}, {True: 3.0, False: 8.0}
"""Causal or not -> maps of float32 that coding holds at once, for each layer of an image and each of its windows."""
LOGIT_BYTES = 2**10
"""For each token of the vocabulary, what coding a block of answer rows holds at once."""
FLOAT = 4


def empty_model(identity: TeacherIdentity) -> PreTrainedModel:
    """The teacher without its weights, on no device.

    Raises:
        UserError: If no model can be built from its config.
    """
    with torch.device("meta"), unfit_named(identity.folder):
        model: PreTrainedModel = AutoModelForImageTextToText.from_config(
            identity.config, trust_remote_code=identity.settings.trust_remote_code
        )
    return model


def teacher_memory(
    identity: TeacherIdentity,
    model: PreTrainedModel,
    per_sample: Counts,
    config: EstimateConfig,
    batches_in_flight: int | None = None,
) -> TeacherMemory:
    """The fewest GPUs of `config.gpu_memory_gb` that hold the teacher, and the largest batch that then fits.

    `model` is `empty_model`, `batches_in_flight` is as of `num_in_flight`; fewer are if no batch fits so often.
    Conversations are as long as `teacher.max_length` allows, images of the average size.
    """
    memory = round(config.gpu_memory_gb * 1e9)
    asked = identity.settings.batch_size
    numbers, weights = possible_numbers(identity), _weight_bytes(identity, model)
    sizes = [asked] if asked else [2**power for power in range(GPU_FIRST_TRY.bit_length())]
    for gpus in numbers:
        for num_batches in range(num_in_flight(identity, gpus, batches_in_flight), 0, -1):
            fitting = [
                found
                for size in sizes
                if (found := _with_batch(identity, weights, per_sample, size, gpus, num_batches)).bytes_per_gpu
                <= memory
                and found.bytes_of_weights_per_gpu <= MEMORY_FOR_WEIGHTS * memory
            ]
            if fitting:
                return fitting[-1].model_copy(update={"gpu_bytes": memory})
    least = _with_batch(identity, weights, per_sample, sizes[0], numbers[-1], 1)
    return least.model_copy(update={"gpu_bytes": memory, "gpus": None})


def possible_numbers(identity: TeacherIdentity) -> list[int]:
    """Numbers of GPUs that can hold the teacher, rising: one for each layer at most, or what its heads divide by.

    Raises:
        UserError: If its layers are to be split and cannot be.
    """
    text, settings = identity.config.get_text_config(), identity.settings
    if settings.parallel == "layers":
        return list(range(1, text.num_hidden_layers + 1))
    numbers = splits(text)
    least = numbers[0] if numbers else 2
    check_split(identity.config, identity.folder, least, trust_remote_code=settings.trust_remote_code)
    return numbers


def split_notes(settings: TeacherConfig) -> tuple[str, ...]:
    """What is not counted where each layer is split."""
    if settings.parallel == "layers":
        return ()
    return ("teacher.parallel is tensor: the time is that of one GPU at a time, what several gain was not measured",)


def memory_notes(memory: TeacherMemory, gpus_per_worker: int) -> tuple[str, ...]:
    """What is to be set, if `extract.gpus_per_worker` is fewer than the teacher needs."""
    if memory.gpus is None:
        return ("the most GPUs that can share the teacher do not hold it with one batch; lower teacher.max_length",)
    if memory.gpus > gpus_per_worker:
        return (f"the teacher needs {memory.gpus} GPUs: set extract.gpus_per_worker={memory.gpus}",)
    return ()


def _with_batch(
    identity: TeacherIdentity,
    held: tuple[int, int, int],
    per_sample: Counts,
    batch: int,
    gpus: int,
    num_batches: int,
) -> TeacherMemory:
    text, element = identity.config.get_text_config(), identity.dtype.itemsize
    weights, largest, whole = held
    length = identity.settings.max_length
    num_kv_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    key_bytes = 2 * batch * length * num_kv_heads * head * element
    products = max(3 * getattr(text, "intermediate_size", 0), 4 * text.num_attention_heads * head)
    layer = batch * length * (3 * text.hidden_size + products) * element
    # Those of the head as it gives them, as floats, and with what is not finite left out.
    logits = text.vocab_size * (LOGIT_ROWS * (element + 2 * FLOAT + 1) + LOGIT_BYTES)
    num_tokens = per_sample["image_tokens"] / per_sample["maps"] if per_sample["maps"] else 0.0
    of_image = num_tokens**2 * FLOAT
    # Scores of a block of image queries, their probabilities, and what goes from one to the other.
    blocks = 3 * FLOAT * min(GPU_BLOCK_ENTRIES, text.num_attention_heads * num_tokens * length)
    maps = (UNCODED_BATCHES + num_batches) * batch * len(identity.layers) * of_image
    causal = identity.codec.causal
    coding = of_image * (len(identity.layers) * CODED_LAYERS[causal] + len(identity.windows) * CODED_WINDOWS[causal])
    # One layer's keys and values behind those of the prefixes, besides those of all layers.
    caches = num_batches * key_bytes * text.num_hidden_layers if identity.prefix_reuse else 0
    if identity.settings.parallel == "tensor":
        share = whole + (weights - whole) // gpus
    else:
        share = weights if gpus == 1 else weights // gpus + largest
    # Each batch in flight has streams of its own, and the library keeps what it frees for these.
    activations = num_batches * round(max(layer + key_bytes + blocks, logits))
    per_gpu = share + activations + maps + coding + caches / gpus + DRIVER_BYTES
    return TeacherMemory(
        gpu_bytes=0,
        gpus=gpus,
        batch_size=batch,
        batches_in_flight=num_batches,
        weight_bytes=weights,
        activation_bytes=activations,
        map_bytes=round(maps + coding),
        cache_bytes=caches,
        bytes_of_weights_per_gpu=share,
        bytes_per_gpu=round(per_gpu),
    )


def _weight_bytes(identity: TeacherIdentity, model: PreTrainedModel) -> tuple[int, int, int]:
    """Of all weights, of the largest layer of the decoder or embedding, and of what is whole where layers are split."""
    bits = bits_per_weight(identity.config)
    kept = {id(part.weight) for part in (model.get_input_embeddings(), model.get_output_embeddings())}
    decoder = model.get_decoder()
    packed = {id(weight) for weight in decoder.parameters() if weight.dim() > 1} - kept

    def size(parameters: list[torch.nn.Parameter]) -> int:
        each = {id(weight): weight.numel() for weight in parameters}
        of_each = (
            num * (bits / 8 if bits is not None and number in packed else identity.dtype.itemsize)
            for number, num in each.items()
        )
        return round(sum(of_each))

    parts = [list(layer.parameters()) for layer in decoder.layers]
    parts.append(list(model.get_output_embeddings().parameters()))
    split = packed | kept
    whole = [weight for weight in model.parameters() if id(weight) not in split]
    return size(list(model.parameters())), max(map(size, parts)), size(whole)
