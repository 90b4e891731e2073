"""The student of a teacher that is no LLaVA 1.5: the teacher's vision part, a post-connector, its own decoder.

Self-contained (torch and transformers only), so that an exported checkpoint can carry it, with `positions_3d.py`. The
vision part (tower and projector, with tiles and pooling) is the code of transformers for the teacher. Its image
features stand at the image tokens. A teacher with deepstack also adds features of earlier vision layers to them, inside
its decoder, and so does the student. Where the teacher's image tokens have positions of three axes, so have the
student's.
"""

import copy
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, GenerationMixin, PreTrainedConfig
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel

from .positions_3d import Positions3D


class AnyTeacherStudentConfig(PreTrainedConfig):
    """The teacher's config for vision tower and projector, the decoder's for the text.

    Attributes:
        teacher_config: The whole config of the teacher; its text part only gives the width of image features.
        text_config: Of the student's decoder.
        image_token_id: The image token's id, which may lie past the student's vocabulary.
        pixel_inputs: Names of the inputs that go to the vision part.
        deepstack: How many features of earlier vision layers are added to image tokens, one after each of the decoder's
            first layers.
        mrope_section: How many rotary frequencies turn by the token's position in time, height and width; None has
            ordinary positions.
        mrope_interleaved: Whether the axes take turns among the frequencies.
        folded_linear: Name of the projector's last linear layer after the post-connector was folded into it; None
            while there is a post-connector.
        folded_vectors: Names of the vision part's other parameters that then have the decoder's width.
    """

    model_type = "compodistill_any_teacher_student"
    # Without the teacher's: settings of attention in sub-configs are for the decoder.
    sub_configs = {"text_config": AutoConfig}  # noqa: RUF012

    teacher_config: Any = None
    text_config: Any = None
    image_token_id: int = 0
    pixel_inputs: Any = None
    deepstack: int = 0
    mrope_section: Any = None
    mrope_interleaved: bool = False
    folded_linear: str | None = None
    folded_vectors: Any = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        for name in ("teacher_config", "text_config"):
            part = getattr(self, name)
            if isinstance(part, dict):
                if name == "text_config" and self.mrope_section is not None:
                    # The decoder's own class would warn of it; it is put back below.
                    rope = {key: value for key, value in part["rope_parameters"].items() if key != "mrope_section"}
                    part = {**part, "rope_parameters": rope}
                setattr(self, name, AutoConfig.for_model(**part))
        super().__post_init__(**kwargs)
        if self.mrope_section is not None:
            # Where servers look for it.
            self.text_config.rope_parameters["mrope_section"] = self.mrope_section


class AnyTeacherStudentPreTrainedModel(PreTrainedModel):
    """Base of the model with and without a head."""

    config: AnyTeacherStudentConfig
    config_class = AnyTeacherStudentConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _skip_keys_device_placement = "past_key_values"


class DeepstackFeatures:
    """What the first decoder layers add to image tokens; travels to them as the keyword `deepstack`.

    No dataclass: FSDP2 looks for tensors in dataclasses that a layer is called with, and hands it a copy.

    Attributes:
        is_image: `[B, T]` bool.
        levels: `[N, hidden]` for each of the layers, of all image tokens of the batch.
        added: The layers that have done so.
    """

    def __init__(self, is_image: Tensor, levels: list[Tensor]) -> None:
        self.is_image, self.levels = is_image, levels
        self.added: set[int] = set()


def _add_deepstack(layer: int, _: nn.Module, __: Any, kwargs: Mapping[str, Any], output: Any) -> Any:
    """Forward hook of a decoder layer."""
    found: DeepstackFeatures | None = kwargs.get("deepstack")
    if found is None:
        return output
    found.added.add(layer)
    hidden = output[0] if isinstance(output, tuple) else output
    is_image = found.is_image[..., None].to(hidden.device)
    more = torch.zeros_like(hidden).masked_scatter(is_image, found.levels[layer].to(hidden.dtype))
    return (hidden + more, *output[1:]) if isinstance(output, tuple) else hidden + more


def _rows(features: Any) -> Tensor:
    """`[N, width]` of all images, from one tensor `[..., width]` or several."""
    parts = [features] if isinstance(features, Tensor) else features
    return torch.cat([part.flatten(0, -2) for part in parts])


class AnyTeacherStudentModel(Positions3D, AnyTeacherStudentPreTrainedModel):
    """Vision tower, projector, post-connector and decoder, without a language modelling head."""

    def __init__(self, config: AnyTeacherStudentConfig) -> None:
        super().__init__(config)
        # Vision tower and projector; the name stands in saved checkpoints, so that it stays.
        self.eyes = vision_part(config.teacher_config)
        width = config.text_config.hidden_size
        self.post_connector: nn.Module = nn.Identity()
        if config.folded_linear is None:
            self.post_connector = nn.Linear(config.teacher_config.get_text_config().hidden_size, width)
        else:
            last = self.eyes.get_submodule(config.folded_linear)
            self.eyes.set_submodule(config.folded_linear, nn.Linear(last.in_features, width))
            for name in config.folded_vectors or ():
                setattr(self.eyes, name, nn.Parameter(torch.empty(width)))
        self.language_model = AutoModel.from_config(config.text_config, trust_remote_code=False)
        if config.deepstack:
            from_width = config.teacher_config.get_text_config().hidden_size
            self.deepstack_connectors = nn.ModuleList(nn.Linear(from_width, width) for _ in range(config.deepstack))
            for layer, module in enumerate(self.language_model.layers[: config.deepstack]):
                module.register_forward_hook(partial(_add_deepstack, layer), with_kwargs=True)
        self.turn_by_positions_3d()
        self.post_init()
        if config.deepstack:
            # A new student begins as one without these features.
            for parameter in self.deepstack_connectors.parameters():
                nn.init.zeros_(parameter)

    def get_image_features(self, pixel_values: Tensor | None = None, **pixels: Any) -> Any:
        """The output of the teacher's vision part, its features after the post-connector.

        `pooler_output` has a `[N, hidden]` tensor for each image, or one tensor `[..., hidden]`, as the family has it;
        `deepstack_features` has `[N, hidden]` of all images for each level.
        """
        outputs = self.eyes.get_image_features(**{**pixels, "pixel_values": pixel_values, "return_dict": True})
        features = outputs.pooler_output
        carried = self.post_connector(_rows(features))
        if isinstance(features, Tensor):
            outputs.pooler_output = carried.unflatten(0, features.shape[:-1])
        else:
            outputs.pooler_output = carried.split([part.shape[:-1].numel() for part in features])
        if self.config.deepstack:
            levels = zip(self.deepstack_connectors, outputs.deepstack_features, strict=True)
            outputs.deepstack_features = [connector(_rows(images)) for connector, images in levels]
        return outputs

    def forward(self, input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None, **kwargs: Any) -> Any:
        """As the decoder, with the inputs of the vision part too; `position_ids` may be `[3, B, T]`."""
        if self.config.deepstack and "attention_instances" in kwargs:
            raise ValueError(
                "vLLM puts image features before the decoder only, and this model adds more of them inside it "
                "(deepstack): answers would be wrong; load it with transformers"
            )
        given = {name: kwargs.pop(name, None) for name in self.config.pixel_inputs}
        pixels = {name: value for name, value in given.items() if value is not None}
        if inputs_embeds is None:
            if input_ids is None:
                raise ValueError("neither input_ids nor inputs_embeds is given; give one of them")
            is_image = input_ids == self.config.image_token_id
            inputs_embeds = self.get_input_embeddings()(input_ids.masked_fill(is_image, 0))
            if pixels:
                found = self.get_image_features(**pixels)
                features = _rows(found.pooler_output)
                if features.shape[0] != int(is_image.sum()):
                    raise ValueError(f"{features.shape[0]} image features for {int(is_image.sum())} image tokens")
                inputs_embeds = inputs_embeds.masked_scatter(is_image[..., None], features.to(inputs_embeds.dtype))
                if self.config.deepstack:
                    kwargs["deepstack"] = DeepstackFeatures(is_image, found.deepstack_features)
        outputs = self.decoder_outputs(inputs_embeds, {"input_ids": input_ids, **pixels}, kwargs)
        if "deepstack" in kwargs and len(kwargs["deepstack"].added) < self.config.deepstack:
            raise ValueError("layers of this decoder are not given the features that they are to add to image tokens")
        return outputs


class AnyTeacherStudentForConditionalGeneration(AnyTeacherStudentPreTrainedModel, GenerationMixin):
    """The student with its language modelling head."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: AnyTeacherStudentConfig) -> None:
        super().__init__(config)
        self.model = AnyTeacherStudentModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_image_features(self, pixel_values: Tensor | None = None, **pixels: Any) -> Any:
        """As the model's."""
        return self.model.get_image_features(pixel_values, **pixels)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of the last `logits_to_keep` positions, of all for 0; `kwargs` has the family's pixel inputs."""
        outputs = self.model(input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs)
        logits = self.lm_head(outputs.last_hidden_state[:, -logits_to_keep:])
        return CausalLMOutputWithPast(
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def prepare_inputs_for_generation(self, *args: Any, is_first_iteration: bool = False, **kwargs: Any) -> Any:
        """The image enters with the prompt only. Without a cache, each new token reads the prompt again."""
        inputs = super().prepare_inputs_for_generation(*args, is_first_iteration=is_first_iteration, **kwargs)
        if not is_first_iteration and kwargs.get("use_cache", True):
            for name in self.config.pixel_inputs:
                inputs.pop(name, None)
        self.model.place_tokens(inputs, kwargs.get("attention_mask"))
        return inputs

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, input_ids: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor | None, dict[str, Any]]:
        """Of one sample, for beams or several answers: all its pixels again for each, whose rows the library repeats.

        Raises:
            ValueError: Of several samples with images, as nothing says whose pixels are whose.
        """
        given = {name: kwargs.pop(name) for name in self.config.pixel_inputs if kwargs.get(name) is not None}
        if expand_size > 1 and given and input_ids is not None and len(input_ids) > 1:
            raise ValueError(f"{expand_size} answers each for {len(input_ids)} samples with images; give one sample")
        input_ids, kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, input_ids=input_ids, **kwargs
        )
        return input_ids, kwargs | {name: torch.cat([value] * expand_size) for name, value in given.items()}

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        """Generation refuses what `forward` does not name; pixel inputs have other names in each family."""
        others = {name: value for name, value in model_kwargs.items() if name not in self.config.pixel_inputs}
        super()._validate_model_kwargs(others)


def vision_part(teacher_config: PreTrainedConfig) -> PreTrainedModel:
    """The teacher's model class without its decoder; parameters are named as in the teacher."""
    config = copy.deepcopy(teacher_config)
    text = config.get_text_config()
    # The decoder is built with the model and dropped at once: as small as possible.
    layer_types = (getattr(text, "layer_types", None) or [None])[:1]
    small = {"num_hidden_layers": 1, "vocab_size": 8, "intermediate_size": 8, "layer_types": layer_types}
    small |= {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 8}
    for name, value in {**small, "pad_token_id": None}.items():
        if getattr(text, name, None) is not None:
            setattr(text, name, value)
    # In the student's precision, not in the one that the teacher's config names.
    model: PreTrainedModel = AutoModel.from_config(config, dtype=torch.get_default_dtype(), trust_remote_code=False)
    decoder = model.get_decoder()
    (name,) = (name for name, child in model.named_children() if child is decoder)
    setattr(model, name, None)
    return model
