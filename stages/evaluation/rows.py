"""Runs a multimodal model over a right-padded batch and reads its logits at chosen rows only.

Works on any model of `AutoModelForImageTextToText`. For LLaVA and its kin the image of several sequences goes
through the vision tower once.

Shape letters: B sequences, T tokens, H hidden size, R rows, K tokens asked for at a row, V vocabulary.
"""

import inspect
from collections.abc import Sequence
from itertools import groupby, islice
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import LlavaForConditionalGeneration

from stages.conversations.encoder import EncodedConversation
from storage.errors import UserError

ROWS_AT_ONCE: Final = 128
"""Rows whose `[R, V]` logits exist at one time: 78 MB of float32 for a vocabulary of 152,000."""

Group = Sequence[EncodedConversation]
"""Sequences about one and the same image."""


class RowReader:
    """Hidden states and log-probabilities of one model at chosen rows; call it in inference mode.

    Raises:
        UserError: the model has no body apart from its head, so rows cannot be chosen.
    """

    def __init__(self, model: Any, image_token_id: int) -> None:
        self.model = model
        self.image_token_id = image_token_id
        self.head = model.get_output_embeddings()
        if model.base_model is model or self.head is None:
            raise UserError(f"{type(model).__name__} has no language modelling head on a base model")
        self._shares_images = isinstance(model, LlavaForConditionalGeneration)
        parameters = inspect.signature(model.base_model.forward).parameters
        self._modality_inputs = [name for name in ("mm_token_type_ids", "token_type_ids") if name in parameters]
        # Any token but the image token, which models count.
        self._padding_id = 1 if image_token_id == 0 else 0

    def check_head(self, item: EncodedConversation) -> None:
        """Compares the head's logits at the last row with the model's own.

        Raises:
            UserError: they differ, as in models that cap or scale their logits after the head.
        """
        last = torch.tensor([len(item.token_ids) - 1])
        inputs = self._inputs([[item]])
        expected = self.model(**inputs, logits_to_keep=1, use_cache=False).logits[0, -1]
        found = self.head(self.hidden([[item]], [last]))[0]
        difference = float((found - expected).abs().max())
        if difference > 0.02 * float(expected.abs().max()):
            raise UserError(
                f"{type(self.model).__name__} changes its logits after the head (up to {difference:.3g}), "
                "so they cannot be read row by row"
            )

    def hidden(self, groups: Sequence[Group], rows: Sequence[Tensor]) -> Tensor:
        """The last hidden states of the batch at the rows of each of its sequences.

        Args:
            groups: the batch.
            rows: for each sequence, group after group, the positions wanted of it; int64.

        Returns:
            `[R, H]`, in the order of `rows`.
        """
        rows_left = iter(rows)
        parts: list[Tensor] = []
        for _, alike in groupby(groups, key=_pixel_shapes):
            chunk = list(alike)
            outputs = self.model.base_model(**self._inputs(chunk), use_cache=False)
            parts += [hidden_TH[next(rows_left).to(hidden_TH.device)] for hidden_TH in outputs.last_hidden_state]
        return torch.cat(parts)

    def log_probs(self, hidden_RH: Tensor, token_ids_RK: Tensor) -> Tensor:
        """`[R, K]` float32 on the CPU: the log-probabilities of K tokens at each row."""
        parts = []
        for hidden, ids in zip(
            torch.split(hidden_RH, ROWS_AT_ONCE), torch.split(token_ids_RK, ROWS_AT_ONCE), strict=True
        ):
            logits_RV = self.head(hidden).float()
            chosen_RK = logits_RV.gather(1, ids.to(logits_RV.device))
            parts.append((chosen_RK - logits_RV.logsumexp(-1, keepdim=True)).cpu())
        return torch.cat(parts)

    def _inputs(self, groups: Sequence[Group]) -> dict[str, Tensor]:
        """What both the model and its body take, on the model's device and in its dtype."""
        items = [item for group in groups for item in group]
        token_ids_BT = pad_sequence(
            [item.token_ids for item in items], batch_first=True, padding_value=self._padding_id
        ).to(self.model.device)
        mask_BT = pad_sequence([torch.ones_like(item.token_ids) for item in items], batch_first=True)
        inputs = {"attention_mask": mask_BT.to(self.model.device)}
        is_image_BT = token_ids_BT == self.image_token_id
        if self._shares_images:
            return {**inputs, "inputs_embeds": self._embed(token_ids_BT, is_image_BT, groups)}
        inputs |= {name: is_image_BT.int() for name in self._modality_inputs}
        return {**inputs, "input_ids": token_ids_BT, **self._pixels(items)}

    def _embed(self, token_ids_BT: Tensor, is_image_BT: Tensor, groups: Sequence[Group]) -> Tensor:
        # The image token's id may lie past the vocabulary of the embedding.
        embeddings: Tensor = self.model.get_input_embeddings()(token_ids_BT.masked_fill(is_image_BT, 0))
        pixels = self._pixels([group[0] for group in groups])
        if not pixels:
            return embeddings
        features_of_image = iter(self.model.get_image_features(**pixels).pooler_output)
        features: list[Tensor] = []
        for group in groups:
            num_images = len(group[0].pixel_inputs["pixel_values"])
            features += list(islice(features_of_image, num_images)) * len(group)
        return embeddings.masked_scatter(is_image_BT[..., None], torch.cat(features).to(embeddings.dtype))

    def _pixels(self, items: Group) -> dict[str, Tensor]:
        inputs: dict[str, Tensor] = {}
        for name in items[0].pixel_inputs:
            values = torch.cat([item.pixel_inputs[name] for item in items])
            inputs[name] = values.to(self.model.device, self.model.dtype if values.is_floating_point() else None)
        return inputs


def _pixel_shapes(group: Group) -> list[tuple[str, tuple[int, ...]]]:
    """What must agree to join images in one batch; it differs where a family cuts images in tiles."""
    return [(name, tuple(values.shape[1:])) for name, values in group[0].pixel_inputs.items()]
