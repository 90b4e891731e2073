"""Layers 2 and 3 of teacher and student matched, and maps stored for them."""

import torch

from stages.student.layer_matching import LayerMatching
from storage.codecs.attention_maps import EncodedMaps, MapCodec
from storage.codecs.codec_settings import MapCodecConfig

MATCHING = LayerMatching(
    student_layers=(2, 3),
    captured_layers=(2, 3),
    windows=((2,), (3,)),
    stored_windows=((2,), (3,)),
    codec=MapCodecConfig(name="float16"),
)


def coded(maps_LNN: torch.Tensor) -> EncodedMaps:
    return MapCodec(MATCHING.codec, ((0,), (1,))).encode(maps_LNN)
