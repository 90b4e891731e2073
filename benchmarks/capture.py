"""Time and memory of a teacher's forward pass with capture, against plain sdpa and eager `output_attentions`.

Needs torch and transformers only; runs on a GPU where there is one, else on the CPU. Ratios on a CPU are of processor
time, as the machine may be shared; wall time is beside them.

    python -m benchmarks.capture --repeats 7
"""

import argparse
import json
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlavaConfig, LlavaForConditionalGeneration, Qwen2Config, SiglipVisionConfig

from benchmarks.memory import PeakMemory
from benchmarks.results import RESULTS, Spent, command_line, interleaved, median_ratio, save_result, spent
from stages.attention.capture import AttentionCapture, enable_capture
from stages.attention.layer_selection import visual_understanding_layers

IMAGE_TOKEN = 1
WAYS = ("sdpa", "capture", "eager")


@dataclass(frozen=True)
class Shape:
    """Sizes of the random teacher and of its batch."""

    layers: int = 24
    captured: int = 11
    hidden: int = 640
    intermediate: int = 1728
    heads: int = 10
    kv_heads: int = 2
    vocab: int = 1000
    patches: int = 27
    """A side of the image; its square less one (the first token is dropped) is N."""
    tokens: int = 860
    batch: int = 1
    dtype: str = "float32"

    @property
    def image_tokens(self) -> int:
        """N."""
        return self.patches**2 - 1


class Bench:
    """A random teacher, one batch, and the three ways to run it."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        self.device = device
        self.model = make_model(shape).to(device, getattr(torch, shape.dtype)).eval().requires_grad_(False)
        self.inputs = make_inputs(shape, device, self.model.dtype)
        first = visual_understanding_layers(shape.layers).start
        self.layers = range(first, min(first + shape.captured, shape.layers))

    @torch.inference_mode()
    def run(self, way: str) -> dict[int, Tensor]:
        """One forward pass without logits; the maps of the captured layers where the way gives them."""
        if way == "capture":
            enable_capture(self.model)
            where = (self.inputs["input_ids"] == IMAGE_TOKEN).cpu()
            positions = [row.nonzero()[:, 0] for row in where]
            capture = AttentionCapture(frozenset(self.layers), positions).to(self.device)
            self.model.model(**self.inputs, capture=capture, use_cache=False)
            return capture.maps
        self.model.set_attn_implementation({"text_config": way, "vision_config": "sdpa"})
        attentions = self.model.model(**self.inputs, output_attentions=way == "eager", use_cache=False).attentions
        if way == "sdpa":
            return {}
        p = (self.inputs["input_ids"][0] == IMAGE_TOKEN).nonzero()[:, 0]
        return {layer: attentions[layer].float().mean(1)[:, p][:, :, p] for layer in self.layers}

    def spent(self, way: str) -> Spent:
        """Time of one run."""
        self._wait()

        def run_and_wait() -> None:
            self.run(way)
            self._wait()

        return spent(run_and_wait)

    def peak_bytes(self, way: str) -> int:
        """Memory that the forward pass added at its highest, weights and inputs not counted."""
        if self.device.type == "cuda":
            before = torch.cuda.memory_allocated(self.device)
            self.run(way)
            return torch.cuda.max_memory_allocated(self.device) - before
        memory = PeakMemory()
        self.run(way)
        return memory.grown_bytes

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def make_model(shape: Shape) -> LlavaForConditionalGeneration:
    """A random LLaVA of `model_config`, always the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlavaForConditionalGeneration(model_config(shape))


def model_config(shape: Shape) -> LlavaConfig:
    """Of a LLaVA with a small vision tower and a Qwen2 decoder."""
    return LlavaConfig(
        text_config=Qwen2Config(
            vocab_size=shape.vocab,
            hidden_size=shape.hidden,
            intermediate_size=shape.intermediate,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            max_position_embeddings=4096,
        ),
        vision_config=SiglipVisionConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=14 * shape.patches,
            patch_size=14,
            vision_use_head=False,
        ),
        image_token_index=IMAGE_TOKEN,
        vision_feature_select_strategy="default",
        vision_feature_layer=-2,
    )


def make_inputs(shape: Shape, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Unpadded rows: some text, the image, more text."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(IMAGE_TOKEN + 1, shape.vocab, (shape.batch, shape.tokens), generator=generator)
    before = min(32, shape.tokens - shape.image_tokens)
    ids[:, before : before + shape.image_tokens] = IMAGE_TOKEN
    pixels = torch.randn(shape.batch, 3, 14 * shape.patches, 14 * shape.patches, generator=generator)
    return {"input_ids": ids.to(device), "pixel_values": pixels.to(device, dtype)}


def measure(shape: Shape, device: torch.device, repeats: int, memory: dict[str, int]) -> dict[str, Any]:
    """All figures of one run; `memory` was measured in processes of its own."""
    bench = Bench(shape, device)
    found, expected = bench.run("capture"), bench.run("eager")
    difference = max(float((found[layer] - expected[layer]).abs().max()) for layer in bench.layers)
    bench.run("sdpa")
    taken = interleaved({way: partial(bench.spent, way) for way in WAYS}, repeats)
    # A GPU works while the processor waits.
    clocks = ("cpu_s", "wall_s") if device.type == "cpu" else ("wall_s",)
    return {
        "shape": {**asdict(shape), "image_tokens": shape.image_tokens, "captured_layers": list(bench.layers)},
        "decoder_parameters": sum(p.numel() for p in bench.model.model.language_model.parameters()),
        "repeats": repeats,
        **_ratios(taken, clocks[0]),
        "clocks": {clock: _ratios(taken, clock) for clock in clocks},
        "peak_bytes_above_weights": memory,
        "largest_difference_from_eager": difference,
    }


def _ratios(taken: dict[str, list[Spent]], clock: str) -> dict[str, Any]:
    seconds = {way: [getattr(each, clock) for each in taken[way]] for way in WAYS}
    return {
        "clock": clock,
        "capture_over_sdpa": median_ratio(seconds["capture"], seconds["sdpa"]),
        "eager_over_sdpa": median_ratio(seconds["eager"], seconds["sdpa"]),
        "seconds": {way: statistics.median(seconds[way]) for way in WAYS},
    }


def measure_memory(shape: Shape) -> dict[str, int]:
    """Peak bytes of each way, each in its own process."""
    command = [sys.executable, "-m", "benchmarks.capture", *_flags(shape), "--memory-of"]
    return {way: json.loads(subprocess.check_output([*command, way], text=True)) for way in WAYS}


def _flags(shape: Shape) -> list[str]:
    return [part for name, value in asdict(shape).items() for part in (f"--{name.replace('_', '-')}", str(value))]


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in asdict(Shape(dtype="bfloat16" if device.type == "cuda" else "float32")).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=RESULTS / f"capture-{device.type}.json")
    parser.add_argument("--memory-of", choices=WAYS, help=argparse.SUPPRESS)
    flags = vars(parser.parse_args())
    repeats, threads, out, way = (flags.pop(name) for name in ("repeats", "threads", "out", "memory_of"))
    torch.set_num_threads(threads)
    shape = Shape(**flags)
    if way is not None:
        print(Bench(shape, device).peak_bytes(way))
        return
    result = measure(shape, device, repeats, measure_memory(shape))
    save_result(out, device, command_line("benchmarks.capture"), {"device": device.type, **result})
    print(out.read_text())


if __name__ == "__main__":
    main()
