"""Functions of tensors that turn what the teacher said into small bytes and back; they import torch only."""

from storage.codecs.answer_logits import (
    AnswerLogits,
    LogitCodecConfig,
    decode_logits,
    encode_logits,
    row_addresses,
)
from storage.codecs.maps import EncodedMaps, MapCodecConfig, decode_maps, encode_maps
from storage.codecs.sinks import decode_flips, encode_flips, sink_keep_mask
from storage.codecs.triangle import num_entries, pack_entries, unpack_entries
from storage.codecs.windows import (
    EncodedWindows,
    decode_windows,
    encode_image,
    estimate_windows,
    window_means,
    window_rows,
)

__all__ = [
    "AnswerLogits",
    "EncodedMaps",
    "EncodedWindows",
    "LogitCodecConfig",
    "MapCodecConfig",
    "decode_flips",
    "decode_logits",
    "decode_maps",
    "decode_windows",
    "encode_flips",
    "encode_image",
    "encode_logits",
    "encode_maps",
    "estimate_windows",
    "num_entries",
    "pack_entries",
    "row_addresses",
    "sink_keep_mask",
    "unpack_entries",
    "window_means",
    "window_rows",
]
