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
from stages.student.losses.across_tokenizers import AlignedRows, SharedTokens
from stages.student.losses.attention import answer_loss, matched_loss
from stages.student.losses.head import answer_losses
from stages.student.losses.logits import TeacherRows, teacher_rows
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
    kd_rows: int = 0
    """Answer rows with the teacher's logits; 0 counts as all, or all losses on them are 0."""

    def __add__(self, other: "BatchTotals") -> "BatchTotals":
        return BatchTotals(*(ours + theirs for ours, theirs in zip(astuple(self), astuple(other), strict=True)))

    def of_term(self, name: str) -> int:
        """What the sums of a term are divided by."""
        kd_rows = self.kd_rows or self.answer_rows
        counts = {"kd": kd_rows, "attention": self.samples_with_image, "answer_attention": self.answers}
        return max(counts.get(name, self.answer_rows), 1)


@dataclass(frozen=True)
class GlobalStep:
    """What all processes know of a step before they take it."""

    totals: BatchTotals
    num_samples: int
    num_uncompared: int
    """Samples none of whose answer rows has logits that can be compared."""
    is_stopped: bool
    """Whether one of them was asked to stop, so that all of them stop at the same step."""

    @classmethod
    def of(cls, group: Sequence[Batch], accelerator: Accelerator, *, stop: bool) -> "GlobalStep":
        """Sums up the microbatches of all processes; all must call this."""
        rows, images = sum(len(b.answers) for b in group), sum(b.num_with_image for b in group)
        answers, samples = sum(b.num_answers for b in group), sum(len(b.keys) for b in group)
        kd_rows, uncompared = sum(len(b.logits_RQ) for b in group), sum(b.num_uncompared for b in group)
        counts = torch.tensor([rows, images, answers, kd_rows, samples, uncompared, stop], device=accelerator.device)
        *totals, num_samples, num_uncompared, num_stopped = accelerator.reduce(counts, reduction="sum").tolist()
        return cls(BatchTotals(*totals), num_samples, num_uncompared, num_stopped > 0)


class DistillationObjective(nn.Module):
    """Wraps the student, so that one `forward` computes a microbatch's share of the loss (and DDP sees one module)."""

    def __init__(
        self,
        student: Student,
        stage: StageConfig,
        logit_codec: LogitCodecConfig,
        matching: LayerMatching | None,
        shared: SharedTokens | None = None,
    ) -> None:
        super().__init__()
        self.shared = shared
        self.student, self.stage = student, stage
        weights = (stage.lm_weight, stage.kd_weight, stage.attention_weight, stage.answer_attention_weight)
        self.weights = dict(zip(TERMS, weights, strict=True))
        self.logit_codec = logit_codec
        self.matching = matching if stage.matches_layers else None

    def forward(self, batch: Batch, totals: BatchTotals) -> tuple[Tensor, dict[str, Tensor]]:
        """The microbatch's share of the global batch's loss, and of each term (detached, unweighted).

        Summed over all microbatches of the global batch the shares give: LM as the mean over answer rows, KD over those
        whose logits are compared,
        attention as the sum over matched layers, mean over the samples with an image, answer attention as the sum over
        matched layers, mean over the answers.
        """
        if not batch.keys:
            return self._nothing(batch.answers.token_R.device)
        sink_mask = self.stage.attention_sink_mask
        output = run_student(self.student, batch, self.matching, sink_mask=sink_mask)
        terms = self._answer_terms(batch, output.hidden_BTd, totals)
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

    def _answer_terms(self, batch: Batch, hidden_BTd: Tensor, totals: BatchTotals) -> dict[str, Tensor]:
        vocab_size = self.student.config.get_text_config().vocab_size
        # Vocabulary logits at answer rows only: image and question positions predict nothing that is scored.
        hidden_Rd = hidden_BTd[batch.answers.sequence_R, batch.answers.position_R]
        lm_R, kd_R = answer_losses(
            self.student.lm_head,
            hidden_Rd,
            batch.answers.token_R,
            self._teacher(batch, vocab_size) if self.weights["kd"] > 0 else None,
            self.stage.kd_divergence,
            vocab_size=vocab_size,
        )
        terms = {"lm": lm_R.sum() / totals.of_term("lm")}
        return terms if kd_R is None else {**terms, "kd": kd_R.sum() / totals.of_term("kd")}

    def _teacher(self, batch: Batch, vocab_size: int) -> TeacherRows | AlignedRows:
        """The teacher's distributions at the batch's answer rows, or at those that can be compared."""
        stored, temperature = AnswerLogitsCodec(self.logit_codec).decode(batch.logits_RQ), self.stage.kd_temperature
        if not self.stage.aligns_tokenizers:
            return teacher_rows(stored, vocab_size, temperature)
        rows_A = torch.arange(len(stored), device=batch.logits_RQ.device)
        at_A, spacing_A = rows_A, torch.zeros_like(rows_A)
        if batch.compared is not None:
            at_A, spacing_A = batch.compared.student_A, batch.compared.spacing_A
        number_R = torch.full_like(batch.answers.token_R, -1).index_put((at_A,), rows_A)
        if self.shared is not None:
            self.shared = self.shared.to(rows_A.device)
        return AlignedRows(
            teacher_rows(stored, self.logit_codec.vocab_size, temperature), spacing_A, number_R, self.shared
        )

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
