"""Runs a multimodal model over a batch and reads its log-probabilities at chosen rows only.

A LLaVA and its students see the image of several sequences once.

Shape letters: B sequences, T tokens, d hidden size, R rows, K tokens asked for at a row, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby, islice
from typing import Any, Final

import torch
from torch import Tensor

from stages.conversations.encoder import EncodedConversation
from stages.families.registry import LLAVA
from stages.student.model.inputs import family_of_model, model_inputs
from storage.errors import UserError

ROWS_AT_ONCE: Final = 128
"""Rows whose `[R, V]` logits exist at one time: 78 MB of float32 for a vocabulary of 152,000."""

Group = Sequence[EncodedConversation]
"""Sequences about one and the same image."""


class RowReader:
    """Hidden states and log-probabilities of one model at chosen rows; call it in inference mode.

    Raises:
        UserError: If the model has no base model apart from its head, so that rows cannot be chosen.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.head = model.get_output_embeddings()
        if model.base_model is model or self.head is None:
            raise UserError(f"{type(model).__name__} has no language modelling head on a base model")

    def check_head(self, item: EncodedConversation) -> None:
        """Compares the head's logits at the last row with the model's own.

        Raises:
            UserError: If they differ, as in models that cap or scale their logits after the head.
        """
        last = torch.tensor([len(item.token_ids) - 1])
        expected = self.model(**self._inputs([[item]]), logits_to_keep=1, use_cache=False).logits[0, -1]
        found = self.head(self.hidden([[item]], [last]))[0]
        difference = float((found - expected).abs().max())
        if difference > 0.02 * float(expected.abs().max()):
            raise UserError(
                f"{type(self.model).__name__} changes its logits after the head (up to {difference:.3g}), "
                "so they cannot be read row by row"
            )

    def hidden(self, groups: Sequence[Group], rows: Sequence[Tensor]) -> Tensor:
        """`[R, d]` last hidden states of a batch at chosen int64 `rows` of each sequence, group after group."""
        rows_left = iter(rows)
        parts: list[Tensor] = []
        for _, alike in groupby(groups, key=_pixel_shapes):
            outputs = self.model.base_model(**self._inputs(list(alike)), use_cache=False)
            parts += [hidden_Td[next(rows_left).to(hidden_Td.device)] for hidden_Td in outputs.last_hidden_state]
        return torch.cat(parts)

    def log_probs(self, hidden_Rd: Tensor, token_ids_RK: Tensor) -> Tensor:
        """`[R, K]` float32 on the CPU: the log-probabilities of K tokens at each row."""
        parts = []
        blocks = (torch.split(tensor, ROWS_AT_ONCE) for tensor in (hidden_Rd, token_ids_RK))
        for hidden_rd, ids in zip(*blocks, strict=True):
            logits_RV = self.head(hidden_rd).float()
            chosen_RK = logits_RV.gather(1, ids.to(logits_RV.device))
            parts.append((chosen_RK - logits_RV.logsumexp(-1, keepdim=True)).cpu())
        return torch.cat(parts)

    def _inputs(self, groups: Sequence[Group]) -> dict[str, Tensor]:
        """What both the model and its base model take; embeddings where the sequences of a group share an image."""
        items = [item for group in groups for item in group]
        if family_of_model(self.model) is not LLAVA:
            return model_inputs(self.model, items)
        inputs = model_inputs(self.model, [replace(item, pixel_inputs={}) for item in items])
        is_image_BT = inputs["input_ids"] == self.model.config.image_token_id
        # The image token's id may lie past the vocabulary of the embedding.
        embeddings: Tensor = self.model.get_input_embeddings()(inputs["input_ids"].masked_fill(is_image_BT, 0))
        pixels = model_inputs(self.model, [group[0] for group in groups]).get("pixel_values")
        if pixels is not None:
            features_of_image = iter(self.model.get_image_features(pixel_values=pixels).pooler_output)
            features: list[Tensor] = []
            for group in groups:
                num_images = len(group[0].pixel_inputs.get("pixel_values", ()))
                features += list(islice(features_of_image, num_images)) * len(group)
            embeddings = embeddings.masked_scatter(is_image_BT[..., None], torch.cat(features).to(embeddings.dtype))
        return {"attention_mask": inputs["attention_mask"], "inputs_embeds": embeddings}


def _pixel_shapes(group: Group) -> list[tuple[str, tuple[int, ...]]]:
    """Equal for groups whose images join in one batch without padding; families that cut images in tiles differ."""
    return [(name, tuple(values.shape[1:])) for name, values in group[0].pixel_inputs.items()]
