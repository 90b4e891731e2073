"""The training objective of a batch: LM + logit distillation + attention alignment, from stored targets."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from stages.student.data.batch import Batch
from stages.student.layer_matching import LayerMatching
from stages.student.losses.attention import answer_loss, matched_loss
from stages.student.losses.head import answer_losses
from stages.student.losses.logits import teacher_rows
from stages.student.model.student import Student, projector_parameters
from stages.student.stage_config import StageConfig
from stages.student.training.forward import StudentOutput, run_student
from storage.codecs.answer_logits import AnswerLogitsCodec
from storage.codecs.codec_settings import LogitCodecConfig
from storage.errors import UserError

TERMS = ("lm", "kd", "attention", "answer_attention")
"""Of the loss, in the order in which all of them are summed up."""


@dataclass(frozen=True)
class BatchTotals:
    """What the sums are divided by: counts over the whole global batch, all ranks and accumulation steps."""

    answer_rows: int
    samples_with_image: int
    answers: int = 0
    """That enter the loss on answer attention."""

    def __add__(self, other: "BatchTotals") -> "BatchTotals":
        return BatchTotals(*(ours + theirs for ours, theirs in zip(astuple(self), astuple(other), strict=True)))

    def of_term(self, name: str) -> int:
        """What the sums of a term are divided by."""
        counts = {"attention": self.samples_with_image, "answer_attention": self.answers}
        return max(counts.get(name, self.answer_rows), 1)


@dataclass(frozen=True)
class GlobalStep:
    """What all processes know of a step before they take it."""

    totals: BatchTotals
    num_samples: int
    is_stopped: bool
    """Whether one of them was asked to stop, so that all of them stop at the same step."""

    @classmethod
    def of(cls, group: Sequence[Batch], accelerator: Accelerator, *, stop: bool) -> "GlobalStep":
        """Sums up the microbatches of all processes; all must call this."""
        rows, images = sum(len(b.answers) for b in group), sum(b.num_with_image for b in group)
        answers, samples = sum(b.num_answers for b in group), sum(len(b.keys) for b in group)
        counts = torch.tensor([rows, images, answers, samples, stop], device=accelerator.device)
        *totals, num_samples, num_stopped = accelerator.reduce(counts, reduction="sum").tolist()
        return cls(BatchTotals(*totals), num_samples, num_stopped > 0)


class DistillationObjective(nn.Module):
    """Wraps the student, so that one `forward` computes a microbatch's share of the loss (and DDP sees one module)."""

    def __init__(
        self, student: Student, stage: StageConfig, logit_codec: LogitCodecConfig, matching: LayerMatching | None
    ) -> None:
        super().__init__()
        self.student, self.stage = student, stage
        weights = (stage.lm_weight, stage.kd_weight, stage.attention_weight, stage.answer_attention_weight)
        self.weights = dict(zip(TERMS, weights, strict=True))
        self.logit_codec = logit_codec
        self.matching = matching if stage.matches_layers else None

    def forward(self, batch: Batch, totals: BatchTotals) -> tuple[Tensor, dict[str, Tensor]]:
        """The microbatch's share of the global batch's loss, and of each term (detached, unweighted).

        Summed over all microbatches of the global batch the shares give: LM and KD as means over answer rows,
        attention as the sum over matched layers, mean over the samples with an image, answer attention as the sum over
        matched layers, mean over the answers.
        """
        if not batch.keys:
            return self._nothing(batch.answers.token_R.device)
        sink_mask = self.stage.attention_sink_mask
        output = run_student(self.student, batch, self.matching, sink_mask=sink_mask)
        terms = self._answer_terms(batch, output.hidden_BTd, totals.of_term("lm"))
        terms |= {name: total / totals.of_term(name) for name, total in self._attention_sums(output).items()}
        loss = torch.stack([self.weights[name] * value for name, value in terms.items()]).sum()
        if "pixel_values" not in batch.inputs:
            loss = loss + self._zero_of_projector()
        return loss, {name: value.detach() for name, value in terms.items()}

    def _attention_sums(self, output: StudentOutput) -> dict[str, Tensor]:
        """The terms on attention that the stage has; zero for a batch of text alone, as all ranks sum up the same."""
        kind, sink_mask, windows = self.stage.attention_loss, self.stage.attention_sink_mask, output.windows
        sums = {}
        nothing = torch.zeros((), device=output.hidden_BTd.device)
        if self.matching is None:
            return {}
        if self.weights["attention"] > 0:
            sums["attention"] = nothing
            if windows is not None:
                losses_WB = [
                    matched_loss(*maps, windows.num_tokens_B, kind=kind, sink_mask=sink_mask)
                    for maps in zip(output.maps, windows.maps_WBNN, windows.keep_WBNN, strict=True)
                ]
                sums["attention"] = torch.stack(losses_WB).sum(0).sum()
        if self.weights["answer_attention"] > 0:
            losses = [answer_loss(*pair, kind=kind, sink_mask=sink_mask).sum() for pair in output.answers]
            sums["answer_attention"] = torch.stack(losses).sum() if losses else nothing
        return sums

    def _answer_terms(self, batch: Batch, hidden_BTd: Tensor, num_rows: int) -> dict[str, Tensor]:
        vocab_size, teacher = self.student.config.get_text_config().vocab_size, None
        if self.weights["kd"] > 0:
            stored = AnswerLogitsCodec(self.logit_codec).decode(batch.logits_RQ)
            teacher = teacher_rows(stored, vocab_size, self.stage.kd_temperature)
        # Vocabulary logits at answer rows only: image and question positions predict nothing that is scored.
        hidden_Rd = hidden_BTd[batch.answers.sequence_R, batch.answers.position_R]
        lm_R, kd_R = answer_losses(
            self.student.lm_head,
            hidden_Rd,
            batch.answers.token_R,
            teacher,
            self.stage.kd_divergence,
            vocab_size=vocab_size,
        )
        terms = {"lm": lm_R.sum() / num_rows}
        return terms if kd_R is None else {**terms, "kd": kd_R.sum() / num_rows}

    def _nothing(self, device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
        """A rank without a share of the last step still takes part in it, with zero gradients.

        One token goes through decoder and head: where parameters are gathered layer by layer, every rank must ask for
        every layer.
        """
        names = [name for name, weight in self.weights.items() if name == "lm" or weight > 0]
        token = torch.zeros(1, 1, dtype=torch.long, device=device)
        hidden_BTd = self.student.model(input_ids=token, use_cache=False).last_hidden_state
        loss = self.student.lm_head(hidden_BTd).sum() * 0 + self._zero_of_projector()
        return loss, {name: torch.zeros((), device=device) for name in names}

    def _zero_of_projector(self) -> Tensor:
        """Zero, with a zero gradient for the projector. Text alone does not go through it, but it may be all that
        learns, and DDP waits for its gradient.
        """
        learning = [parameter for parameter in projector_parameters(self.student) if parameter.requires_grad]
        return sum((parameter.sum() * 0 for parameter in learning), torch.zeros((), device=self.student.device))


def refuse_not_finite(values: Mapping[str, float], step: int, group: Sequence[Batch]) -> None:
    """Ends all processes where a value that they share is not a number; `group` has this process's microbatches.

    Raises:
        UserError: If one is infinite or NaN; names the samples of all processes.
    """
    for name, value in values.items():
        if not math.isfinite(value):
            keys = ", ".join(gather_object([key for batch in group for key in batch.keys]))
            raise UserError(
                f"the {name} is {value} at step {step}; the batch holds samples {keys}. Lower the learning rate, or "
                "look at these samples"
            )
