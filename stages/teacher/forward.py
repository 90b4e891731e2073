"""One batch through the teacher."""

from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from stages.attention.capture import AttentionCapture
from stages.attention.text_rows import AnswerQueries
from stages.conversations.answer_rows import answer_rows, answer_sizes
from stages.conversations.encoder import EncodedConversation
from stages.families.batch import batch_inputs, move_inputs
from stages.teacher.batching import LENGTH_STEP, PreparedSample
from stages.teacher.num_threads import adopt_num_threads
from stages.teacher.placement import stacked
from stages.teacher.rank_messages import Pass
from stages.teacher.teacher import Teacher, on_all_ranks
from stages.teacher.tensor_split import average_heads
from storage.codecs.answer_logits import AnswerLogitsCodec
from storage.codecs.tail_samples import row_addresses

LOGIT_ROWS = 512  # rows of vocabulary logits that exist at a time
ROW_STEP = 32  # answer rows of a batch are filled up to a multiple: a product with one row is summed in another order


class ForwardOutput(NamedTuple):
    """What one forward pass gave of a batch."""

    logits: list[Tensor | None]
    """For each sample the records of its answer rows, on the CPU; None where a row is not finite."""
    maps: dict[str, tuple[Tensor, ...]]
    """Map key -> `[N, N]` of each captured layer, on that layer's device, not yet coded."""
    answers: list[Tensor | None]
    """For each sample `[L, a, N]` float16 on the CPU, which may not be finite; None without an image, and for all where
    answer attention is not wanted."""


@on_all_ranks(lambda batch, wanted_maps: Pass("run_teacher", batch, wanted_maps))
@torch.inference_mode()
def run_teacher(
    teacher: Teacher, batch: Sequence[PreparedSample], wanted_maps: Collection[PreparedSample]
) -> ForwardOutput:
    """One forward pass of samples of one padded length; returns when it is done, on a GPU too.

    Raises:
        torch.OutOfMemoryError: If the batch does not fit; nothing of it is kept then.
    """
    adopt_num_threads()
    layers = teacher.identity.layers
    no_positions = torch.zeros(0, dtype=torch.long)
    answered = [sample.encoded for sample in batch] if teacher.identity.settings.answer_attention else None
    capture = AttentionCapture(
        layers=frozenset(layers),
        positions=[sample.encoded.image_positions if sample in wanted_maps else no_positions for sample in batch],
        answers=None if answered is None else [_answer_queries(encoded) for encoded in answered],
        cells=[sample.cells_X for sample in batch],
    ).to(teacher.device)
    # The base model, not the one with the head: logits are wanted at answer rows only.
    inputs = model_inputs(teacher, batch)
    hidden_BTd = teacher.model.model(**inputs, capture=capture, use_cache=False).last_hidden_state
    average_heads(capture, teacher.identity.num_ranks)
    answer_masks = [sample.encoded.answer_mask for sample in batch]
    answers = answer_rows([sample.encoded.token_ids for sample in batch], answer_masks).to(hidden_BTd.device)
    hidden_Rd = hidden_BTd[answers.sequence_R, answers.position_R]
    logits = coded_answers(teacher, batch, hidden_Rd)
    maps = captured_maps(capture, layers, batch, wanted_maps)
    attention: list[Tensor | None] = [None] * len(batch)
    for row, encoded in enumerate(answered or ()):
        if len(encoded.image_positions):
            # Rounded as it is stored: students see these values, and sinks are told by them.
            attention[row] = stacked([capture.answer_maps[layer][row] for layer in layers]).half().cpu()
    teacher.synchronize()
    return ForwardOutput(logits, maps, attention)


def _answer_queries(encoded: EncodedConversation) -> AnswerQueries:
    """All answers of a conversation."""
    rows_U = encoded.answer_mask.nonzero()[:, 0] - 1
    return AnswerQueries(rows_U, answer_sizes(encoded.answer_mask), encoded.image_positions)


def coded_answers(teacher: Teacher, batch: Sequence[PreparedSample], hidden_Rd: Tensor) -> list[Tensor | None]:
    """Records of the answer rows of each sample, on the CPU; None where a row is not finite."""
    sizes = [int(sample.encoded.answer_mask.sum()) for sample in batch]
    # Addresses by key and row, so that the tail samples do not depend on the batch.
    addresses_R = torch.cat([row_addresses(sample.key, size) for sample, size in zip(batch, sizes, strict=True)])
    logits_RQ, finite_R = answer_logits(teacher, hidden_Rd, addresses_R)
    rows = zip(torch.split(logits_RQ, sizes), torch.split(finite_R, sizes), strict=True)
    return [of_sample_RQ if bool(finite.all()) else None for of_sample_RQ, finite in rows]


def captured_maps(
    capture: AttentionCapture,
    layers: Sequence[int],
    batch: Sequence[PreparedSample],
    wanted: Collection[PreparedSample],
) -> dict[str, tuple[Tensor, ...]]:
    """Map key -> `[N, N]` of each captured layer, of the samples whose maps are wanted."""
    maps = {}
    for row, sample in enumerate(batch):
        if sample in wanted and sample.map_key is not None:
            n = sample.num_map_tokens
            maps[sample.map_key] = tuple(capture.maps[layer][row, :n, :n] for layer in layers)
    return maps


def answer_logits(teacher: Teacher, hidden_Rd: Tensor, addresses_R: Tensor) -> tuple[Tensor, Tensor]:
    """Codes the logits of answer rows; a bounded number of rows of vocabulary logits exists at a time.

    Returns:
        The records on the CPU, and `[R]` bool: whether all logits of the row were finite (the record of a row that
        is not means nothing).
    """
    head, codec = teacher.model.get_output_embeddings(), AnswerLogitsCodec(teacher.identity.logit_codec)
    config, num_rows = teacher.identity.config.get_text_config(), len(hidden_Rd)
    hidden_Rd = pad(hidden_Rd, (0, 0, 0, -num_rows % ROW_STEP))
    addresses_R = pad(addresses_R, (0, -num_rows % ROW_STEP))
    records, finite = [], []
    for rows_Rd, seeds_R in zip(torch.split(hidden_Rd, LOGIT_ROWS), torch.split(addresses_R, LOGIT_ROWS), strict=True):
        logits_RV = teacher.identity.family.logits(head(rows_Rd).float(), config)
        finite_R = torch.isfinite(logits_RV).all(-1)
        logits_RV = logits_RV.masked_fill(~finite_R[:, None], 0.0)
        records.append(codec.encode(logits_RV, seeds_R).cpu())
        finite.append(finite_R.cpu())
    return torch.cat(records)[:num_rows], torch.cat(finite)[:num_rows]


def model_inputs(teacher: Teacher, batch: Sequence[PreparedSample]) -> dict[str, Tensor]:
    """What the model is called with, on its device."""
    inputs = batch_inputs(
        teacher.identity.family,
        teacher.encoder.image_token_id,
        [sample.encoded.token_ids for sample in batch],
        [sample.encoded.pixel_inputs for sample in batch],
        multiple=LENGTH_STEP,
    )
    # Padding lies behind each sample, where no token of it looks. Without a mask the attention kernel is the plain
    # causal one for every batch: the fastest there is, and the same whether a batch is padded or not.
    del inputs["attention_mask"]
    return move_inputs(inputs, teacher.device, teacher.model.dtype)
