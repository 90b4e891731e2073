"""Bytes that coding holds at once, counted tensor by tensor; run as a script, as `pretended_devices` asks.

It prints JSON: of maps by number of layers, N and whether they are causal, and of a token of the vocabulary.
"""

import json
from collections.abc import Callable

import torch

from stages.attention.layer_selection import sliding_windows
from storage.codecs.answer_logits import AnswerLogitsCodec
from storage.codecs.attention_maps import MapCodec
from storage.codecs.codec_settings import LogitCodecConfig, MapCodecConfig, default_num_levels
from tests.pretended_devices import KIND, PretendedDevices, register

VOCABULARY, WINDOWS = 4096, 7


def counted(work: Callable[[torch.Tensor], object], of: torch.Tensor) -> int:
    """Most bytes that lie on the device while `work` runs, besides those that it is given."""
    with torch.no_grad(), PretendedDevices() as devices:
        given = of.to(torch.device(KIND, 0))
        devices.most_bytes = devices.bytes
        before = devices.bytes
        work(given)
        return devices.most_bytes - before


def of_maps(num_layers: int, num_tokens: int, *, causal: bool) -> int:
    """Of the codec that holds most."""
    layers = tuple(range(num_layers))
    windows = sliding_windows(layers, WINDOWS)
    codec = MapCodec.of_layers(MapCodecConfig.of_windows("float16", windows, causal=causal), layers, windows)
    maps_LNN = torch.rand(num_layers, num_tokens, num_tokens).tril()
    return counted(codec.encode, maps_LNN / maps_LNN.sum(-1, keepdim=True))


def of_answers() -> int:
    """Of answer rows of a vocabulary of 4096."""
    config = LogitCodecConfig(vocab_size=VOCABULARY, top_k=48, num_levels=default_num_levels(VOCABULARY, 48, ()))
    codec, addresses = AnswerLogitsCodec(config), torch.rand(64, dtype=torch.float64)
    return counted(lambda logits_RV: codec.encode(logits_RV, addresses), torch.randn(64, VOCABULARY))


def main() -> None:
    register()
    maps = [
        (num_layers, num_tokens, causal, of_maps(num_layers, num_tokens, causal=causal))
        for num_layers in (8, 13)
        for num_tokens in (100, 200)
        for causal in (True, False)
    ]
    print(json.dumps({"maps": maps, "windows": WINDOWS, "answers": of_answers() / VOCABULARY}))


if __name__ == "__main__":
    main()
