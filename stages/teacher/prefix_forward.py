"""The prefix of several conversations through the teacher once, and what follows it in each of them.

A prefix is all tokens up to a conversation's last image token. As each conversation is computed in shapes of its own
(`batching.LENGTH_STEP`, `PART_STEP`), so is each prefix and what follows it: its bytes do not depend on the company.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from stages.attention.capture import AttentionCapture
from stages.attention.prefix import PrefixContinuation, PrefixRecord
from stages.attention.text_rows import AnswerQueries
from stages.conversations.answer_rows import answer_rows, answer_sizes
from stages.conversations.encoder import EncodedConversation
from stages.families.batch import batch_inputs, move_inputs
from stages.teacher.batching import PreparedSample
from stages.teacher.forward import captured_maps, coded_answers
from stages.teacher.num_threads import adopt_num_threads
from stages.teacher.placement import stacked
from stages.teacher.rank_messages import Pass
from stages.teacher.teacher import Teacher, on_all_ranks
from stages.teacher.tensor_split import average_heads


@dataclass(frozen=True)
class Prefixes:
    """What is kept on the teacher's devices of a forward pass over prefixes, until their conversations are through."""

    record: PrefixRecord
    hidden_PTd: Tensor | None
    """Last hidden states; None where no prefix holds a row that predicts an answer's token."""
    shifts: list[int]
    """Of each prefix, what a token behind it has as its position beyond its number in the conversation."""
    maps: dict[str, tuple[Tensor, ...]]
    """Map key -> `[N, N]` of each captured layer, not yet coded."""
    answers: list[Tensor] | None
    """Of each prefix `[L, a, N]`, the attention from those rows of each answer that lie in it; None if not wanted."""
    firsts: Sequence[PreparedSample]
    """Samples whose prefixes they are."""


@on_all_ranks(lambda firsts, wanted_maps: Pass("run_prefixes", firsts, wanted_maps))
@torch.inference_mode()
def run_prefixes(
    teacher: Teacher, firsts: Sequence[PreparedSample], wanted_maps: Collection[PreparedSample]
) -> Prefixes:
    """One forward pass over the prefixes of samples, which have one padded length; returns when it is done.

    Raises:
        torch.OutOfMemoryError: If they do not fit; nothing of them is kept then.
    """
    adopt_num_threads()
    model, layers = teacher.model, teacher.identity.layers
    none = torch.zeros(0, dtype=torch.long)
    has_answers = any(sample.answers_in_prefix for sample in firsts)
    queries = None
    if teacher.identity.settings.answer_attention and has_answers:
        queries = [_queries(sample, in_prefix=True) for sample in firsts]
    capture = AttentionCapture(
        layers=frozenset(layers),
        positions=[sample.encoded.image_positions if sample in wanted_maps else none for sample in firsts],
        answers=queries,
        cells=[sample.cells_X for sample in firsts],
    ).to(teacher.device)
    record = PrefixRecord([sample.prefix_length for sample in firsts])
    tokens = [sample.encoded.token_ids[: sample.prefix_length] for sample in firsts]
    pixels = [sample.encoded.pixel_inputs for sample in firsts]
    inputs = _part_inputs(teacher, tokens, firsts[0].padded_prefix, pixels)
    positions, shifts = _positions(teacher, inputs)
    hidden_PTd = model.model(**inputs, **positions, capture=capture, prefix=record, use_cache=False).last_hidden_state
    average_heads(capture, teacher.identity.num_ranks)
    answers = None
    if queries is not None:
        answers = [stacked([capture.answer_maps[layer][row] for layer in layers]) for row in range(len(firsts))]
    prefixes = Prefixes(
        record=record,
        hidden_PTd=hidden_PTd if has_answers else None,
        shifts=shifts,
        maps=captured_maps(capture, layers, firsts, wanted_maps),
        answers=answers,
        firsts=firsts,
    )
    teacher.synchronize()
    if teacher.ranks is not None:
        teacher.ranks.hold(prefixes)
    return prefixes


def run_continuations(
    teacher: Teacher, prefixes: Prefixes, rows: Sequence[int], batch: Sequence[PreparedSample]
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """One forward pass over what follows the prefixes in samples; returns when it is done.

    What follows has one padded length; the prefix of each sample is that of `rows`.

    Returns:
        Records of answer rows and answer attention, as `forward.ForwardOutput` has them.

    Raises:
        torch.OutOfMemoryError: If they do not fit; nothing of them is kept then.
    """
    if teacher.ranks is not None and not teacher.ranks.holds(prefixes):
        # Other processes that were started again have none.
        run_prefixes(teacher, prefixes.firsts, ())
        teacher.ranks.hold(prefixes)
    return _run_continuations(teacher, prefixes, rows, batch)


@on_all_ranks(lambda prefixes, rows, batch: Pass("run_continuations", batch, rows=rows))
@torch.inference_mode()
def _run_continuations(
    teacher: Teacher, prefixes: Prefixes, rows: Sequence[int], batch: Sequence[PreparedSample]
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    adopt_num_threads()
    model, layers = teacher.model, teacher.identity.layers
    wants_attention = teacher.identity.settings.answer_attention
    none = torch.zeros(0, dtype=torch.long)
    capture = AttentionCapture(
        layers=frozenset(layers),
        positions=[none] * len(batch),
        answers=[_queries(sample, in_prefix=False) for sample in batch] if wants_attention else None,
        cells=[sample.cells_X for sample in batch],
    ).to(model.device)
    own = [sample.encoded.token_ids[sample.prefix_length :] for sample in batch]
    # Other inputs than these say where images are.
    input_ids = _part_inputs(teacher, own, batch[0].padded_rest, [{}] * len(batch))["input_ids"]
    starts_B = torch.tensor(
        [sample.prefix_length + prefixes.shifts[row] for row, sample in zip(rows, batch, strict=True)]
    )
    positions_Bt = (starts_B[:, None] + torch.arange(input_ids.shape[1])).to(teacher.device)
    hidden_Btd = model.model(
        input_ids=input_ids,
        position_ids=positions_Bt,
        capture=capture,
        prefix=PrefixContinuation(prefixes.record, rows),
        use_cache=False,
    ).last_hidden_state
    average_heads(capture, teacher.identity.num_ranks)
    hidden_Rd = _answer_states(prefixes, rows, batch, hidden_Btd)
    logits = coded_answers(teacher, batch, hidden_Rd)
    attention: list[Tensor | None] = [None] * len(batch)
    if wants_attention:
        for number, (row, sample) in enumerate(zip(rows, batch, strict=True)):
            found_LaN = stacked([capture.answer_maps[layer][number] for layer in layers])
            if prefixes.answers is not None and sample.answers_in_prefix:
                found_LaN = _joined(prefixes.answers[row], found_LaN, sample)
            attention[number] = found_LaN.half().cpu()
    teacher.synchronize()
    return logits, attention


def _part_inputs(
    teacher: Teacher, part: Sequence[Tensor], padded_length: int, pixels: Sequence[dict[str, Tensor]]
) -> dict[str, Tensor]:
    """What the model is called with for parts of conversations, on its device, without a mask (`forward.model_inputs`).

    Padding lies behind each part, where no token of it looks.
    """
    image_token_id = teacher.encoder.image_token_id
    padding = 1 if image_token_id == 0 else 0
    padded = [pad(ids, (0, padded_length - len(ids)), value=padding) for ids in part]
    inputs = batch_inputs(teacher.identity.family, image_token_id, padded, pixels)
    del inputs["attention_mask"]
    return move_inputs(inputs, teacher.device, teacher.model.dtype)


def _positions(teacher: Teacher, inputs: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[int]]:
    """Where images have positions of several dimensions, these, and by how much the tokens behind them are shifted.

    The model would work out the same, but keep the shifts of its last batch alone, and others may be in it meanwhile.
    """
    find = getattr(teacher.model.model, "get_rope_index", None)
    if find is None:
        return {}, [0] * len(inputs["input_ids"])
    named = ("input_ids", "mm_token_type_ids", "image_grid_thw")
    position_ids, shifts_P1 = find(**{name: inputs[name] for name in named})
    return {"position_ids": position_ids}, shifts_P1.flatten().tolist()


def _answer_states(
    prefixes: Prefixes, rows: Sequence[int], batch: Sequence[PreparedSample], hidden_Btd: Tensor
) -> Tensor:
    """`[R, d]` last hidden states at the answer rows of the samples, in the order of the batch."""
    lengths_B = torch.tensor([sample.prefix_length for sample in batch])
    each = [sample.encoded for sample in batch]
    found = answer_rows([one.token_ids for one in each], [one.answer_mask for one in each])
    behind_R = found.position_R - lengths_B[found.sequence_R]
    if prefixes.hidden_PTd is not None:
        hidden_Btd = torch.cat([prefixes.hidden_PTd[list(rows)], hidden_Btd], 1)
        size = prefixes.hidden_PTd.shape[1]
        behind_R = torch.where(behind_R < 0, found.position_R, behind_R + size)
    device = hidden_Btd.device
    return hidden_Btd[found.sequence_R.to(device), behind_R.to(device)]


def _parts(encoded: EncodedConversation, prefix_length: int) -> list[tuple[int, int]]:
    """Of each answer how many of its rows lie in the prefix, and how many behind it."""
    rows = encoded.answer_mask.nonzero()[:, 0] - 1
    inside = [int((part < prefix_length).sum()) for part in torch.split(rows, list(answer_sizes(encoded.answer_mask)))]
    return [(num, size - num) for num, size in zip(inside, answer_sizes(encoded.answer_mask), strict=True)]


def _queries(sample: PreparedSample, *, in_prefix: bool) -> AnswerQueries:
    """The rows of answers in a sample's prefix, or those behind it, counted from its end."""
    encoded, length = sample.encoded, sample.prefix_length
    rows_U = encoded.answer_mask.nonzero()[:, 0] - 1
    rows_U = rows_U[rows_U < length] if in_prefix else rows_U[rows_U >= length] - length
    sizes = tuple(part[0 if in_prefix else 1] for part in _parts(encoded, length))
    return AnswerQueries(rows_U, tuple(filter(None, sizes)), encoded.image_positions)


def _joined(before_LaN: Tensor, behind_LaN: Tensor, sample: PreparedSample) -> Tensor:
    """`[L, a, N]` of all answers, also of one whose rows lie on both sides of the prefix's end."""
    before, behind = iter(before_LaN.unbind(1)), iter(behind_LaN.unbind(1))
    means = []
    for num_before, num_behind in _parts(sample.encoded, sample.prefix_length):
        if not num_before or not num_behind:
            means.append(next(before if num_before else behind))
        else:
            total_LN = next(before) * num_before + next(behind) * num_behind
            means.append(total_LN / (num_before + num_behind))
    return torch.stack(means, 1)
