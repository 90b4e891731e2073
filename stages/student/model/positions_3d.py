"""Positions of three axes (time, height, width) for a decoder that has one rotary embedding.

Self-contained (torch only): an export carries it beside its modelling file. A rotary embedding turns pairs of channels
by angles, one frequency a pair. Here each frequency takes the position of one axis. A text token has three equal
positions, and so exactly the decoder's own embedding.

Shape letters: B sequences, T tokens, F rotary frequencies, d = 2 F channels.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


def axes_of_frequencies(section: Sequence[int], *, interleaved: bool) -> list[int]:
    """The axis of each of the F frequencies: 0 time, 1 height, 2 width.

    `section` says how many each axis has. They lie one axis after the other, or `interleaved`: in turns while height
    and width have any left, and time takes all others.
    """
    if not interleaved:
        return [axis for axis, count in enumerate(section) for _ in range(count)]
    axes = [0] * sum(section)
    for axis in (1, 2):
        for frequency in range(axis, min(3 * section[axis], len(axes)), 3):
            axes[frequency] = axis
    return axes


class RotaryEmbedding3D:
    """What the decoder's layers take in place of its own rotary embedding; travels to them as keyword `rotary_3d`.

    No dataclass: FSDP2 looks for tensors in dataclasses that a layer is called with, and hands it a copy.

    Attributes:
        cos_sin: `[B, T, d]` each.
        taken: the layers that have taken it.
    """

    def __init__(self, cos_sin: tuple[Tensor, Tensor]) -> None:
        self.cos_sin = cos_sin
        self.taken: set[int] = set()

    @classmethod
    def of(cls, rotary: nn.Module, like: Tensor, positions_3BT: Tensor, axes_F: Sequence[int]) -> "RotaryEmbedding3D":
        """By the decoder's own embedding, called once with all axes; its channels are two halves of F frequencies."""
        axes_d = torch.tensor([*axes_F, *axes_F], device=like.device)

        def of_each_axis(part: Tensor) -> Tensor:
            time, height, width = part.reshape(3, -1, *part.shape[1:])
            return torch.where(axes_d == 0, time, torch.where(axes_d == 1, height, width))

        cos, sin = rotary(like, positions_3BT.flatten(0, 1))
        return cls((of_each_axis(cos), of_each_axis(sin)))


def take_rotary_3d(
    layer: int, _: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Forward pre-hook of a decoder layer."""
    given = dict(kwargs)
    found: RotaryEmbedding3D | None = given.pop("rotary_3d", None)
    if found is not None and (own := given.get("position_embeddings")) is not None:
        found.taken.add(layer)
        given["position_embeddings"] = tuple(part.to(own[0]) for part in found.cos_sin)
    return args, given


def continued_positions(deltas_B1: Tensor, num_seen: int, num_new: int, mask_BT: Tensor | None) -> Tensor:
    """`[3, B, T]` positions of `num_new` text tokens behind the `num_seen` tokens of a cache.

    `deltas_B1`: see `Positions3D.get_rope_index`. `mask_BT` is of all tokens; None without padding.
    """
    if mask_BT is None:
        number = torch.arange(num_seen, num_seen + num_new, device=deltas_B1.device)[None]
    else:
        number = mask_BT.to(deltas_B1.device).long().cumsum(-1)[:, -num_new:] - 1
        if len(number) != len(deltas_B1):
            raise ValueError(f"{len(number)} sequences go on from a cache of {len(deltas_B1)}; give position_ids")
    return (number + deltas_B1).expand(3, -1, -1)


class Positions3D:
    """The part of a student's model that gives tokens the teacher's positions, if its config has an `mrope_section`.

    Only the decoder's layers see them. Masks and caches count tokens, as those of any decoder.

    How far the next token is from the number of tokens is noted at the cache (`rope_deltas`), which it belongs to.
    """

    config: Any
    eyes: Any
    language_model: Any

    def turn_by_positions_3d(self) -> None:
        """Prepares the decoder's layers; called once, when it is built."""
        for layer, module in enumerate(self.language_model.layers if self.config.mrope_section else ()):
            module.register_forward_pre_hook(partial(take_rotary_3d, layer), with_kwargs=True)

    def get_rope_index(
        self, input_ids: Tensor, image_grid_thw: Tensor | None, attention_mask: Tensor | None = None, **_: Any
    ) -> tuple[Tensor, Tensor]:
        """The teacher's positions `[3, B, T]`, and `[B, 1]` the largest of them plus 1 less the number of tokens."""
        # On the CPU, because the library reads numbers one by one, and each would wait for a GPU.
        ids = input_ids.cpu()
        positions, deltas = self.eyes.get_rope_index(
            input_ids=ids,
            mm_token_type_ids=(ids == self.config.image_token_id).int(),
            image_grid_thw=None if image_grid_thw is None else image_grid_thw.cpu(),
            attention_mask=None if attention_mask is None else attention_mask.cpu(),
        )
        return positions.to(input_ids.device), deltas.to(input_ids.device)

    def place_tokens(self, inputs: dict[str, Any], mask_BT: Tensor | None) -> Tensor | None:
        """Puts `position_ids` `[3, B, T]` into `inputs` of the model, unless they are there or would be ordinary ones.

        Returns what it notes at the cache; None after text alone.

        Raises:
            ValueError: If images are behind other tokens in a cache.
        """
        if self.config.mrope_section is None or inputs.get("position_ids") is not None:
            return None
        ids, grid, cache = (inputs.get(name) for name in ("input_ids", "image_grid_thw", "past_key_values"))
        num_seen = 0 if cache is None else int(cache.get_seq_length())
        deltas: Tensor | None = getattr(cache, "rope_deltas", None) if num_seen else None
        if grid is not None and ids is not None:
            if num_seen:
                raise ValueError("positions of images behind a cache's tokens are not known; give position_ids")
            inputs["position_ids"], deltas = self.get_rope_index(ids, grid, mask_BT)
        elif deltas is not None:
            num_new = (inputs["inputs_embeds"] if ids is None else ids).shape[1]
            inputs["position_ids"] = continued_positions(deltas, num_seen, num_new, mask_BT)
        if cache is not None:
            cache.rope_deltas = deltas
        return deltas

    def decoder_outputs(self, inputs_embeds: Tensor, placing: Mapping[str, Any], kwargs: Mapping[str, Any]) -> Any:
        """Runs the decoder with `kwargs`, whose `position_ids` may be `[3, B, T]`.

        `placing` has the model's `input_ids` and `image_grid_thw`, as far as they are given.

        Raises:
            ValueError: As `place_tokens`; if a layer does not take its rotary embedding from outside.
        """
        placed = {**placing, **kwargs, "inputs_embeds": inputs_embeds}
        deltas = self.place_tokens(placed, kwargs.get("attention_mask"))
        positions = placed.get("position_ids")
        if self.config.mrope_section is None or positions is None or positions.dim() < 3:
            return self.language_model(inputs_embeds=inputs_embeds, **kwargs)
        axes_F = axes_of_frequencies(self.config.mrope_section, interleaved=self.config.mrope_interleaved)
        rotary = RotaryEmbedding3D.of(self.language_model.rotary_emb, inputs_embeds, positions, axes_F)
        outputs = self.language_model(
            inputs_embeds=inputs_embeds, **{**kwargs, "position_ids": None, "rotary_3d": rotary}
        )
        if len(rotary.taken) < len(self.language_model.layers):
            raise ValueError("layers of this decoder do not take the rotary embedding of their tokens' 3D positions")
        if deltas is not None and outputs.past_key_values is not None:
            outputs.past_key_values.rope_deltas = deltas
        return outputs
