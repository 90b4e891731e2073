"""The losses of a student on samples that it is not trained on."""

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from stages.student.data.batch import Batch
from stages.student.data.loader import StepLoader, StoppedWaiting, next_group
from stages.student.training.objective import BatchTotals, DistillationObjective, GlobalStep, refuse_not_finite
from stages.student.training.parallel import evaluation_mode

_SUMS = BatchTotals(answer_rows=1, samples_with_image=1, answers=1, kd_rows=1)
"""What the objective divides by, so that it gives sums: the counts are not known before all is read."""


@dataclass(frozen=True)
class Validation:
    """The held-out samples of a stage, and what measures the loss on them.

    Attributes:
        objective: each process's own, not one that exchanges gradients.
        loader: of the held-out samples.
        accelerator: joins the processes, which all take part.
        should_stop: asked before each step of the loader.
    """

    objective: DistillationObjective
    loader: StepLoader
    accelerator: Accelerator
    should_stop: Callable[[], bool]

    @property
    def num_samples(self) -> int:
        """Held-out samples, each counted once."""
        return self.loader.mixture.num_samples

    def losses(self, step: int, show: Callable[[int], None]) -> dict[str, float]:
        """Each term over all held-out samples, as if they were one batch of training, without dropout.

        Training is not disturbed: the student gets no gradients, and each training step seeds itself.

        Args:
            step: finished training steps, for errors.
            show: called with the samples that are done.

        Returns:
            `loss`, `lm` and the terms of the stage: `lm` and `kd` are means over answer rows (of `kd` those that are
            compared), `attention` is the mean over samples with an image, `answer_attention` that over answers.

        Raises:
            StoppedWaiting: In all processes, if one of them was asked to stop.
            UserError: If a loss is not finite, or as `StepLoader.steps`.
        """
        sums: dict[str, float] = {}
        totals, num_done = BatchTotals(0, 0), 0
        steps = self.loader.steps(range(1), 0, self.should_stop)
        with evaluation_mode(self.objective), closing(steps) as groups:
            for _ in range(self.loader.mixture.num_steps):
                group = next_group(groups, self.should_stop)
                found = GlobalStep.of(group, self.accelerator, stop=self.should_stop())
                if found.is_stopped:
                    raise StoppedWaiting
                totals += found.totals
                num_done += found.num_samples
                for name, value in self._sums(group, step).items():
                    sums[name] = sums.get(name, 0.0) + value
                show(num_done)
        terms = {name: value / totals.of_term(name) for name, value in sums.items()}
        return {"loss": sum(self.objective.weights[name] * value for name, value in terms.items()), **terms}

    def _sums(self, group: list[Batch], step: int) -> dict[str, float]:
        """Each term, summed over a step of the loader in all processes."""
        sums: dict[str, Tensor] = {}
        for batch in group:
            batch = batch.to(self.accelerator.device, self.objective.student.dtype)
            with self.accelerator.autocast():
                _, terms = self.objective(batch, _SUMS)
            for name, value in terms.items():
                sums[name] = sums.get(name, torch.zeros_like(value)) + value
        summed = self.accelerator.reduce(torch.stack(list(sums.values())), reduction="sum").tolist()
        found = dict(zip(sums, summed, strict=True))
        refuse_not_finite({f"validation {name}": value for name, value in found.items()}, step, group)
        return found
