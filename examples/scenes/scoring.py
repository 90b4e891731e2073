"""How well a model tells captions from hard negatives: by the likelihood of each caption given the image."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image

from pipeline.demo.scenes.language import DESCRIBE, PairKind
from pipeline.demo.scenes.pairs import CaptionPair


@torch.inference_mode()
def caption_scores(
    model: Any, processor: Any, images: list[Image.Image], captions: list[str], batch_size: int = 64
) -> torch.Tensor:
    """Log-probability of each caption, its end included, as the answer to `DESCRIBE`; `[n]` float32."""
    tokenizer = processor.tokenizer
    side = tokenizer.padding_side
    tokenizer.padding_side = "right"
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": DESCRIBE}]}],
        add_generation_prompt=True,
        tokenize=False,
    )
    num_prompt = processor(images=images[:1], text=[prompt], return_tensors="pt")["input_ids"].shape[1]
    scores = []
    for start in range(0, len(captions), batch_size):
        text = [f"{prompt} {c}{tokenizer.eos_token}" for c in captions[start : start + batch_size]]
        inputs = processor(images=images[start : start + batch_size], text=text, padding=True, return_tensors="pt").to(
            model.device
        )
        logits = model(**inputs).logits[:, num_prompt - 1 : -1].float()
        target = inputs["input_ids"][:, num_prompt:]
        logprob = logits.log_softmax(-1).gather(-1, target[..., None])[..., 0]
        scores.append((logprob * inputs["attention_mask"][:, num_prompt:]).sum(1).cpu())
    tokenizer.padding_side = side
    return torch.cat(scores)


def pair_accuracy(model: Any, processor: Any, pairs: dict[PairKind, list[CaptionPair]]) -> dict[str, float]:
    """Share of pairs of each kind in which the true caption is the likelier one."""
    was_training = model.training
    model.eval()
    accuracy = {}
    for kind, members in pairs.items():
        images = [Image.fromarray(pair.pixels) for pair in members]
        true = caption_scores(model, processor, images, [pair.caption for pair in members])
        false = caption_scores(model, processor, images, [pair.negative for pair in members])
        accuracy[kind] = float((true > false).float().mean())
    model.train(was_training)
    return accuracy
