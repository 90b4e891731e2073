"""Trains the students' language model on captions' text alone: no image, no question, no teacher.

    python -m examples.scenes.train_student_lm pipeline/demo/student_lm

Students of large models start from a pretrained language model; this is the example's.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from examples.scenes.models import build_student_lm
from examples.scenes.processor import EOS, PAD, VOCABULARY, build_tokenizer, word_ids
from examples.scenes.training import Log, Optimizers, machine
from pipeline.demo.scenes.language import ask_caption
from pipeline.demo.scenes.world import generator, sample_scenes

_TEXT_STREAM = 3
_EOS_ID, _PAD_ID = VOCABULARY.index(EOS), VOCABULARY.index(PAD)


@dataclass(frozen=True)
class TextConfig:
    """Everything the run depends on."""

    seed: int = 0
    steps: int = 300
    num_captions: int = 96
    """Captions a step, each of a scene of its own."""
    muon_lr: float = 1e-3
    adam_lr: float = 1e-3
    """Low on purpose: a model trained hard on text alone (8e-3, or 1,500 steps) hardly learnt to look afterwards."""
    warmup_steps: int = 50
    decay_from: float = 0.5
    num_threads: int = 1


def text_batch(config: TextConfig, step: int) -> tuple[Tensor, Tensor]:
    """One step's captions as padded ids, and labels with -100 on the padding; both `[num_captions, T]`.

    Captions only, no questions: a model that has learnt to answer without an image looks at none later.
    """
    rng = generator(config.seed, _TEXT_STREAM, step)
    variant = "digits" if rng.random() < 0.5 else "shapes"
    scenes = sample_scenes(rng, config.num_captions, variant, "train")
    rows = [
        [*word_ids(ask_caption(rng, scenes.things(index), variant).answer), _EOS_ID] for index in range(len(scenes))
    ]
    length = max(map(len, rows))
    ids = torch.tensor([row + [_PAD_ID] * (length - len(row)) for row in rows])
    return ids, ids.masked_fill(ids == _PAD_ID, -100)


def main() -> None:
    """Parse the command line, train, save in half precision, write TRAINING.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the language model")
    parser.add_argument("--seed", type=int, default=TextConfig.seed)
    parser.add_argument("--steps", type=int, default=TextConfig.steps)
    args = parser.parse_args()
    config = TextConfig(seed=args.seed, steps=args.steps)
    torch.set_num_threads(config.num_threads)
    started = time.monotonic()
    model = build_student_lm(config.seed)
    model.train()
    optimizers = Optimizers([(model, 1.0)], config.muon_lr, config)
    log = Log(every=100)
    num_tokens = 0
    for step in range(config.steps):
        ids, labels = text_batch(config, step)
        logits = model(input_ids=ids, use_cache=False).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        loss.backward()
        optimizers.step(step / config.steps)
        num_tokens += int((labels != -100).sum())
        log.add("text", loss=loss.item())
        log.show("student", step, config.steps)
    seconds = time.monotonic() - started
    model.eval()
    with torch.inference_mode():
        held_out = []
        for step in range(20):
            ids, labels = text_batch(TextConfig(seed=config.seed + 1_000_003), step)
            logits = model(input_ids=ids).logits
            held_out.append(F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()).item())
    args.out.mkdir(parents=True, exist_ok=True)
    model.half().save_pretrained(args.out)
    build_tokenizer().save_pretrained(args.out)
    report = {
        "command": "python -m examples.scenes.train_student_lm " + shlex.join(sys.argv[1:]),
        "config": asdict(config),
        "seconds": round(seconds),
        "machine": machine(),
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "num_tokens": num_tokens,
        "held_out_nats_per_token": round(sum(held_out) / len(held_out), 4),
    }
    (args.out / "TRAINING.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
