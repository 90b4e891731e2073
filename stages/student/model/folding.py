"""Folds a student's post-connector into the linear layer before it: one layer less, the same function.

Two linear layers in a row are one: with `h = W x + b` and `y = P h + p`, `y = (P W) x + (P b + p)`.

Shape letters: I inputs of the adapter's last layer, T the teacher's width, S the student's.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LlavaConfig, LlavaForConditionalGeneration, PreTrainedConfig, PreTrainedModel

from stages.families import family_of
from stages.student.model.modeling_any_teacher import AnyTeacherStudentForConditionalGeneration
from stages.student.model.modeling_compodistill import CompoDistillStudentForConditionalGeneration

_PROJECTOR = "model.multi_modal_projector."
_POST = "model.post_connector."


@dataclass(frozen=True)
class ModelParts:
    """A model taken apart: its class, its config, and its tensors by name."""

    model_class: type[PreTrainedModel]
    config: PreTrainedConfig
    tensors: dict[str, Tensor]

    def build(self) -> PreTrainedModel:
        """The model, with the tensors in their dtype."""
        dtype = next(iter(self.tensors.values())).dtype
        model: PreTrainedModel = self.model_class.from_pretrained(
            None, config=self.config, state_dict=dict(self.tensors), dtype=dtype
        )
        return model


def take_apart(model: PreTrainedModel) -> ModelParts:
    """The parts of a model as it is; the config is a copy, the tensors are the model's own."""
    return ModelParts(type(model), copy.deepcopy(model.config), dict(model.state_dict()))


def has_post_connector(parts: ModelParts) -> bool:
    """Whether there is one left to fold."""
    return f"{_POST}weight" in parts.tensors


def fold_post_connector(parts: ModelParts) -> ModelParts:
    """The same function with the post-connector folded into the adapter's last linear layer, where that is exact.

    The student of a LLaVA 1.5 teacher whose width is at most the decoder's becomes a stock Llava: the adapter is
    filled up with units that put out nothing. Llava's own adapter has the decoder's width throughout, so under a wider
    teacher, which is the rule, the model keeps its class. The student of a teacher of another family keeps its class,
    and its post-connector too if its family does not say which layer ends the adapter.

    Args:
        parts: of a student with a post-connector.

    Returns:
        New parts; those given are unchanged.
    """
    fold = _fold_any_teacher if parts.model_class is AnyTeacherStudentForConditionalGeneration else _fold_llava
    return fold(parts)


def folded_linear(
    weight_TI: Tensor, bias_T: Tensor | None, post_ST: Tensor, post_bias_S: Tensor
) -> tuple[Tensor, Tensor]:
    """`[S, I]` weight and `[S]` bias of two linear layers as one, worked out in float64, in the dtype of `post_ST`."""
    weight_SI = post_ST.double() @ weight_TI.double()
    bias_S = post_bias_S if bias_T is None else carried_vector(bias_T, post_ST, post_bias_S)
    return weight_SI.to(post_ST.dtype), bias_S


def carried_vector(vector_T: Tensor, post_ST: Tensor, post_bias_S: Tensor) -> Tensor:
    """`[S]`: what the post-connector makes of one vector, worked out in float64, in the dtype of `post_ST`."""
    return (post_ST.double() @ vector_T.double() + post_bias_S.double()).to(post_ST.dtype)


def _fold_llava(parts: ModelParts) -> ModelParts:
    assert parts.model_class is CompoDistillStudentForConditionalGeneration
    tensors, config = dict(parts.tensors), copy.deepcopy(parts.config)
    post_ST, post_bias_S = tensors.pop(f"{_POST}weight"), tensors.pop(f"{_POST}bias")
    names = [f"{_PROJECTOR}{layer}.{kind}" for layer in ("linear_1", "linear_2") for kind in ("weight", "bias")]
    weight_1, bias_1, weight_2, bias_2 = (tensors.get(name) for name in names)
    assert weight_1 is not None
    assert weight_2 is not None
    if bias_1 is None:
        bias_1 = weight_1.new_zeros(weight_1.shape[0])
    weight_2, bias_2 = folded_linear(weight_2, bias_2, post_ST, post_bias_S)
    # The post-connector has a bias whether or not the adapter had any.
    config.multimodal_projector_bias, config.has_post_connector = True, False
    spare = post_ST.shape[0] - post_ST.shape[1]
    model_class: Any = parts.model_class
    if spare >= 0:
        weight_1, bias_1, weight_2 = _grown(weight_1, 0, spare), _grown(bias_1, 0, spare), _grown(weight_2, 1, spare)
        model_class, config = LlavaForConditionalGeneration, _stock_config(config)
    tensors |= dict(zip(names, (weight_1, bias_1, weight_2, bias_2), strict=True))
    return ModelParts(model_class, config, tensors)


def _stock_config(config: PreTrainedConfig) -> LlavaConfig:
    own = ("model_type", "architectures", "adapter_hidden_size", "has_post_connector")
    return LlavaConfig.from_dict({name: value for name, value in config.to_dict().items() if name not in own})


def _fold_any_teacher(parts: ModelParts) -> ModelParts:
    family = family_of(parts.config.teacher_config.model_type)
    if family.last_linear is None:
        return parts
    tensors, config = dict(parts.tensors), copy.deepcopy(parts.config)
    post_ST, post_bias_S = tensors.pop(f"{_POST}weight"), tensors.pop(f"{_POST}bias")
    weight, bias = (f"model.eyes.{family.last_linear}.{kind}" for kind in ("weight", "bias"))
    tensors[weight], tensors[bias] = folded_linear(tensors[weight], tensors.get(bias), post_ST, post_bias_S)
    for name in family.added_vectors:
        tensors[f"model.eyes.{name}"] = carried_vector(tensors[f"model.eyes.{name}"], post_ST, post_bias_S)
    config.folded_linear, config.folded_vectors = family.last_linear, list(family.added_vectors)
    return ModelParts(parts.model_class, config, tensors)


def _grown(tensor: Tensor, axis: int, count: int) -> Tensor:
    shape = list(tensor.shape)
    shape[axis] = count
    return torch.cat([tensor, tensor.new_zeros(shape)], dim=axis)
