"""One batch through the teacher, and how many samples a batch may have.

Shape letters: B samples of a batch (bytes of a record in `logits_RQ`), T tokens, N image tokens, R answer rows,
V vocabulary.
"""

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from stages.attention import AttentionCapture
from stages.families.batch import batch_inputs, move_inputs
from stages.teacher.batching import LENGTH_STEP, PreparedSample
from stages.teacher.teacher import Teacher
from storage.codecs.answer_logits import AnswerLogitsCodec
from storage.codecs.tail_samples import row_addresses
from storage.errors import UserError

logger = logging.getLogger(__name__)

CPU_BATCH = 8
GPU_FIRST_TRY = 64
LOGIT_ROWS = 512  # rows of vocabulary logits that exist at a time
ROW_STEP = 32  # answer rows of a batch are filled up to a multiple: a product with one row is summed in another order


class BatchSize:
    """Samples of one forward pass: as set, or on a GPU the largest power of two that fits.

    Args:
        wanted: `TeacherConfig.batch_size`; None lets it be found.
        on_gpu: where the teacher runs.
    """

    def __init__(self, wanted: int | None, *, on_gpu: bool) -> None:
        self.value = wanted or (GPU_FIRST_TRY if on_gpu else CPU_BATCH)
        self._may_shrink = wanted is None
        self._settled = wanted is not None or not on_gpu

    def fitted(self, num_samples: int) -> None:
        """A batch went through; the first full one settles the size."""
        if not self._settled and num_samples >= self.value:
            self._settled = True
            logger.info("the teacher runs %d samples at a time, found by trying", self.value)

    def shrink(self, num_samples: int) -> None:
        """A batch of `num_samples` > 1 did not fit into memory: down to the next power of two.

        Raises:
            UserError: the size was set, and so is kept: another would change the bytes on a GPU.
        """
        if not self._may_shrink:
            raise UserError(
                f"a batch of {num_samples} samples does not fit into the GPU's memory; set teacher.batch_size below "
                f"{num_samples}, or leave it out to have it found"
            )
        self.value = min(self.value, 1 << (num_samples - 1).bit_length() - 1)
        self._settled = False


@dataclass(frozen=True)
class Observed:
    """What one forward pass gave of one sample.

    Attributes:
        logits_RQ: records of its answer rows, on the CPU; None when a row is not finite.
        maps: `[N, N]` of each captured layer, on the teacher's device, not yet coded; None when not asked for.
    """

    sample: PreparedSample
    logits_RQ: Tensor | None
    maps: tuple[Tensor, ...] | None


@torch.inference_mode()
def run_teacher(
    teacher: Teacher, batch: Sequence[PreparedSample], wanted_maps: Collection[PreparedSample]
) -> list[Observed]:
    """One forward pass; returns when it is done, on a GPU too.

    Args:
        teacher: the loaded teacher.
        batch: samples of one padded length.
        wanted_maps: those of them whose attention maps are taken.

    Raises:
        torch.OutOfMemoryError: nothing of the batch was kept.
    """
    device = teacher.model.device
    layers = teacher.identity.layers
    no_positions = torch.zeros(0, dtype=torch.long)
    capture = AttentionCapture(
        layers=frozenset(layers),
        positions=[sample.image_positions if sample in wanted_maps else no_positions for sample in batch],
    ).to(device)
    # The base model, not the one with the head: logits are wanted at answer rows only.
    inputs = model_inputs(teacher, batch)
    hidden_BTd = teacher.model.model(**inputs, capture=capture, use_cache=False).last_hidden_state
    answers = [sample.answer_mask.nonzero()[:, 0] for sample in batch]
    hidden_Rd = torch.cat([hidden_BTd[row, (t - 1).to(device)] for row, t in enumerate(answers)])
    # Addresses by key and row, so that the draws do not depend on the batch.
    addresses_R = torch.cat([row_addresses(sample.key, len(t)) for sample, t in zip(batch, answers, strict=True)])
    logits_RQ, finite_R = answer_logits(teacher, hidden_Rd, addresses_R)
    observed, start = [], 0
    for row, sample in enumerate(batch):
        stop = start + len(answers[row])
        n = len(sample.image_positions)
        maps = tuple(capture.maps[layer][row, :n, :n] for layer in layers) if sample in wanted_maps else None
        finite = bool(finite_R[start:stop].all())
        observed.append(Observed(sample, logits_RQ[start:stop] if finite else None, maps))
        start = stop
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return observed


def answer_logits(teacher: Teacher, hidden_Rd: Tensor, addresses_R: Tensor) -> tuple[Tensor, Tensor]:
    """Codes the logits of answer rows, a bounded number of rows of vocabulary logits at a time.

    Returns:
        The records on the CPU, and `[R]` bool: whether all logits of the row were finite (the record of a row that
        is not means nothing).
    """
    head = teacher.model.get_output_embeddings()
    codec = teacher.identity.logit_codec
    num_rows = len(hidden_Rd)
    hidden_Rd = pad(hidden_Rd, (0, 0, 0, -num_rows % ROW_STEP))
    addresses_R = pad(addresses_R, (0, -num_rows % ROW_STEP))
    records, finite = [], []
    for rows_Rd, places_R in zip(torch.split(hidden_Rd, LOGIT_ROWS), torch.split(addresses_R, LOGIT_ROWS), strict=True):
        logits_RV = head(rows_Rd).float()
        finite_R = torch.isfinite(logits_RV).all(-1)
        logits_RV = logits_RV.masked_fill(~finite_R[:, None], 0.0)
        records.append(AnswerLogitsCodec(codec).encode(logits_RV, places_R).cpu())
        finite.append(finite_R.cpu())
    return torch.cat(records)[:num_rows], torch.cat(finite)[:num_rows]


def model_inputs(teacher: Teacher, batch: Sequence[PreparedSample]) -> dict[str, Tensor]:
    """What the model is called with, on its device."""
    inputs = batch_inputs(
        teacher.identity.family,
        teacher.encoder.image_token_id,
        [sample.token_ids for sample in batch],
        [sample.pixel_inputs for sample in batch],
        multiple=LENGTH_STEP,
    )
    # Padding lies behind each sample, where no token of it looks. Without a mask the attention kernel is the plain
    # causal one for every batch: the fastest there is, and the same whether a batch is padded or not.
    del inputs["attention_mask"]
    return move_inputs(inputs, teacher.model.device, teacher.model.dtype)
