"""Head and losses at answer rows, forward and backward: all logits at once, in parts, or with the gradient made ahead.

- `whole`: logits of all rows, and each loss a pass over them.
- `parts`: what training does; logits of all parts but the last are computed again in the backward pass.
- `ahead`: each part's gradient is computed in the forward pass and kept for hidden states and weight (the way of fused
  linear cross entropies), so that nothing is computed twice.

Seconds are the processor's, ratios medians within a turn; bytes are the highest resident ones beyond those before,
head and hidden states not counted, gradients of both counted.

    python -m benchmarks.answer_head
"""

import argparse
import ctypes
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.memory import PeakMemory
from benchmarks.results import RESULTS, command_line, interleaved, median_ratio, save_result, spent
from stages.student.losses.head import answer_losses
from stages.student.losses.logits import TeacherRows, next_token_loss, teacher_rows
from storage.codecs.answer_logits import AnswerLogitsCodec
from storage.codecs.codec_settings import LogitCodecConfig
from storage.codecs.tail_samples import row_addresses


@dataclass(frozen=True)
class Sizes:
    """What goes through the head."""

    rows: int = 1024
    width: int = 512
    vocab: int = 32_000
    parts: tuple[int, ...] = (2, 8)
    repeats: int = 5


class Bench:
    """A head, hidden states, answers and stored teacher rows."""

    def __init__(self, sizes: Sizes, *, trained: bool) -> None:
        generator = torch.Generator().manual_seed(0)
        self.sizes = sizes
        self.head = nn.Linear(sizes.width, sizes.vocab, bias=False).requires_grad_(trained)
        self.hidden_Rd = torch.randn(sizes.rows, sizes.width, generator=generator).requires_grad_()
        self.answer_R = torch.randint(0, sizes.vocab, (sizes.rows,), generator=generator)
        codec = LogitCodecConfig(vocab_size=sizes.vocab)
        parts = torch.split(torch.arange(sizes.rows), 64)
        logits = (torch.randn(len(part), sizes.vocab, generator=generator) * 3 for part in parts)
        addresses_R = row_addresses("bench", sizes.rows)
        records = [
            AnswerLogitsCodec(codec).encode(rows, addresses_R[part]) for rows, part in zip(logits, parts, strict=True)
        ]
        self.teacher: TeacherRows = teacher_rows(AnswerLogitsCodec(codec).decode(torch.cat(records)), sizes.vocab, 1.0)

    def whole(self) -> None:
        """All logits at once."""
        logits_RV = self.head(self.hidden_Rd)
        loss = next_token_loss(logits_RV, self.answer_R).sum() + self.teacher.loss(logits_RV, "forward").sum()
        torch.autograd.backward(loss)

    def parts(self, count: int) -> None:
        """As training does."""
        lm_R, kd_R = self._losses(self.hidden_Rd, slice(None), self.sizes.rows // count)
        torch.autograd.backward(lm_R.sum() + kd_R.sum())

    def ahead(self, count: int) -> None:
        """Part by part forward and backward; what a custom autograd function would keep until its own backward."""
        size = self.sizes.rows // count
        self.hidden_Rd.grad = torch.zeros_like(self.hidden_Rd)
        for start in range(0, self.sizes.rows, size):
            rows = slice(start, start + size)
            hidden_rd = self.hidden_Rd[rows].detach().requires_grad_()
            lm_R, kd_R = self._losses(hidden_rd, rows, size)
            torch.autograd.backward(lm_R.sum() + kd_R.sum())
            assert hidden_rd.grad is not None
            self.hidden_Rd.grad[rows] = hidden_rd.grad

    def _losses(self, hidden_rd: Tensor, rows: slice, rows_at_once: int) -> tuple[Tensor, Tensor]:
        vocab = self.sizes.vocab
        lm_R, kd_R = answer_losses(
            self.head,
            hidden_rd,
            self.answer_R[rows],
            self.teacher[rows],
            vocab_size=vocab,
            logits_at_once=rows_at_once * vocab,
        )
        assert kd_R is not None
        return lm_R, kd_R

    def measured(self, way: Callable[[], None]) -> tuple[float, int]:
        """Seconds of the processor, bytes at the highest."""
        self.hidden_Rd.grad = self.head.weight.grad = None
        # What an earlier way gave back and the allocator kept would hide what this one needs.
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        peak = PeakMemory()
        seconds = spent(way).cpu_s
        return seconds, peak.grown_bytes


def measure(sizes: Sizes, *, trained: bool) -> dict[str, Any]:
    """Every way, in turns."""
    bench = Bench(sizes, trained=trained)
    ways: dict[str, Callable[[], None]] = {"whole": bench.whole}
    for count in sizes.parts:
        ways |= {f"{count} parts": partial(bench.parts, count), f"{count} parts, ahead": partial(bench.ahead, count)}
    found = interleaved({name: partial(bench.measured, way) for name, way in ways.items()}, sizes.repeats)
    seconds = {name: [s for s, _ in runs] for name, runs in found.items()}
    return {
        name: {
            "cpu_s": statistics.median(seconds[name]),
            "over_whole": median_ratio(seconds[name], seconds["whole"]),
            "peak_mb": statistics.median(size for _, size in runs) / 1e6,
        }
        for name, runs in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "answer_head.json")
    flags = parser.parse_args()
    sizes = Sizes()
    heads = {"trained head": True, "frozen head": False}
    result = {"sizes": asdict(sizes)} | {name: measure(sizes, trained=trained) for name, trained in heads.items()}
    save_result(flags.out, torch.device("cpu"), command_line("benchmarks.answer_head"), result)
    print(flags.out.read_text())


if __name__ == "__main__":
    main()
