"""Targets of a tiny teacher of each family, and what the library says of the same samples by eager attention."""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, ProcessorMixin

from stages.images import decode_image
from stages.samples.pack import PackConfig, pack_samples
from storage.codecs.attention_maps import EncodedMaps
from storage.samples.members import StoredSample
from storage.samples.sample_set import SampleSet
from storage.targets.sample_targets import SampleTargets
from storage.targets.store import TargetStore
from tests.checkpoints import draw_random_image
from tests.stages.distilled import TinyData, extract_here
from tests.tiny_families import make_tiny_family
from tests.tiny_recipes import Recipe

LAYERS = (1, 2)


@dataclass(frozen=True)
class Extracted:
    """A family's checkpoint, its samples, and the targets made of them."""

    checkpoint: Path
    samples: Path
    store: TargetStore
    rows: dict[str, tuple[StoredSample, SampleTargets, EncodedMaps | None]]

    @property
    def with_maps(self) -> list[tuple[StoredSample, SampleTargets, EncodedMaps]]:
        """The samples that have an image."""
        return [(stored, targets, maps) for stored, targets, maps in self.rows.values() if maps is not None]


def make_samples(folder: Path) -> Path:
    """Two conversations about one image, images of other shapes, images in two turns, and text only."""
    rng = random.Random(0)
    (folder / "images").mkdir()
    for name, size in {"wide": (100, 40), "tall": (30, 90), "square": (64, 64)}.items():
        draw_random_image(rng).resize(size, Image.Resampling.NEAREST).save(folder / "images" / f"{name}.png")
    conversations: list[tuple[list[str], list[str]]] = [
        (["wide"], ["<image>\nWhat is the color of the square?", "The square is red."]),
        (["wide"], ["<image>\nDescribe the image.", "A blue circle.", "And the triangle?", "Green."]),
        (["tall"], ["<image>\nWhat is left of the circle?", "A green triangle is left of it."]),
        (["square", "tall"], ["<image>\nIs it red?", "It is blue.", "<image>\nAnd this?", "Both are blue."]),
        ([], ["What is the color of the sky?", "Blue."]),
    ]
    records = [
        {
            "id": f"sample-{number}",
            **({"image": [f"{name}.png" for name in names]} if names else {}),
            "conversations": [{"from": ("human", "gpt")[turn % 2], "value": text} for turn, text in enumerate(texts)],
        }
        for number, (names, texts) in enumerate(conversations)
    ]
    (folder / "data.json").write_text(json.dumps(records))
    pack_samples(folder / "data.json", folder / "images", folder / "packed", PackConfig())
    return folder / "packed"


def extract_family(model_type: str, samples: Path, folder: Path, recipe: Recipe | None = None) -> Extracted:
    """A tiny teacher of the family over `make_samples`; the whole vocabulary is stored."""
    checkpoint = make_tiny_family(folder / "teacher", model_type, recipe=recipe)
    data = TinyData(teacher=checkpoint, student_lm=folder, samples=samples)
    store = extract_here(
        data,
        folder / "targets",
        layers=LAYERS,
        num_matched=1,
        batch_size=3,
        map_codec="float16",
        logit_codec="float16",
        top_k=1000,
    )
    assert not store.commits[0].skipped
    shard = store.shard(0)
    with SampleSet.open(samples).shard(0) as tar:
        rows = {tar.read(row).key: (tar.read(row), *shard.read(row)) for row in range(len(shard))}
    assert len(rows) == 5
    return Extracted(checkpoint, samples, store, rows)


def processed(processor: Any, sample: StoredSample) -> dict[str, Tensor]:
    """The inputs of one sample as the library's processor makes them of the chat template's text."""
    messages = []
    for turn in sample.record["conversations"]:
        pieces = turn["value"].split("<image>\n")
        parts: list[dict[str, str]] = []
        for number, piece in enumerate(pieces):
            parts += [{"type": "image"}] * (number > 0) + [{"type": "text", "text": piece}] * bool(piece)
        messages.append({"role": {"human": "user", "gpt": "assistant"}[turn["from"]], "content": parts})
    # Not SmolVLM's own, which asks its video half for settings.
    text = ProcessorMixin.apply_chat_template(processor, messages, tokenize=False)
    images = [decode_image(image) for image in sample.images]
    outputs = processor(text=[text], images=[images] if images else None, return_tensors="pt")
    return {name: value for name, value in outputs.items() if isinstance(value, Tensor)}


def eager(checkpoint: Path) -> Any:
    """The checkpoint's model with eager attention."""
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, attn_implementation="eager", dtype=torch.float32)
    return model.eval()


def eager_maps(model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """`[L, N, N]` maps of the captured layers and `[T, V]` logits."""
    with torch.no_grad():
        outputs = model(**inputs, output_attentions=True)
    positions = (inputs["input_ids"][0] == model.config.image_token_id).nonzero()[:, 0]
    found = attentions_by_layer(model, outputs.attentions)
    maps = torch.stack([found[layer][0].mean(0)[positions][:, positions] for layer in LAYERS])
    return maps, outputs.logits[0]


def attentions_by_layer(model: Any, attentions: Sequence[Tensor]) -> dict[int, Tensor]:
    """The library's `attentions`, which leave out layers of other kinds."""
    config = model.config.get_text_config()
    types = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    layers = [number for number, kind in enumerate(types) if kind not in ("linear_attention", "conv")]
    return dict(zip(layers, attentions, strict=True))
