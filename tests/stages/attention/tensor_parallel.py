"""A model whose heads are split over the processes of torchrun, or one process without it; run as a script.

Its arguments are a checkpoint and a folder. Each process stores there what it captured of its own heads, and logits.
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText
from transformers.distributed import DistributedConfig

from stages.attention.capture import AttentionCapture, enable_capture
from stages.attention.text_rows import AnswerQueries

LAYERS, LENGTH, FIRST_IMAGE_TOKEN = (1, 2), 48, 4


def main() -> None:
    checkpoint, out = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    is_split = "RANK" in os.environ
    split: dict[str, Any] = {"distributed_config": DistributedConfig(tp_plan="auto")} if is_split else {}
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32, **split).eval()
    enable_capture(model)
    vision = model.config.vision_config
    images_N = torch.arange((vision.image_size // vision.patch_size) ** 2) + FIRST_IMAGE_TOKEN
    random = torch.Generator().manual_seed(0)
    input_ids = torch.randint(5, 60, (1, LENGTH), generator=random)
    input_ids[0, images_N] = model.config.image_token_id
    pixels = torch.randn(1, 3, vision.image_size, vision.image_size, generator=random)
    last = int(images_N[-1]) + 1
    answers = [AnswerQueries(torch.arange(last, last + 6), (2, 4), images_N)]
    capture = AttentionCapture(frozenset(LAYERS), [images_N], answers=answers)
    with torch.inference_mode():
        hidden = model.model(input_ids=input_ids, pixel_values=pixels, capture=capture, use_cache=False)
        logits = model.get_output_embeddings()(hidden.last_hidden_state)
    found = {f"map {layer}": capture.maps[layer][0] for layer in LAYERS}
    found |= {f"answers {layer}": capture.answer_maps[layer][0] for layer in LAYERS}
    save_file({**found, "logits": logits.contiguous()}, out / f"{os.environ.get('RANK', 'one')}.safetensors")


if __name__ == "__main__":
    main()
