"""What the teacher says of the samples of one shard: tokens, attention maps, answer logits.

Shape letters: B samples of a batch, T tokens, L captured layers, W windows, N image tokens, R answer rows,
V vocabulary.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TypeVar

import torch
from torch import Tensor

from stages.attention import AttentionCapture
from stages.conversations import EncodedConversation, UnusableConversation
from stages.images import BadImage, decode_image
from stages.layers import window_means
from stages.teacher.teacher import Teacher
from storage.codecs.answer_logits import AnswerLogits, top_k_logprobs
from storage.codecs.maps import encode_maps
from storage.codecs.sinks import pack_mask, sink_keep_mask
from storage.samples import SampleShard, StoredSample
from storage.targets import MapTargets, SampleTargets, SkippedSample

Item = TypeVar("Item")

BATCHES_PER_POOL = 8  # samples are sorted by length within a pool, so that a batch holds little padding
LOGIT_ROWS = 512  # rows of vocabulary logits that exist at a time


@dataclass
class ShardObservations:
    """Everything `storage.targets.write_shard` needs of one shard, rows in the order of its tar."""

    samples: list[SampleTargets] = field(default_factory=list)
    maps: list[MapTargets] = field(default_factory=list)
    skipped: list[SkippedSample] = field(default_factory=list)


@dataclass
class _Pending:
    """One sample on its way through the teacher."""

    sample: StoredSample
    encoded: EncodedConversation
    map_key: str | None
    owns_map: bool = False
    logits: AnswerLogits | None = None


def observe_shard(
    teacher: Teacher, shard: SampleShard, progress: Callable[[int], None] | None = None
) -> ShardObservations:
    """Runs the teacher over one sample shard.

    A map is computed once for each distinct (image, tokens up to the image's end): under causal attention later
    tokens cannot change it. What cannot be used is in `skipped` with its reason.

    Args:
        teacher: the loaded teacher.
        shard: the sample shard.
        progress: called with the number of samples finished since the last call.
    """
    result = ShardObservations()
    maps: dict[str, MapTargets | None] = {}
    finished: list[_Pending] = []
    samples = (shard.read(row) for row in range(len(shard)))
    for pool in _chunks(samples, BATCHES_PER_POOL * teacher.batch_size):
        pending = list(_encode(teacher, pool, result.skipped))
        for item in pending:
            if item.map_key is not None and item.map_key not in maps:
                maps[item.map_key] = None
                item.owns_map = True
        # Longest first: if memory runs out, it does so at once.
        by_length = sorted(pending, key=lambda item: (-len(item.encoded.token_ids), item.sample.key))
        for batch in _chunks(by_length, teacher.batch_size):
            _observe_batch(teacher, batch, maps)
            if progress is not None:
                progress(len(batch))
        if progress is not None:
            progress(len(pool) - len(pending))
        finished += pending
    _assemble(finished, maps, result)
    return result


def _encode(teacher: Teacher, samples: Iterable[StoredSample], skipped: list[SkippedSample]) -> Iterator[_Pending]:
    for sample in samples:
        try:
            images = [decode_image(data) for data in sample.images]
            encoded = teacher.encoder.encode(sample.record["conversations"], images)
        except (BadImage, UnusableConversation) as error:
            skipped.append(
                SkippedSample(
                    key=sample.key,
                    id=str(sample.record.get("id", "")),
                    reason=error.reason,
                    detail=error.detail,
                )
            )
            continue
        yield _Pending(sample, encoded, _map_key(sample, encoded))


def _map_key(sample: StoredSample, encoded: EncodedConversation) -> str | None:
    """Digest of all that the maps depend on; None without an image."""
    if not len(encoded.image_positions):
        return None
    digest = hashlib.sha256()
    for data in sample.images:
        digest.update(hashlib.sha256(data).digest())
    last = int(encoded.image_positions[-1])
    digest.update(encoded.token_ids[: last + 1].to(torch.int64).numpy().tobytes())
    return digest.hexdigest()


@torch.inference_mode()
def _observe_batch(teacher: Teacher, batch: Sequence[_Pending], maps: dict[str, MapTargets | None]) -> None:
    device = teacher.model.device
    no_positions = torch.zeros(0, dtype=torch.long)
    capture = AttentionCapture(
        layers=frozenset(teacher.identity.layers),
        positions=[item.encoded.image_positions if item.owns_map else no_positions for item in batch],
    ).to(device)
    inputs = _pad([item.encoded.token_ids for item in batch])
    for name in teacher.identity.family.pixel_inputs:
        pixels = [item.encoded.pixel_inputs[name] for item in batch if name in item.encoded.pixel_inputs]
        if pixels:
            inputs[name] = torch.cat(pixels)
    inputs = {
        name: value.to(device, teacher.model.dtype if value.is_floating_point() else None)
        for name, value in inputs.items()
    }
    # The base model, not the one with the head: logits are wanted at answer rows only.
    hidden_BTd = teacher.model.model(**inputs, capture=capture, use_cache=False).last_hidden_state
    answers = [item.encoded.answer_mask.nonzero()[:, 0] for item in batch]
    hidden_Rd = torch.cat([hidden_BTd[row, (t - 1).to(device)] for row, t in enumerate(answers)])
    logits, finite_R = answer_logits(teacher, hidden_Rd)
    start = 0
    for row, item in enumerate(batch):
        stop = start + len(answers[row])
        # Left at None when not finite, and so are maps: the sample is then skipped with that reason.
        if bool(finite_R[start:stop].all()):
            item.logits = logits.rows(start, stop)
        start = stop
        if item.owns_map and item.map_key is not None:
            num_tokens = len(item.encoded.image_positions)
            stacked = torch.stack(
                [capture.maps[layer][row, :num_tokens, :num_tokens] for layer in teacher.identity.layers]
            )
            if bool(torch.isfinite(stacked).all()):
                maps[item.map_key] = encode_targets(teacher, stacked)


def answer_logits(teacher: Teacher, hidden_Rd: Tensor) -> tuple[AnswerLogits, Tensor]:
    """Top-k log-probabilities at answer rows, a bounded number of rows of vocabulary logits at a time.

    Returns:
        The log-probabilities on the CPU, and `[R]` bool: whether all logits of the row were finite (what is stored
        of a row that is not means nothing).
    """
    head = teacher.model.get_output_embeddings()
    parts, finite = [], []
    for rows_Rd in torch.split(hidden_Rd, LOGIT_ROWS):
        logits_RV = head(rows_Rd).float()
        finite_R = torch.isfinite(logits_RV).all(-1)
        logits_RV = logits_RV.masked_fill(~finite_R[:, None], 0.0)
        parts.append(top_k_logprobs(logits_RV, teacher.identity.settings.top_k).to("cpu"))
        finite.append(finite_R.cpu())
    return AnswerLogits.cat(parts), torch.cat(finite)


def encode_targets(teacher: Teacher, maps_LNN: Tensor) -> MapTargets:
    """Codes of each layer, and the exact sink masks of the windows from the uncoded maps."""
    windows_WNN = window_means(maps_LNN, teacher.identity.layers, teacher.identity.windows)
    encoded = encode_maps(teacher.identity.codec, maps_LNN)
    return MapTargets(
        num_tokens=maps_LNN.shape[-1],
        codes_LE=encoded.codes_LE.cpu(),
        caps_L=encoded.caps_L.cpu(),
        keep_masks=pack_mask(sink_keep_mask(windows_WNN), teacher.identity.codec.causal).cpu(),
    )


def _pad(token_ids: Sequence[Tensor]) -> dict[str, Tensor]:
    """Right padding; the padded ids are never attended to and never read."""
    width = max(len(ids) for ids in token_ids)
    input_ids = torch.zeros(len(token_ids), width, dtype=torch.long)
    attention_mask = torch.zeros(len(token_ids), width, dtype=torch.long)
    for row, ids in enumerate(token_ids):
        input_ids[row, : len(ids)] = ids
        attention_mask[row, : len(ids)] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def _assemble(finished: Sequence[_Pending], maps: dict[str, MapTargets | None], result: ShardObservations) -> None:
    """Rows in tar order; maps numbered by first use; what is not finite goes to the ledger."""
    map_rows: dict[str, int] = {}
    for item in finished:
        targets = maps[item.map_key] if item.map_key is not None else None
        if item.logits is None or (item.map_key is not None and targets is None):
            result.skipped.append(
                SkippedSample(
                    key=item.sample.key,
                    id=str(item.sample.record.get("id", "")),
                    reason="not_finite",
                    detail="the teacher's attention or logits hold NaN or infinity",
                )
            )
            continue
        if item.map_key is not None and targets is not None and item.map_key not in map_rows:
            map_rows[item.map_key] = len(result.maps)
            result.maps.append(targets)
        result.samples.append(
            SampleTargets(
                key=item.sample.key,
                token_ids=item.encoded.token_ids.to(torch.int32),
                answer_mask=item.encoded.answer_mask,
                map_row=None if item.map_key is None else map_rows[item.map_key],
                logits=item.logits,
            )
        )
    result.skipped.sort(key=lambda skipped: skipped.key)


def _chunks(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk
