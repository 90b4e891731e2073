"""Trains the bundled teacher from nothing: its tower on patch labels, then all of it from words to captions.

    python -m examples.scenes.train_teacher pipeline/demo/teacher

Scenes are drawn on the fly from the seed's training stream; the pairs that score it come from another.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration

from examples.scenes.choice import ask_choice
from examples.scenes.models import build_teacher, place_code
from examples.scenes.packing import Batch, Row, pack
from examples.scenes.patches import NO_KIND, PatchLabels, patch_labels
from examples.scenes.processor import build_processor
from examples.scenes.scoring import pair_accuracy
from examples.scenes.training import Log, Optimizers, machine
from pipeline.demo.scenes.draw import draw
from pipeline.demo.scenes.language import (
    DESCRIBE,
    PAIR_KINDS,
    QUESTIONS,
    Exchange,
    PairKind,
    QuestionKind,
    ask_without_image,
    hard_negative,
)
from pipeline.demo.scenes.pairs import TRAIN_STREAM, sample_pairs
from pipeline.demo.scenes.world import COLOURS, Scenes, Variant, generator, sample_scenes

EVALUATION_SEED = 1_000_003

LessonKind = QuestionKind | Literal["choice"]


@dataclass(frozen=True)
class TrainingConfig:
    """Everything the run depends on, and the number of threads."""

    seed: int = 0
    tower_steps: int = 1500
    refit_batches: int = 60
    tower_batch: int = 96
    tower_muon_lr: float = 8e-3
    tower_digits_share: float = 0.5
    language_steps: int = 6000
    language_batch: int = 24
    row_length: int = 160
    digits_share: float = 0.35
    muon_lr: float = 8e-3
    adam_lr: float = 2e-3
    warmup_steps: int = 100
    decay_from: float = 0.6
    """Share of each stage after which the learning rate falls linearly to a hundredth."""
    rank_weight: float = 0.5
    """Weight of the ranking term: log-likelihood of a caption above that of its hard negative."""
    num_threads: int = 1


@dataclass(frozen=True)
class Lesson:
    """What is asked during a part of the language stage."""

    until: float
    mix: dict[LessonKind, float]
    num_ranked: int = 0
    """Pairs of caption and hard negative behind each image."""
    turns_share: float = 0.0
    """Share of images whose questions form one conversation."""
    blind_share: float = 0.0
    """Share of questions that need no image."""
    lr_scale: float = 1.0
    restart: bool = False
    """Begin with new optimizer states and a new warm-up: relations stayed at chance without."""


_ALL = {
    "attribute": 1.0, "place": 1.0, "direction": 2.0, "neighbour": 1.5, "presence": 1.0, "relation": 1.5,
    "count": 0.7, "caption": 3.0, "choice": 1.0,
}  # fmt: skip
_BINDING = {
    "attribute": 1.0, "place": 2.0, "direction": 4.0, "neighbour": 1.0, "presence": 1.0, "relation": 2.0,
    "caption": 1.5,
}  # fmt: skip
LESSONS = (
    Lesson(0.035, {"attribute": 3, "place": 4, "direction": 3}),
    Lesson(
        0.12,
        {"attribute": 1.5, "place": 2, "direction": 4, "neighbour": 2, "presence": 0.5, "relation": 1.5,
         "caption": 2},
        blind_share=0.02,
    ),
    Lesson(0.135, _ALL, num_ranked=1, turns_share=0.15, blind_share=0.03),
    Lesson(0.28, _BINDING, lr_scale=0.45, restart=True, turns_share=0.05, blind_share=0.02),
    Lesson(1.0, _ALL, lr_scale=0.45, num_ranked=1, turns_share=0.15, blind_share=0.03),
)  # fmt: skip
RANKED_KINDS: tuple[PairKind, ...] = (*PAIR_KINDS, "swap_obj", "replace_rel", "swap_obj", "replace_rel")


def training_scenes(
    config: TrainingConfig, stage: int, step: int, num: int
) -> tuple[Scenes, Tensor, np.random.Generator]:
    """The scenes of one step, their pixels as the processor would give them, and the step's generator."""
    rng = generator(config.seed, TRAIN_STREAM, stage, step)
    share = config.digits_share if stage == 1 else config.tower_digits_share
    variant: Variant = "digits" if rng.random() < share else "shapes"
    scenes = sample_scenes(rng, num, variant, "train")
    pixels = torch.from_numpy(draw(scenes, rng)).permute(0, 3, 1, 2).float() / 127.5 - 1
    return scenes, pixels, rng


class PatchHeads(nn.Module):
    """Linear read-outs of what lies in each patch, used while the tower and adapter are pre-trained."""

    def __init__(self, width: int) -> None:
        super().__init__()
        sizes = {"kind": NO_KIND + 1, "colour": len(COLOURS), "large": 2, "centre": 2}
        self.heads = nn.ModuleDict({name: nn.Linear(width, size) for name, size in sizes.items()})

    def forward(self, features_BPD: Tensor, scenes: Scenes) -> tuple[Tensor, Tensor]:
        """Loss, and the share of object patches whose kind is named right."""
        labels = patch_labels(scenes)
        loss = features_BPD.new_zeros(())
        for name in ("kind", "colour", "large"):
            logits = self.heads[name](features_BPD).flatten(0, 1)
            weight = torch.ones(logits.shape[1])
            if name == "kind":
                weight[NO_KIND] = 0.3  # most patches are empty, and soon known to be
            loss = loss + F.cross_entropy(logits, torch.from_numpy(getattr(labels, name)).flatten(), weight)
        centre = torch.from_numpy(labels.centre).float()
        loss = loss + 10 * F.smooth_l1_loss(self.heads["centre"](features_BPD), centre, beta=0.1)
        kind = torch.from_numpy(labels.kind)
        right = self.heads["kind"](features_BPD).argmax(-1) == kind
        return loss, right[kind != NO_KIND].float().mean()


def feature_code(labels: PatchLabels, width: int) -> Tensor:
    """What the adapter shall say of a patch, `[B, P, width]`: kind, colour, size and place, each of similar norm."""
    kind, colour, large = (torch.from_numpy(values) for values in (labels.kind, labels.colour, labels.large))
    parts = [F.one_hot(kind, NO_KIND + 1).float()]
    for values, size in ((colour, len(COLOURS)), (large, 2)):
        parts.append(F.one_hot(values.clamp_min(0), size) * (values >= 0)[..., None])
    parts.append(0.7 * place_code(torch.from_numpy(labels.centre).float()))
    code = torch.cat(parts, dim=-1)
    return F.pad(code, (0, width - code.shape[-1]))


def image_features(model: LlavaForConditionalGeneration, pixels: Tensor) -> Tensor:
    """Adapter outputs `[B, P, D]`."""
    return torch.stack(list(model.model.get_image_features(pixels).pooler_output))


def train_tower(model: LlavaForConditionalGeneration, config: TrainingConfig, log: Log) -> None:
    """Tower and adapter learn to say, patch by patch, what lies there and where its centre is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed + 1)
        heads = PatchHeads(model.config.text_config.hidden_size)
    parts = [model.model.vision_tower, model.model.multi_modal_projector, heads]
    optimizers = Optimizers([(part, 1.0) for part in parts], config.tower_muon_lr, config)
    for step in range(config.tower_steps):
        scenes, pixels, _ = training_scenes(config, 0, step, config.tower_batch)
        loss, right = heads(image_features(model, pixels), scenes)
        loss.backward()
        optimizers.step(step / config.tower_steps)
        log.add(scenes.variant, loss=loss.item(), kind=right.item())
        log.show("tower", step, config.tower_steps)


@torch.no_grad()
def refit_adapter(model: LlavaForConditionalGeneration, config: TrainingConfig) -> None:
    """Set the adapter's second linear by least squares, so that its outputs are near `feature_code`.

    After the read-outs alone, place explained under 1 % of the outputs' variance, they were fifty times as long as
    word embeddings, and the language model learnt no relation in 1,000 steps.
    """
    adapter = model.model.multi_modal_projector
    hidden, codes, weights = [], [], []
    handle = adapter.act.register_forward_hook(lambda _module, _inputs, output: hidden.append(output.flatten(0, 1)))
    for step in range(config.refit_batches):
        scenes, pixels, _ = training_scenes(config, 2, step, config.tower_batch)
        image_features(model, pixels)
        labels = patch_labels(scenes)
        codes.append(feature_code(labels, adapter.linear_2.out_features).flatten(0, 1))
        weights.append(torch.from_numpy(np.where(labels.kind == NO_KIND, 0.3, 1.0)).flatten())
    handle.remove()
    inputs = F.pad(torch.cat(hidden).double(), (0, 1), value=1.0)
    weighted = inputs * torch.cat(weights)[:, None]
    gram = weighted.T @ inputs
    gram += 1e-4 * gram.diagonal().mean() * torch.eye(len(gram))
    solution = torch.linalg.solve(gram, weighted.T @ torch.cat(codes).double())
    adapter.linear_2.weight.copy_(solution[:-1].T)
    adapter.linear_2.bias.copy_(solution[-1])


def lesson_rows(
    lesson: Lesson, scenes: Scenes, rng: np.random.Generator, length: int
) -> tuple[list[Row], list[tuple[int, int, int]]]:
    """Rows of questions about each scene, and the ranked pairs as (row, true segment, false segment)."""
    kinds, weights = list(lesson.mix), np.array(list(lesson.mix.values()))
    share = np.cumsum(weights) / weights.sum()
    rows, ranked = [], []
    for index in range(len(scenes)):
        things = scenes.things(index)
        row = Row(length, turns=bool(rng.random() < lesson.turns_share))
        for _ in range(0 if row.turns else lesson.num_ranked):
            kind = RANKED_KINDS[int(rng.random() * len(RANKED_KINDS))]
            if pair := hard_negative(rng, things, kind, scenes.variant, tries=4):
                true = row.add(Exchange(DESCRIBE, str(pair[0])))
                false = row.add(Exchange(DESCRIBE, str(pair[1])), learnt=False)
                if true and false:
                    ranked.append((index, true, false))
        for _ in range(40):
            if rng.random() < lesson.blind_share and not row.turns:
                exchange = ask_without_image(rng)
            else:
                asked = kinds[int(np.searchsorted(share, rng.random()))]
                question = ask_choice if asked == "choice" else QUESTIONS[asked]
                exchange = question(rng, things, scenes.variant)
            if exchange and row.add(exchange) is None:
                break
        rows.append(row)
    return rows, ranked


def answer_logprobs(model: LlavaForConditionalGeneration, pixels: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Log-probability of each answer token, and whether it was the likeliest one; both `[R]`."""
    embeds = model.get_input_embeddings()(batch.ids_BT)
    is_image = (batch.ids_BT == model.config.image_token_id)[..., None]
    embeds = embeds.masked_scatter(is_image, image_features(model, pixels))
    hidden = model.model.language_model(
        inputs_embeds=embeds, attention_mask=batch.mask_B1TT, position_ids=batch.position_BT, use_cache=False
    ).last_hidden_state
    logits = model.lm_head(hidden.flatten(0, 1)[batch.row_R])
    logprob = logits.log_softmax(-1).gather(1, batch.target_R[:, None])[:, 0]
    return logprob, logits.argmax(-1) == batch.target_R


def train_language(model: LlavaForConditionalGeneration, config: TrainingConfig, log: Log, scorer: Scorer) -> None:
    """The language model learns to answer: attributes and places, then relations and captions, then choices."""
    # What the tower and adapter see is settled; leaving them out saves a quarter of each step.
    for part in (model.model.vision_tower, model.model.multi_modal_projector):
        part.requires_grad_(False)
    modules = [(part, 1.0) for part in (model.model.language_model, model.lm_head)]
    optimizers = Optimizers(modules, config.muon_lr, config)
    lessons = iter(LESSONS)
    lesson = next(lessons)
    for step in range(config.language_steps):
        progress = step / config.language_steps
        if progress >= lesson.until:
            lesson = next(lessons)
            if lesson.restart:
                optimizers = Optimizers(modules, config.muon_lr, config)
        scenes, pixels, rng = training_scenes(config, 1, step, config.language_batch)
        rows, ranked = lesson_rows(lesson, scenes, rng, config.row_length)
        batch = pack(rows)
        logprob, right = answer_logprobs(model, pixels, batch)
        loss = -(logprob * batch.learnt_R).sum() / batch.learnt_R.sum()
        log.add(
            scenes.variant,
            loss=loss.item(),
            token=(right * batch.learnt_R).sum().item() / batch.learnt_R.sum().item(),
        )
        if ranked:
            score = logprob.new_zeros(batch.num_segments).index_add(0, batch.segment_R, logprob)
            true, false = (
                score[torch.tensor([batch.first_segment_B[row] + pair[which] - 1 for row, *pair in ranked])]
                for which in (0, 1)
            )
            loss = loss + config.rank_weight * F.softplus(false - true).mean()
            log.add(scenes.variant, ranked=(true > false).float().mean().item())
        loss.backward()
        optimizers.step(progress, lesson.lr_scale)
        log.show("language", step, config.language_steps)
        scorer.maybe(step)


class Scorer:
    """Scores the teacher on held-out pairs now and then, and keeps what it has learnt so far on disk."""

    def __init__(self, model: LlavaForConditionalGeneration, every: int, num: int, keep: Path | None) -> None:
        self.model, self.every, self.keep = model, every, keep
        self.processor = build_processor()
        self.pairs = {v: sample_pairs(num, EVALUATION_SEED + 1, v) for v in ("shapes", "digits")}

    def maybe(self, step: int) -> None:
        """Score and keep every `every` steps."""
        if self.every and (step + 1) % self.every == 0:
            for variant, pairs in self.pairs.items():
                accuracy = pair_accuracy(self.model, self.processor, pairs)
                print(
                    "        ",
                    variant,
                    {kind: round(value, 3) for kind, value in accuracy.items()},
                    flush=True,
                )
            if self.keep:
                save_file(self.model.state_dict(), self.keep)


def save_teacher(model: LlavaForConditionalGeneration, folder: Path) -> None:
    """Half precision weights, configs, processor, tokenizer and chat template."""
    folder.mkdir(parents=True, exist_ok=True)
    model.half().save_pretrained(folder)
    model.float()
    build_processor().save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the teacher")
    parser.add_argument("--seed", type=int, default=TrainingConfig.seed)
    parser.add_argument("--tower-steps", type=int, default=TrainingConfig.tower_steps)
    parser.add_argument("--language-steps", type=int, default=TrainingConfig.language_steps)
    parser.add_argument("--score-every", type=int, default=500, help="steps between scores on held-out pairs")
    parser.add_argument("--num-pairs", type=int, default=500, help="pairs of each kind in the final score")
    parser.add_argument("--keep", type=Path, help="file for the weights at each score")
    args = parser.parse_args()
    config = TrainingConfig(
        seed=args.seed,
        tower_steps=args.tower_steps,
        language_steps=args.language_steps,
    )
    torch.set_num_threads(config.num_threads)
    started = time.monotonic()
    model = build_teacher(config.seed)
    model.train()
    log = Log(every=100)
    train_tower(model, config, log)
    refit_adapter(model, config)
    tower_seconds = time.monotonic() - started
    started = time.monotonic()
    train_language(model, config, log, Scorer(model, args.score_every, 50, args.keep))
    seconds = time.monotonic() - started
    save_teacher(model, args.out)
    model = LlavaForConditionalGeneration.from_pretrained(args.out, dtype=torch.float32, trust_remote_code=False)
    accuracy = {
        variant: pair_accuracy(model, build_processor(), sample_pairs(args.num_pairs, EVALUATION_SEED, variant))
        for variant in ("shapes", "digits")
    }
    report = {
        "command": "python -m examples.scenes.train_teacher " + shlex.join(sys.argv[1:]),
        "date": datetime.now(UTC).date().isoformat(),
        "config": asdict(config),
        "seconds": {"tower": round(tower_seconds), "language": round(seconds)},
        "machine": machine(),
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "num_images": {
            "tower": config.tower_steps * config.tower_batch,
            "adapter_refit": config.refit_batches * config.tower_batch,
            "language": config.language_steps * config.language_batch,
        },
        "evaluation": {
            "seed": EVALUATION_SEED,
            "num_pairs_of_each_kind": args.num_pairs,
            "accuracy": accuracy,
        },
    }
    (args.out / "TRAINING.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report["evaluation"], indent=2))


if __name__ == "__main__":
    main()
