r"""Packs many independent questions behind one image prefix: an image's tokens are computed once.

A row is `USER: <image>x36 \n` followed by segments `question ASSISTANT: answer<eos>`. Each segment sees the
prefix and itself only and counts its positions from the prefix's end, as if it stood alone.
Letters in shapes: B images, T tokens of a row, R answer rows (positions that predict an answer token).
"""
# shape letters

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from examples.scenes.patches import GRID
from examples.scenes.processor import EOS, IMAGE, PAD, VOCABULARY, word_ids
from pipeline.demo.scenes.language import Exchange

_INDEX = {token: index for index, token in enumerate(VOCABULARY)}
_USER = word_ids("USER:")
_ASSISTANT = word_ids("ASSISTANT:")
NUM_IMAGE_TOKENS = GRID * GRID
PREFIX = (*_USER, *(_INDEX[IMAGE],) * NUM_IMAGE_TOKENS, *word_ids("\n"))
NO_SEGMENT, PREFIX_SEGMENT = -1, 0


@dataclass
class Row:
    """One image's prefix and the segments behind it, while it is being filled."""

    length: int
    turns: bool = False
    """True: one conversation whose turns see those before them, instead of independent segments."""
    ids: list[int] = field(default_factory=lambda: list(PREFIX))
    segment: list[int] = field(default_factory=lambda: [PREFIX_SEGMENT] * len(PREFIX))
    position: list[int] = field(default_factory=lambda: list(range(len(PREFIX))))
    blind: list[bool] = field(default_factory=lambda: [False] * len(PREFIX))
    answers: list[tuple[int, int, int, bool]] = field(default_factory=list)
    """(position that predicts, token, segment, whether the token is learnt) of each answer token."""
    num_segments: int = 0

    def add(self, exchange: Exchange, learnt: bool = True) -> int | None:
        """Append an exchange; its segment's number, or None when the row is too full for it."""
        opening = _USER if self.turns and self.num_segments else ()
        asked = (*opening, *word_ids(exchange.question), *_ASSISTANT)
        answer = (*word_ids(exchange.answer), _INDEX[EOS])
        size = len(asked) + len(answer)
        start = len(self.ids)
        if start + size > self.length:
            return None
        self.num_segments += 1
        number = 1 if self.turns else self.num_segments
        blind = not exchange.about_image
        first = start if self.turns else len(_USER) if blind else len(PREFIX)
        self.ids += (*asked, *answer)
        self.segment += [number] * size
        self.position += range(first, first + size)
        self.blind += [blind] * size
        self.answers += [
            (start + len(asked) + k - 1, token, self.num_segments, learnt) for k, token in enumerate(answer)
        ]
        return self.num_segments


@dataclass(frozen=True)
class Batch:
    """Packed rows as tensors."""

    ids_BT: Tensor
    position_BT: Tensor
    mask_B1TT: Tensor
    """True where a query (third axis) may look at a key (fourth)."""
    row_R: Tensor
    """Index of each answer row into the flattened `[B * T]`."""
    target_R: Tensor
    learnt_R: Tensor
    segment_R: Tensor
    """The segment each answer row belongs to, numbered over the whole batch."""
    num_segments: int
    first_segment_B: list[int]


def pack(rows: list[Row]) -> Batch:
    """Stack rows of one `length`, padded at the end."""
    T = max(len(row.ids) for row in rows)

    def padded(values: list[int] | list[bool], fill: int) -> list[int]:
        return [*values, *[fill] * (T - len(values))]

    ids_BT = torch.tensor([padded(row.ids, _INDEX[PAD]) for row in rows])
    segment_BT = torch.tensor([padded(row.segment, NO_SEGMENT) for row in rows])
    position_BT = torch.tensor([padded(row.position, 0) for row in rows])
    blind_BT = torch.tensor([padded(row.blind, 0) for row in rows], dtype=torch.bool)
    causal_TT = torch.ones(T, T, dtype=torch.bool).tril()
    query, key = segment_BT[:, :, None], segment_BT[:, None, :]
    mask_BTT = causal_TT & ((key == PREFIX_SEGMENT) | (key == query))
    shows_image_T = torch.zeros(T, dtype=torch.bool)
    shows_image_T[len(_USER) : len(PREFIX)] = True
    mask_BTT &= ~(blind_BT[:, :, None] & shows_image_T)
    first, total = [], 0
    for row in rows:
        first.append(total)
        total += row.num_segments
    flat = [
        (b * T + position, token, first[b] + number - 1, learnt)
        for b, row in enumerate(rows)
        for position, token, number, learnt in row.answers
    ]
    row_R, target_R, segment_R, learnt_R = (torch.tensor(column) for column in zip(*flat, strict=True))
    return Batch(
        ids_BT=ids_BT,
        position_BT=position_BT,
        mask_B1TT=mask_BTT[:, None],
        row_R=row_R,
        target_R=target_R,
        learnt_R=learnt_R.float(),
        segment_R=segment_R,
        num_segments=total,
        first_segment_B=first,
    )
