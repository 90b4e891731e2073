"""Folds a student's post-connector into the linear layer before it: one layer less, the same function.

Two linear layers in a row are one: with `h = W x + b` and `y = P h + p`, `y = (P W) x + (P b + p)`.
"""

import copy
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn.functional import pad
from transformers import LlavaConfig, LlavaForConditionalGeneration, PreTrainedConfig, PreTrainedModel

from stages.families.registry import family_of
from stages.student.model.modeling_any_teacher import AnyTeacherStudentForConditionalGeneration
from stages.student.model.modeling_compodistill import CompoDistillStudentForConditionalGeneration

_PROJECTOR = "model.multi_modal_projector."
_POST = "model.post_connector."


@dataclass(frozen=True)
class ModelParts:
    """Class, config and named tensors of a model."""

    model_class: type[PreTrainedModel]
    config: PreTrainedConfig
    tensors: dict[str, Tensor]

    def build(self) -> PreTrainedModel:
        """The model, with the tensors in their dtype."""
        dtype = next(iter(self.tensors.values())).dtype
        model: PreTrainedModel = self.model_class.from_pretrained(
            None, config=self.config, state_dict=dict(self.tensors), dtype=dtype, trust_remote_code=False
        )
        return model


def take_apart(model: PreTrainedModel) -> ModelParts:
    """The parts of a model; the config is a copy, the tensors are the model's own."""
    return ModelParts(type(model), copy.deepcopy(model.config), dict(model.state_dict()))


def has_post_connector(parts: ModelParts) -> bool:
    """Whether the model has a post-connector that is not folded yet."""
    return f"{_POST}weight" in parts.tensors


def fold_post_connector(parts: ModelParts) -> ModelParts:
    """New parts of the same function, the post-connector folded into the projector's last layer, where that is exact.

    Llava's own projector has the decoder's width throughout. The student of a LLaVA 1.5 teacher that is at most as wide
    as the decoder becomes a stock Llava: units whose output is zero fill the projector up. Under a wider teacher, the
    usual case, the student keeps its class. So does the student of another family's teacher; it also keeps its
    post-connector if the family does not name the layer that ends the projector.
    """
    fold = _fold_any_teacher if parts.model_class is AnyTeacherStudentForConditionalGeneration else _fold_llava
    return fold(parts)


def folded_linear(weight: Tensor, bias: Tensor | None, post: Tensor, post_bias: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias of two linear layers as one, computed in float64, in the dtype of `post`."""
    folded_weight = post.double() @ weight.double()
    folded_bias = post_bias if bias is None else carried_vector(bias, post, post_bias)
    return folded_weight.to(post.dtype), folded_bias


def carried_vector(vector: Tensor, post: Tensor, post_bias: Tensor) -> Tensor:
    """One vector after the post-connector, computed in float64, in the dtype of `post`."""
    return (post.double() @ vector.double() + post_bias.double()).to(post.dtype)


def _fold_llava(parts: ModelParts) -> ModelParts:
    assert parts.model_class is CompoDistillStudentForConditionalGeneration
    tensors, config = dict(parts.tensors), copy.deepcopy(parts.config)
    post, post_bias = tensors.pop(f"{_POST}weight"), tensors.pop(f"{_POST}bias")
    names = [f"{_PROJECTOR}{layer}.{kind}" for layer in ("linear_1", "linear_2") for kind in ("weight", "bias")]
    weight_1, weight_2 = tensors[names[0]], tensors[names[2]]
    bias_1 = tensors.get(names[1], weight_1.new_zeros(len(weight_1)))
    weight_2, bias_2 = folded_linear(weight_2, tensors.get(names[3]), post, post_bias)
    # The post-connector has a bias, whether or not the projector had one.
    config.multimodal_projector_bias, config.has_post_connector = True, False
    spare = post.shape[0] - post.shape[1]
    model_class: Any = parts.model_class
    if spare >= 0:
        weight_1, bias_1, weight_2 = pad(weight_1, (0, 0, 0, spare)), pad(bias_1, (0, spare)), pad(weight_2, (0, spare))
        own = ("model_type", "architectures", "adapter_hidden_size", "has_post_connector")
        stock = {name: value for name, value in config.to_dict().items() if name not in own}
        model_class, config = LlavaForConditionalGeneration, LlavaConfig.from_dict(stock)
    tensors |= dict(zip(names, (weight_1, bias_1, weight_2, bias_2), strict=True))
    return ModelParts(model_class, config, tensors)


def _fold_any_teacher(parts: ModelParts) -> ModelParts:
    family = family_of(parts.config.teacher_config.model_type)
    if family.last_linear is None:
        return parts
    tensors, config = dict(parts.tensors), copy.deepcopy(parts.config)
    post, post_bias = tensors.pop(f"{_POST}weight"), tensors.pop(f"{_POST}bias")
    weight, bias = (f"model.eyes.{family.last_linear}.{kind}" for kind in ("weight", "bias"))
    tensors[weight], tensors[bias] = folded_linear(tensors[weight], tensors.get(bias), post, post_bias)
    for name in family.added_vectors:
        tensors[f"model.eyes.{name}"] = carried_vector(tensors[f"model.eyes.{name}"], post, post_bias)
    config.folded_linear, config.folded_vectors = family.last_linear, list(family.added_vectors)
    return ModelParts(parts.model_class, config, tensors)
