"""The miniature's networks: a tower that sees each cell alone, and decoders that answer all questions of a picture.

Shape letters: B pictures, N image tokens, Q questions, T tokens of a row, D width of the tower, V words.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Qwen2Config, Qwen2Model, SiglipVisionConfig, SiglipVisionModel

from benchmarks.reproduction.scenes import BLANK, CELL, COLOURS, GRID, IMAGE_SIZE, NUM_CELLS, QUESTION_TOKENS, WORDS
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
                parameter.requires_grad_(False)

    def forward(self, pixels_BHW3: Tensor) -> Tensor:
        """`[B, N, D]`."""
        hidden: Tensor = self.siglip(pixels_BHW3.permute(0, 3, 1, 2) * 2 - 1).last_hidden_state
        return hidden


@dataclass(frozen=True)
class DecoderSize:
    """Depth and width of a decoder."""

    layers: int
    width: int
    heads: int = 2


class Answerer(nn.Module):
    """Adapter and Qwen2 decoder; a picture's questions stand behind one image prefix and do not see each other.

    Attributes:
        sees_TT: True where a query may look at a key.
        place_T: rotary position of each token: every question starts behind the prefix.
    """

    sees_TT: Tensor
    place_T: Tensor

    def __init__(self, size: DecoderSize, num_questions: int, seed: int) -> None:
        super().__init__()
        register_capture()
        self.size = size
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.adapter = nn.Sequential(
                nn.Linear(TOWER_WIDTH, size.width), nn.GELU(), nn.Linear(size.width, size.width)
            )
            self.decoder = Qwen2Model(
                Qwen2Config(
                    vocab_size=len(WORDS), hidden_size=size.width, intermediate_size=2 * size.width,
                    num_hidden_layers=size.layers, num_attention_heads=size.heads, num_key_value_heads=size.heads,
                    max_position_embeddings=512, initializer_range=0.05, attn_implementation=CAPTURING_SDPA,
                )
            )  # fmt: skip
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
        self, features_BND: Tensor, asked_BQ3: Tensor, layers: tuple[int, ...] = ()
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Logits `[B, Q, V]` of the answers, and the maps `[B, N, N]` of some layers."""
        batch, questions, _ = asked_BQ3.shape
        words = self.decoder.embed_tokens.weight
        begin, end = (words[i].expand(batch, 1, -1) for i in (WORDS.index("<begin>"), WORDS.index("<end>")))
        row_BTD = torch.cat([begin, self.adapter(features_BND), end, words[asked_BQ3.flatten(1)]], 1)
        capture = AttentionCapture(frozenset(layers), [torch.arange(1, 1 + NUM_CELLS)] * batch) if layers else None
        hidden_BTD = self.decoder(
            inputs_embeds=row_BTD, attention_mask=self.sees_TT[None, None].expand(batch, -1, -1, -1),
            position_ids=self.place_T[None].expand(batch, -1), use_cache=False, capture=capture,
        ).last_hidden_state  # fmt: skip
        last = PREFIX + QUESTION_TOKENS * torch.arange(1, questions + 1) - 1
        logits: Tensor = self.head(hidden_BTD[:, last])
        return logits, capture.maps if capture else {}


def answer_loss(logits_BQV: Tensor, answer_BQ: Tensor) -> Tensor:
    """Cross entropy, mean over questions."""
    return F.cross_entropy(logits_BQV.flatten(0, 1), answer_BQ.flatten())
