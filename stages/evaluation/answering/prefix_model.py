"""Runs a multimodal model over sequences that share pictures: what they have in common at their front once.

Under causal attention the tokens up to the end of the pictures are the same for all questions about them. Their keys
and values are computed once, and every sequence goes on from them.

Shape letters: B sequences, T tokens (of a whole sequence, or those read last), d hidden size, R rows, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from stages.conversations.encoder import EncodedConversation
from stages.student.model.inputs import family_of_model, model_inputs
from storage.errors import UserError

ROWS_AT_ONCE: Final = 128
"""Rows whose `[R, V]` logits exist at one time: 78 MB of float32 for a vocabulary of 152,000."""
_TOLERANCE: Final = {torch.float32: 2e-3, torch.bfloat16: 0.05, torch.float16: 0.02}
"""Of the largest logit: by how much two ways to compute the same logits may differ."""


@dataclass(frozen=True)
class SharedFront:
    """Sequences with the same first `num_shared` tokens, in which all their image tokens are."""

    sequences: Sequence[EncodedConversation]
    num_shared: int


@dataclass
class RunningSequences:
    """Sequences that a model has read, and goes on with.

    Attributes:
        hidden_BTd: last hidden states behind the shared tokens, right-padded.
        cache: keys and values of all tokens.
        mask_BT: which of the tokens in the cache are no padding.
        positions_B: where the next token of each sequence stands, as the model counts.
        is_3d: whether the model counts positions in three axes.
    """

    hidden_BTd: Tensor
    cache: Any
    mask_BT: Tensor
    positions_B: Tensor
    is_3d: bool


class PrefixModel:
    """A model that reads fronts once; call it in inference mode.

    Raises:
        UserError: If the model has no base model apart from its head, so that rows cannot be chosen.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self._head = model.get_output_embeddings()
        if model.base_model is model or self._head is None:
            raise UserError(f"{type(model).__name__} has no language modelling head on a base model")
        self._family, self._decoder = family_of_model(model), model.config.get_text_config()

    def head(self, hidden: Tensor) -> Tensor:
        """Logits of last hidden states."""
        return self._family.logits(self._head(hidden), self._decoder)

    def check_head(self, sequence: EncodedConversation) -> None:
        """Compares the head's logits at the last row with the model's own.

        Raises:
            UserError: If they differ, as in models that cap or scale their logits after the head.
        """
        inputs = model_inputs(self.model, [sequence])
        expected_V = self.model(**inputs, logits_to_keep=1, use_cache=False).logits[0, -1]
        found_V = self.head(self.whole([sequence])[0][-1])
        if (difference := _relative_difference(found_V, expected_V)) > _TOLERANCE[self.model.dtype]:
            raise UserError(
                f"{type(self.model).__name__} changes its logits after the head (by up to {difference:.3g} of the "
                "largest), so they cannot be read row by row"
            )

    def reads_fronts_once(self, fronts: Sequence[SharedFront]) -> bool:
        """Whether the last hidden state of every sequence is the same as without shared fronts.

        Some models keep no keys and values, or count positions so that a sequence cannot be gone on with.
        """
        sequences = [sequence for front in fronts for sequence in front.sequences]
        expected = torch.stack([self.head(hidden_Td[-1]) for hidden_Td in self.whole(sequences)])
        try:
            running = self.read(fronts)
        except (AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError):
            return False
        lengths = [len(sequence.token_ids) - front.num_shared for front in fronts for sequence in front.sequences]
        found = torch.stack(
            [self.head(hidden[end - 1]) for hidden, end in zip(running.hidden_BTd, lengths, strict=True)]
        )
        return _relative_difference(found, expected) <= _TOLERANCE[self.model.dtype]

    def whole(self, sequences: Sequence[EncodedConversation]) -> list[Tensor]:
        """`[T, d]` last hidden states of each sequence on its own, without anything shared."""
        hidden_BTd = self.model.base_model(**model_inputs(self.model, sequences), use_cache=False).last_hidden_state
        return [hidden_Td[: len(one.token_ids)] for hidden_Td, one in zip(hidden_BTd, sequences, strict=True)]

    def read(self, fronts: Sequence[SharedFront]) -> RunningSequences:
        """Reads fronts once each, then what is behind them; sequences in the order of the fronts."""
        shared = [_first_tokens(front.sequences[0], front.num_shared) for front in fronts]
        inputs = model_inputs(self.model, shared)
        outputs = self.model.base_model(**inputs, use_cache=True)
        device = inputs["input_ids"].device
        front_of_B = torch.tensor(
            [number for number, front in enumerate(fronts) for _ in front.sequences], device=device
        )
        outputs.past_key_values.batch_select_indices(front_of_B)
        behind = [sequence.token_ids[front.num_shared :] for front in fronts for sequence in front.sequences]
        # Of a student, beside what they belong to; a model of the library keeps them itself.
        deltas = getattr(outputs.past_key_values, "rope_deltas", None)
        if deltas is None:
            deltas = getattr(self.model.base_model, "rope_deltas", None)
        front_positions = inputs["attention_mask"].sum(1)
        if deltas is not None:
            front_positions = front_positions + deltas.reshape(-1).to(device)
        running = RunningSequences(
            hidden_BTd=torch.empty(0),
            cache=outputs.past_key_values,
            mask_BT=inputs["attention_mask"][front_of_B],
            positions_B=front_positions[front_of_B],
            is_3d=deltas is not None,
        )
        self.go_on(
            running,
            pad_sequence(behind, batch_first=True).to(device),
            pad_sequence([torch.ones_like(ids) for ids in behind], batch_first=True).to(device),
        )
        return running

    def go_on(self, running: RunningSequences, token_ids_BT: Tensor, new_mask_BT: Tensor) -> None:
        """Reads further tokens of all sequences, right-padded where `new_mask_BT` is 0."""
        positions_BT = running.positions_B[:, None] + torch.arange(token_ids_BT.shape[1], device=token_ids_BT.device)
        running.mask_BT = torch.cat([running.mask_BT, new_mask_BT.to(running.mask_BT.dtype)], dim=1)
        inputs = {"input_ids": token_ids_BT, "attention_mask": running.mask_BT}
        modality = family_of_model(self.model).modality_input
        if modality is not None:
            inputs[modality] = torch.zeros_like(token_ids_BT)
        outputs = self.model.base_model(
            **inputs,
            position_ids=positions_BT.expand(3, -1, -1) if running.is_3d else positions_BT,
            past_key_values=running.cache,
            use_cache=True,
        )
        running.hidden_BTd, running.cache = outputs.last_hidden_state, outputs.past_key_values
        running.positions_B = running.positions_B + new_mask_BT.sum(1)

    def log_probs(self, hidden_Rd: Tensor, token_ids_R: Tensor) -> Tensor:
        """`[R]` float32 on the CPU: the log-probability of one token at each row."""
        parts = []
        for hidden_rd, ids_r in zip(*(torch.split(t, ROWS_AT_ONCE) for t in (hidden_Rd, token_ids_R)), strict=True):
            logits_rV = self.head(hidden_rd).float()
            chosen_r = logits_rV.gather(1, ids_r.to(logits_rV.device)[:, None])[:, 0]
            parts.append((chosen_r - logits_rV.logsumexp(-1)).cpu())
        return torch.cat(parts)


def _first_tokens(sequence: EncodedConversation, count: int) -> EncodedConversation:
    return replace(sequence, token_ids=sequence.token_ids[:count], answer_mask=sequence.answer_mask[:count])


def _relative_difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())
