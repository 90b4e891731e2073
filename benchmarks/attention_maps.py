"""Uncoded attention maps to measure codes on: synthetic ones of a large teacher's size, and the bundled teacher's own.

Letters: L captured layers, N image tokens.
"""

import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from pipeline.demo.assets import TEACHER as BUNDLED_TEACHER
from pipeline.demo.scenes.dataset import write_dataset
from stages.attention.capture import AttentionCapture
from stages.attention.layer_selection import default_num_matched, sliding_windows, visual_understanding_layers
from stages.families.batch import batch_inputs
from stages.images import decode_image
from stages.samples.pack import PackConfig, pack_samples
from stages.teacher.config import TeacherConfig
from stages.teacher.teacher import Teacher, load_teacher
from storage.samples.sample_set import SampleSet

HEADS, HEAD_SIZE, TEXT_KEYS = 20, 32, 31


@dataclass(frozen=True)
class MapSet:
    """Maps of several samples, all of the same layers."""

    name: str
    layers: tuple[int, ...]
    windows: tuple[tuple[int, ...], ...]
    """As an extraction would store them."""
    maps: tuple[Tensor, ...]
    """`[L, N, N]` float32 of each sample."""


def synthetic_maps(num_tokens: int, num_samples: int) -> MapSet:
    """Maps of a teacher of 40 layers with 20 heads.

    Scores are 2.5 q.k / sqrt(32) of normal q and k; half of the heads look near a place (they lose the squared grid
    distance over 2 (2 + 10 u)^2); 31 text keys come before, the first of them an attention sink (+6); three image
    keys get up to +3. Then a causal softmax, averaged over heads.
    """
    layers = tuple(visual_understanding_layers(40))
    maps = tuple(synthetic_layers(num_tokens, len(layers), seed) for seed in range(num_samples))
    return MapSet("synthetic", layers, sliding_windows(layers, default_num_matched(40)), maps)


def synthetic_layers(num_tokens: int, num_layers: int, seed: int, scale: float = 2.5) -> Tensor:
    """`[L, N, N]` float32 maps of one sample; `scale` says how peaked they are."""
    generator = torch.Generator().manual_seed(seed)
    side = math.isqrt(num_tokens) + 1
    # The grid's first cell is left out, as the published vision tower's first token.
    cells = torch.arange(1, num_tokens + 1)
    places = torch.stack([cells // side, cells % side], -1).float()
    distance_NN = torch.cdist(places, places).square()
    future_NN = torch.ones(num_tokens, num_tokens, dtype=torch.bool).triu(1)
    sinks = torch.randperm(num_tokens, generator=generator)[:3]
    maps_LNN = torch.zeros(num_layers, num_tokens, num_tokens)
    for layer in range(num_layers):
        lift = 3 * torch.rand(len(sinks), generator=generator)
        for head in range(HEADS):
            queries = torch.randn(num_tokens, HEAD_SIZE, generator=generator)
            keys = torch.randn(TEXT_KEYS + num_tokens, HEAD_SIZE, generator=generator)
            scores = scale * queries @ keys.T / math.sqrt(HEAD_SIZE)
            if head % 2:
                reach = 2 + 10 * float(torch.rand(1, generator=generator))
                scores[:, TEXT_KEYS:] -= distance_NN / (2 * reach**2)
            scores[:, 0] += 6
            scores[:, TEXT_KEYS + sinks] += lift
            scores[:, TEXT_KEYS:].masked_fill_(future_NN, -torch.inf)
            maps_LNN[layer] += scores.softmax(-1)[:, TEXT_KEYS:] / HEADS
    return maps_LNN


def bundled_teacher_maps(num_samples: int) -> MapSet:
    """What the bundled teacher attends to in newly drawn scenes, with the example's layers."""
    settings = TeacherConfig(checkpoint=str(BUNDLED_TEACHER), layers=(2, 3, 4, 5, 6), num_matched=3, max_length=512)
    teacher = load_teacher(settings)
    with tempfile.TemporaryDirectory() as folder:
        data, samples = Path(folder) / "data", Path(folder) / "samples"
        write_dataset(data, num_samples, seed=1, num_pairs=1)
        pack_samples(data / "captions.json", data, samples, PackConfig())
        maps = tuple(islice(_observed(teacher, samples), num_samples))
    return MapSet("scenes", teacher.identity.layers, teacher.identity.windows, maps)


@torch.inference_mode()
def _observed(teacher: Teacher, folder: Path) -> Iterator[Tensor]:
    samples = SampleSet.open(folder)
    for number in range(len(samples.index.shards)):
        with samples.shard(number) as shard:
            for row in range(len(shard)):
                sample = shard.read(row)
                images = [decode_image(data) for data in sample.images]
                encoded = teacher.encoder.encode(sample.record["conversations"], images)
                capture = AttentionCapture(frozenset(teacher.identity.layers), [encoded.image_positions])
                inputs = batch_inputs(
                    teacher.identity.family,
                    teacher.encoder.image_token_id,
                    [encoded.token_ids],
                    [encoded.pixel_inputs],
                )
                device = teacher.model.device
                inputs = {name: value.to(device) for name, value in inputs.items()}
                teacher.model.model(**inputs, capture=capture.to(device), use_cache=False)
                yield torch.stack([capture.maps[layer][0] for layer in teacher.identity.layers]).float().cpu()
