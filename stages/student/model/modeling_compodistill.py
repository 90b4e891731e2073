"""The student as a transformers model: the teacher's vision tower and projector, a post-connector, its own decoder.

Self-contained (torch and transformers only), so that an exported checkpoint can carry it.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, LlavaConfig, LlavaForConditionalGeneration, LlavaModel
from transformers.activations import ACT2FN
from transformers.models.llava.modeling_llava import LlavaPreTrainedModel


class CompoDistillStudentConfig(LlavaConfig):
    """A Llava config whose projector has the teacher's width instead of the decoder's.

    Attributes:
        adapter_hidden_size: The teacher's hidden size: output of the projector, input of the post-connector. The name
            is that of saved configs.
        has_post_connector: False after it was folded into the projector's last linear layer, as in exports.
    """

    model_type = "compodistill_student"
    adapter_hidden_size: int = 2560
    has_post_connector: bool = True


class TeacherProjector(nn.Module):
    """`Linear -> GELU -> Linear` with the parameter names of Llava's projector, at the teacher's width.

    With the post-connector folded in, the last linear layer has the decoder's width.
    """

    def __init__(self, config: CompoDistillStudentConfig) -> None:
        super().__init__()
        layers = config.vision_feature_layer
        num_features = 1 if isinstance(layers, int) else len(layers)
        width, bias = config.adapter_hidden_size, config.multimodal_projector_bias
        self.linear_1 = nn.Linear(config.vision_config.hidden_size * num_features, width, bias=bias)
        self.act = ACT2FN[config.projector_hidden_act]
        out = width if config.has_post_connector else config.text_config.hidden_size
        self.linear_2 = nn.Linear(width, out, bias=bias)

    def forward(self, features: Tensor) -> Tensor:
        """`[..., vision width]` -> `[..., teacher width]`, or the decoder's."""
        hidden: Tensor = self.linear_2(self.act(self.linear_1(features)))
        return hidden


class CompoDistillStudentModel(LlavaModel):
    """Vision tower, projector, post-connector and decoder, without a language modelling head."""

    config: CompoDistillStudentConfig

    def __init__(self, config: CompoDistillStudentConfig) -> None:
        # Not LlavaModel's own constructor: it would build a projector of the decoder's width.
        LlavaPreTrainedModel.__init__(self, config)
        self.vision_tower = AutoModel.from_config(config.vision_config, trust_remote_code=False)
        self.multi_modal_projector = TeacherProjector(config)
        self.post_connector: nn.Module = nn.Identity()
        if config.has_post_connector:
            self.post_connector = nn.Linear(config.adapter_hidden_size, config.text_config.hidden_size)
        self.language_model = AutoModel.from_config(config.text_config, trust_remote_code=False)
        self.post_init()

    def get_image_features(self, *args: Any, **kwargs: Any) -> Any:
        """The teacher's image features after the post-connector, one `[N, hidden]` tensor an image."""
        outputs = super().get_image_features(*args, **kwargs)
        outputs.pooler_output = [self.post_connector(features) for features in outputs.pooler_output]
        return outputs

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As Llava. The image token id is the teacher's and may lie past the student's vocabulary."""
        # Only a tower that takes images of any size is told theirs (Pixtral).
        given = kwargs.pop("image_sizes", None)
        sizes = {} if given is None else {"image_sizes": given}
        if input_ids is not None and inputs_embeds is None:
            is_image = input_ids == self.config.image_token_id
            inputs_embeds = self.get_input_embeddings()(input_ids.masked_fill(is_image, 0))
            if pixel_values is not None:
                features = torch.cat(self.get_image_features(pixel_values=pixel_values, **sizes).pooler_output)
                if features.shape[0] != int(is_image.sum()):
                    raise ValueError(f"{features.shape[0]} image features for {int(is_image.sum())} image tokens")
                inputs_embeds = inputs_embeds.masked_scatter(is_image[..., None], features.to(inputs_embeds.dtype))
        return super().forward(inputs_embeds=inputs_embeds, **kwargs)


class CompoDistillStudentForConditionalGeneration(LlavaForConditionalGeneration):
    """The student with its language modelling head; generates like any Llava."""

    config: CompoDistillStudentConfig
    config_class = CompoDistillStudentConfig

    def __init__(self, config: CompoDistillStudentConfig) -> None:
        LlavaPreTrainedModel.__init__(self, config)
        self.model = CompoDistillStudentModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()
