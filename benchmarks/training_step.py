"""What a distillation step from stored targets costs in time and memory, against three other ways to take a step.

- `supervised`: the answers alone, nothing of the teacher; vocabulary logits at answer rows, as in the sft stage.
- `cached`: answers, stored logits and stored maps, decoded in the step. What `cdp train-student` does in its dft stage.
- `compiled`: the same with torch.compile on the MLPs of the student's decoder; attention, where the hook sits, is not.
- `online`: the same losses with the teacher in the loop, both sides with the fast kernel and capture.
- `released`: the teacher in the loop the way the released code does it: eager attention, every map of every layer, and
  vocabulary logits at every position, on both sides.

Random weights; LoRA on the decoder. Needs torch, transformers and peft only; runs on a GPU where there is one (then at
the published shape, in bfloat16), else on the CPU, scaled down.

    python -m benchmarks.training_step --repeats 5
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Qwen2Config

from benchmarks.capture import IMAGE_TOKEN, make_model
from benchmarks.capture import Shape as TeacherShape
from benchmarks.memory import PeakMemory
from benchmarks.results import RESULTS, Spent, command_line, interleaved, median_ratio, save_result, spent
from stages.attention.capture import AttentionCapture, enable_capture
from stages.attention.layer_selection import sliding_windows, student_layers, visual_understanding_layers
from stages.conversations.answer_rows import AnswerRows
from stages.student.data.batch import Batch
from stages.student.layer_matching import LayerMatching
from stages.student.losses.attention import attention_alignment_loss
from stages.student.losses.logits import logit_distillation_loss
from stages.student.model.build import student_config
from stages.student.model.modeling_compodistill import CompoDistillStudentForConditionalGeneration
from stages.student.model.trainable import keep_frozen_in, prepare_for_stage
from stages.student.stage_config import DistilledFinetuning, LoraSettings
from stages.student.training.objective import BatchTotals, DistillationObjective
from storage.codecs.answer_logits import AnswerLogitsCodec
from storage.codecs.attention_maps import MapCodec
from storage.codecs.codec_settings import LogitCodecConfig, MapCodecConfig
from storage.codecs.tail_samples import row_addresses
from storage.codecs.windows import window_means, window_rows

MATCHED = 7
WAYS = ("supervised", "cached", "compiled", "online", "released")


@dataclass(frozen=True)
class Shape:
    """Sizes of the random models and of their batch; the teacher's layers and widths are larger than the student's."""

    student_layers: int
    student_hidden: int
    student_intermediate: int
    student_heads: int
    teacher_layers: int
    teacher_hidden: int
    teacher_intermediate: int
    teacher_heads: int
    vocab: int
    batch: int
    lora_rank: int
    tokens: int = 896
    answers: int = 100
    patches: int = 27
    """A side of the image; its square less one (the first token is dropped) is N."""
    dtype: str = "float32"

    @property
    def image_tokens(self) -> int:
        """N."""
        return self.patches**2 - 1


PUBLISHED = Shape(
    student_layers=24, student_hidden=2048, student_intermediate=5504, student_heads=16, teacher_layers=40,
    teacher_hidden=2560, teacher_intermediate=6912, teacher_heads=20, vocab=151_936, batch=8, lora_rank=128,
    dtype="bfloat16",
)  # fmt: skip
"""Qwen1.5-1.8B from Qwen1.5-4B."""
SCALED_DOWN = Shape(
    student_layers=24, student_hidden=768, student_intermediate=2048, student_heads=12, teacher_layers=40,
    teacher_hidden=896, teacher_intermediate=2432, teacher_heads=14, vocab=32_000, batch=1, lora_rank=64,
)  # fmt: skip


class Bench:
    """A teacher, a student, a batch with its stored targets, and the ways to take a step."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        self.shape, self.device = shape, device
        self.dtype = getattr(torch, shape.dtype)
        self.teacher = make_model(_teacher_shape(shape)).to(device, self.dtype).eval().requires_grad_(False)
        self.stage = DistilledFinetuning()
        self.student = self._make_student()
        self.captured = tuple(visual_understanding_layers(shape.teacher_layers))
        windows = sliding_windows(self.captured, MATCHED)
        layers = student_layers(shape.student_layers, MATCHED)
        self.map_codec, self.logit_codec = MapCodecConfig(name="sqrt4"), LogitCodecConfig(vocab_size=shape.vocab)
        self.matching = LayerMatching(layers, self.captured, windows, windows, self.map_codec)
        self.batch = self._make_batch()
        supervised = DistilledFinetuning(kd_weight=0.0, attention_weight=0.0)
        self.objectives = {
            "supervised": DistillationObjective(self.student, supervised, self.logit_codec, None),
            "cached": DistillationObjective(self.student, self.stage, self.logit_codec, self.matching),
        }
        trained = [p for p in self.student.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0)
        self.student.train()
        self.compiled = False

    def step(self, way: str) -> float:
        """One optimizer step; its loss."""
        with self._autocast(), self._compiling(way):
            loss = self._loss(way)
            loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())

    def loss_of(self, way: str) -> float:
        """Without a step."""
        with torch.no_grad(), self._autocast(), self._compiling(way):
            return float(self._loss(way))

    def spent(self, way: str) -> Spent:
        """Time of one step."""

        def run_and_wait() -> None:
            self.step(way)
            self._wait()

        self._wait()
        return spent(run_and_wait)

    def held_bytes(self, way: str) -> int:
        """What lies in memory between steps: student, optimizer, and the teacher where it is needed."""
        parameters = [*self.student.parameters()]
        # The optimizer keeps two numbers for each parameter that learns.
        held = [*parameters, *[p for p in parameters if p.requires_grad] * 2]
        if way in ("online", "released"):
            held += self.teacher.parameters()
        return sum(int(p.nbytes) for p in held)

    def peak_bytes(self, way: str) -> int:
        """Memory that a step adds at its highest to what lies there before it."""
        # So that the optimizer's state is there, and what is made once.
        self.step(way)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self.step(way)
            return torch.cuda.max_memory_allocated() - before
        memory = PeakMemory()
        self.step(way)
        return memory.grown_bytes

    def _compiling(self, way: str) -> AbstractContextManager[None]:
        if way == "compiled" and not self.compiled:
            for layer in self.student.model.language_model.layers:
                layer.mlp.compile()
            self.compiled = True
        eager = self.compiled and way != "compiled"
        return torch.compiler.set_stance("force_eager") if eager else nullcontext()

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def _loss(self, way: str) -> Tensor:
        way = "cached" if way == "compiled" else way
        if way in self.objectives:
            enable_capture(self.student)
            loss: Tensor = self.objectives[way](self.batch, BatchTotals(len(self.batch.answers), self.shape.batch))[0]
            return loss
        return self._online_loss() if way == "online" else self._released_loss()

    def _online_loss(self) -> Tensor:
        teacher_RV, maps_LBNN = self._observe()
        enable_capture(self.student)
        capture = AttentionCapture(frozenset(self.matching.student_layers), self.batch.image_positions).to(self.device)
        hidden_BTd = self.student.model(**self.batch.inputs, capture=capture, use_cache=False).last_hidden_state
        student_RV = self.student.lm_head(self._answer_rows(hidden_BTd))
        student_LBNN = torch.stack([capture.maps[layer] for layer in self.matching.student_layers])
        return self._dense_loss(student_RV, teacher_RV, student_LBNN, maps_LBNN)

    def _released_loss(self) -> Tensor:
        inputs = self.batch.inputs
        where = self.batch.image_positions[0]
        with torch.no_grad():
            self.teacher.set_attn_implementation({"text_config": "eager", "vision_config": "sdpa"})
            seen = self.teacher(**inputs, output_attentions=True, use_cache=False)
            maps_LBNN = torch.stack([_image_block(seen.attentions[layer], where) for layer in self.captured])
        self.student.set_attn_implementation({"text_config": "eager", "vision_config": "sdpa"})
        own = self.student(**inputs, output_attentions=True, use_cache=False)
        student_LBNN = torch.stack([_image_block(own.attentions[i], where) for i in self.matching.student_layers])
        rows = self.batch.answers.sequence_R, self.batch.answers.position_R
        return self._dense_loss(own.logits.float()[rows], seen.logits.float()[rows], student_LBNN, maps_LBNN)

    def _dense_loss(self, student_RV: Tensor, teacher_RV: Tensor, student_LBNN: Tensor, maps_LBNN: Tensor) -> Tensor:
        windows_LBNN = window_means(maps_LBNN, window_rows(self.captured, self.matching.windows))
        return (
            F.cross_entropy(student_RV.float(), self.batch.answers.token_R)
            + logit_distillation_loss(student_RV, teacher_RV)
            + attention_alignment_loss(student_LBNN, windows_LBNN)
        )

    @torch.no_grad()
    def _observe(self) -> tuple[Tensor, Tensor]:
        """The teacher's logits at answer rows and its captured maps, as extraction gets them."""
        enable_capture(self.teacher)
        capture = AttentionCapture(frozenset(self.captured), self.batch.image_positions).to(self.device)
        hidden_BTd = self.teacher.model(**self.batch.inputs, capture=capture, use_cache=False).last_hidden_state
        maps_LBNN = torch.stack([capture.maps[layer] for layer in self.captured])
        return self.teacher.lm_head(self._answer_rows(hidden_BTd)), maps_LBNN

    def _answer_rows(self, hidden_BTd: Tensor) -> Tensor:
        return hidden_BTd[self.batch.answers.sequence_R, self.batch.answers.position_R]

    def _make_student(self) -> CompoDistillStudentForConditionalGeneration:
        config = student_config(self.teacher.config.to_dict(), _student_text(self.shape).to_dict())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            student = CompoDistillStudentForConditionalGeneration(config)
        prepare_for_stage(student, self.stage, LoraSettings(rank=self.shape.lora_rank), seed=0)
        if self.dtype == torch.bfloat16:
            keep_frozen_in(student, torch.bfloat16)
        moved: CompoDistillStudentForConditionalGeneration = student.to(self.device)
        return moved

    def _make_batch(self) -> Batch:
        shape, generator = self.shape, torch.Generator().manual_seed(2)
        ids_BT = torch.randint(IMAGE_TOKEN + 1, shape.vocab, (shape.batch, shape.tokens), generator=generator)
        before = 32
        ids_BT[:, before : before + shape.image_tokens] = IMAGE_TOKEN
        side = 14 * shape.patches
        pixels = torch.randn(shape.batch, 3, side, side, generator=generator).to(self.dtype)
        where = torch.arange(before, before + shape.image_tokens)
        answers_A = torch.arange(shape.tokens - shape.answers, shape.tokens)
        self.batch = Batch(
            keys=tuple(f"{row:09d}" for row in range(shape.batch)),
            inputs={"input_ids": ids_BT, "pixel_values": pixels, "attention_mask": torch.ones_like(ids_BT)},
            answers=AnswerRows(
                sequence_R=torch.arange(shape.batch).repeat_interleave(shape.answers),
                position_R=(answers_A - 1).repeat(shape.batch),
                token_R=ids_BT[:, answers_A].flatten(),
            ),
            logits_RQ=torch.zeros(0, 0, dtype=torch.uint8),
            image_positions=(where,) * shape.batch,
            maps=(None,) * shape.batch,
        ).to(self.device, self.dtype)
        teacher_RV, maps_LBNN = self._observe()
        codec = MapCodec.of_layers(self.map_codec, self.captured, self.matching.windows)
        addresses_R = row_addresses("bench", len(teacher_RV)).to(self.device)
        return Batch(
            **{
                **vars(self.batch),
                "logits_RQ": AnswerLogitsCodec(self.logit_codec).encode(teacher_RV.float(), addresses_R),
                # On the CPU, as the loader hands them over: moving and decoding them is part of the step.
                "maps": tuple(codec.encode(maps.float()).to(torch.device("cpu")) for maps in maps_LBNN.unbind(1)),
            }
        )

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _image_block(attention_BHTT: Tensor, where_N: Tensor) -> Tensor:
    return attention_BHTT.float().mean(1)[:, where_N][:, :, where_N]


def _student_text(shape: Shape) -> Qwen2Config:
    return Qwen2Config(
        vocab_size=shape.vocab,
        hidden_size=shape.student_hidden,
        intermediate_size=shape.student_intermediate,
        num_hidden_layers=shape.student_layers,
        num_attention_heads=shape.student_heads,
        num_key_value_heads=shape.student_heads,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )


def _teacher_shape(shape: Shape) -> TeacherShape:
    # Its vision tower is small: it is the same in all ways.
    return TeacherShape(
        layers=shape.teacher_layers,
        hidden=shape.teacher_hidden,
        intermediate=shape.teacher_intermediate,
        heads=shape.teacher_heads,
        kv_heads=shape.teacher_heads,
        vocab=shape.vocab,
        patches=shape.patches,
    )


def measure(shape: Shape, device: torch.device, repeats: int, memory: dict[str, int]) -> dict[str, Any]:
    """All figures of one run; `memory` was measured in processes of its own."""
    bench = Bench(shape, device)
    held = {way: bench.held_bytes(way) for way in WAYS}
    losses = {way: bench.loss_of(way) for way in WAYS}
    steps: dict[str, Callable[[], Spent]] = {way: partial(bench.spent, way) for way in WAYS}
    for step in steps.values():
        step()
    taken = interleaved(steps, repeats)
    # A GPU works while the processor waits.
    clock = "cpu_s" if device.type == "cpu" else "wall_s"
    seconds = {way: [getattr(one, clock) for one in taken[way]] for way in WAYS}
    return {
        "shape": {**asdict(shape), "image_tokens": shape.image_tokens},
        "student_parameters": sum(p.numel() for p in bench.student.parameters()),
        "teacher_parameters": sum(p.numel() for p in bench.teacher.parameters()),
        "repeats": repeats,
        "clock": clock,
        "seconds": {way: statistics.median(seconds[way]) for way in WAYS},
        "time_over_supervised": {way: median_ratio(seconds[way], seconds["supervised"]) for way in WAYS},
        "samples_per_s": {way: shape.batch / statistics.median(seconds[way]) for way in WAYS},
        "peak_bytes_of_a_step": memory,
        "held_bytes": held,
        "memory_over_supervised": {
            way: (memory[way] + held[way]) / (memory["supervised"] + held["supervised"]) for way in WAYS
        },
        "step_memory_over_supervised": {way: memory[way] / memory["supervised"] for way in WAYS},
        "losses": losses,
    }


def measure_memory(shape: Shape, threads: int) -> dict[str, int]:
    """Peak bytes of each way, each in its own process."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.training_step",
        *_flags(shape),
        "--threads",
        str(threads),
        "--memory-of",
    ]
    return {way: json.loads(subprocess.check_output([*command, way], text=True)) for way in WAYS}


def _flags(shape: Shape) -> list[str]:
    return [part for name, value in asdict(shape).items() for part in (f"--{name.replace('_', '-')}", str(value))]


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in asdict(PUBLISHED if device.type == "cuda" else SCALED_DOWN).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=RESULTS / f"training_step-{device.type}.json")
    parser.add_argument("--memory-of", choices=WAYS, help=argparse.SUPPRESS)
    flags = vars(parser.parse_args())
    repeats, threads, out, way = (flags.pop(name) for name in ("repeats", "threads", "out", "memory_of"))
    torch.set_num_threads(threads)
    shape = Shape(**flags)
    if way is not None:
        print(Bench(shape, device).peak_bytes(way))
        return
    result = measure(shape, device, repeats, measure_memory(shape, threads))
    save_result(out, device, command_line("benchmarks.training_step"), {"device": device.type, **result})
    print(out.read_text())


if __name__ == "__main__":
    main()
