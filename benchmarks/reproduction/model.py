"""The miniature's networks: a tower that sees each cell alone, and decoders that answer all questions of a picture.

Shape letters are those of docs/architecture.md: B pictures, R questions, each with one answer row.
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Qwen2Config, Qwen2Model, SiglipVisionConfig, SiglipVisionModel

from benchmarks.reproduction.scenes import (
    BEGIN,
    BLANK,
    CELL,
    COLOURS,
    END,
    GRID,
    IMAGE_SIZE,
    NUM_CELLS,
    PAD,
    QUESTION_TOKENS,
    WORDS,
)
from stages.attention.capture import CAPTURING_SDPA, AttentionCapture, register_capture

TOWER_WIDTH = 64
PREFIX = 1 + NUM_CELLS + 1
"""`<begin>`, the image, `<end>`."""


class LocalTower(nn.Module):
    """A SigLIP of one layer whose attention adds nothing: a token knows its own cell and place, by construction."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.siglip = SiglipVisionModel(
                SiglipVisionConfig(
                    hidden_size=TOWER_WIDTH, intermediate_size=4 * TOWER_WIDTH, num_hidden_layers=1,
                    num_attention_heads=1, image_size=IMAGE_SIZE, patch_size=CELL, vision_use_head=False,
                )
            )  # fmt: skip
            self.heads = nn.ModuleList(nn.Linear(TOWER_WIDTH, size) for size in (BLANK + 1, len(COLOURS), GRID, GRID))
        for name, parameter in self.siglip.named_parameters():
            if "out_proj" in name:
                nn.init.zeros_(parameter)
            # A Llava takes what stands before the last norm.
            if "out_proj" in name or "post_layernorm" in name:
                parameter.requires_grad_(False)

    def forward(self, pixels: Tensor) -> Tensor:
        """`[B, N, d]` of pixels `[B, 96, 96, 3]` in 0..255: what the last layer gives, before the norm."""
        scaled = pixels.permute(0, 3, 1, 2) / 127.5 - 1
        hidden: Tensor = self.siglip(scaled, output_hidden_states=True).hidden_states[-1]
        return hidden

    @torch.no_grad()
    def divide_features(self, by: float) -> None:
        """What is added up to features is divided alike; what each cell says stays the same."""
        for name, parameter in self.siglip.named_parameters():
            if "embedding" in name or "fc2" in name:
                parameter /= by


@dataclass(frozen=True)
class DecoderSize:
    """Depth and width of a decoder."""

    layers: int
    width: int
    heads: int = 2


def text_config(size: DecoderSize) -> Qwen2Config:
    """Of a decoder over the miniature's words."""
    return Qwen2Config(
        vocab_size=len(WORDS), hidden_size=size.width, intermediate_size=2 * size.width,
        num_hidden_layers=size.layers, num_attention_heads=size.heads, num_key_value_heads=size.heads,
        max_position_embeddings=512, initializer_range=0.05, tie_word_embeddings=False, bos_token_id=None,
        eos_token_id=WORDS.index(END), pad_token_id=WORDS.index(PAD),
    )  # fmt: skip


class Answerer(nn.Module):
    """Adapter and Qwen2 decoder; a picture's questions stand behind one image prefix and do not see each other.

    Attributes:
        sees_TT: True where a query may look at a key.
        place_T: rotary position of each token: every question starts behind the prefix.
    """

    sees_TT: Tensor
    place_T: Tensor

    def __init__(self, size: DecoderSize, num_questions: int, seed: int, teacher: "Answerer | None" = None) -> None:
        """With a projector of its own, or with the teacher's, frozen, and a new linear layer behind it."""
        super().__init__()
        register_capture()
        self.size = size
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.adapter = nn.Sequential(
                nn.Linear(TOWER_WIDTH, size.width), nn.GELU(), nn.Linear(size.width, size.width)
            )
            if teacher is not None:
                fetched = copy.deepcopy(teacher.adapter).requires_grad_(False)
                self.adapter = nn.Sequential(fetched, nn.Linear(teacher.size.width, size.width))
            config = text_config(size)
            config._attn_implementation = CAPTURING_SDPA
            self.decoder = Qwen2Model(config)
            self.head = nn.Linear(size.width, len(WORDS), bias=False)
        segment_T = torch.cat(
            [torch.zeros(PREFIX), 1 + torch.arange(num_questions * QUESTION_TOKENS) // QUESTION_TOKENS]
        )
        behind = PREFIX + torch.arange(QUESTION_TOKENS).repeat(num_questions)
        causal_TT = torch.ones(len(segment_T), len(segment_T), dtype=torch.bool).tril()
        sees_TT = causal_TT & ((segment_T[None] == 0) | (segment_T[None] == segment_T[:, None]))
        self.register_buffer("sees_TT", sees_TT, persistent=False)
        self.register_buffer("place_T", torch.cat([torch.arange(PREFIX), behind]), persistent=False)

    def forward(
        self, features_BNd: Tensor, asked_BR3: Tensor, layers: tuple[int, ...] = ()
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Logits `[B, R, V]` of the answers, and the maps `[B, N, N]` of some layers."""
        batch, questions, _ = asked_BR3.shape
        words = self.decoder.embed_tokens.weight
        begin, end = (words[i].expand(batch, 1, -1) for i in (WORDS.index(BEGIN), WORDS.index(END)))
        row_BTd = torch.cat([begin, self.adapter(features_BNd), end, words[asked_BR3.flatten(1)]], 1)
        capture = AttentionCapture(frozenset(layers), [torch.arange(1, 1 + NUM_CELLS)] * batch) if layers else None
        hidden_BTd = self.decoder(
            inputs_embeds=row_BTd, attention_mask=self.sees_TT[None, None].expand(batch, -1, -1, -1),
            position_ids=self.place_T[None].expand(batch, -1), use_cache=False, capture=capture,
        ).last_hidden_state  # fmt: skip
        last = PREFIX + QUESTION_TOKENS * torch.arange(1, questions + 1) - 1
        logits: Tensor = self.head(hidden_BTd[:, last])
        return logits, capture.maps if capture else {}


def answer_loss(logits_BRV: Tensor, answer_BR: Tensor, weight_R: Tensor) -> Tensor:
    """Cross entropy, weighted mean over questions, mean over pictures."""
    losses = F.cross_entropy(logits_BRV.flatten(0, 1), answer_BR.flatten(), reduction="none")
    return (losses.view(answer_BR.shape) * weight_R).sum() / (len(answer_BR) * weight_R.sum())
