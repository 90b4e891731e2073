"""Functions of tensors that turn what the teacher said into small bytes and back; they import torch only."""

from storage.codecs.answer_logits import AnswerLogits, top_k_logprobs
from storage.codecs.maps import EncodedMaps, MapCodecConfig, decode_maps, encode_maps
from storage.codecs.sinks import pack_mask, packed_mask_bytes, sink_keep_mask, unpack_mask
from storage.codecs.triangle import num_entries, pack_entries, unpack_entries

__all__ = [
    "AnswerLogits",
    "EncodedMaps",
    "MapCodecConfig",
    "decode_maps",
    "encode_maps",
    "num_entries",
    "pack_entries",
    "pack_mask",
    "packed_mask_bytes",
    "sink_keep_mask",
    "top_k_logprobs",
    "unpack_entries",
    "unpack_mask",
]
