"""The two GGUF files that llama.cpp reads of a student: its decoder, and its vision tower with the projector."""

from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from transformers import PreTrainedModel

from stages.export.gguf_tokenizer import GgufTokenizer
from storage.errors import UserError

_DECODERS: Final = {"llama": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3"}
_TOWERS: Final = {"siglip_vision_model": "full"}
"""How image features are selected: SigLIP has no class token to leave out."""
_ACTIVATIONS: Final = {"quick_gelu": None, "gelu": "gelu", "gelu_pytorch_tanh": "gelu", "silu": "silu"}
_ROTATIONS: Final = ("default", "linear", "llama3")
_DECODER, _TOWER, _PROJECTOR = "model.language_model.", "model.vision_tower.", "model.multi_modal_projector."


def check_student(model: PreTrainedModel) -> None:
    """Refuses what llama.cpp has no place for.

    Raises:
        UserError: If it is no LLaVA 1.5 model with one of the known decoders and vision towers.
    """
    config = model.config
    text: Any = config.get_text_config()
    vision: Any = getattr(config, "vision_config", None)
    rope = getattr(text, "rope_parameters", None) or {}
    vision_type = getattr(vision, "model_type", None)
    if vision_type == "clip_vision_model":
        raise UserError(
            "the vision tower is a CLIP, whose class token llama.cpp puts behind the patches and not before them "
            "(https://github.com/ggml-org/llama.cpp/issues/25814, seen in llama-cpp-python 0.3.36), so that it would "
            f"serve another model; GGUF files are written for {', '.join(_TOWERS)}. Leave out --format gguf"
        )
    act, layer = getattr(vision, "hidden_act", None), getattr(config, "vision_feature_layer", None)
    expected = {
        "model": (config.model_type, ("llava", "compodistill_student")),
        "decoder": (text.model_type, tuple(_DECODERS)),
        "activation of the decoder": (text.hidden_act, ("silu",)),
        "layers of the decoder": (set(getattr(text, "layer_types", None) or ["full_attention"]), ({"full_attention"},)),
        "attention bias of a Qwen3": (text.model_type == "qwen3" and text.attention_bias, (False,)),
        "scaling of rotary frequencies": (rope.get("rope_type"), _ROTATIONS),
        "rotated share of a head": (rope.get("partial_rotary_factor", 1.0), (1.0,)),
        "vision tower": (vision_type, tuple(_TOWERS)),
        "activation of the vision tower": (act, tuple(_ACTIVATIONS)),
        "selected image features": (
            getattr(config, "vision_feature_select_strategy", None),
            (_TOWERS.get(str(vision_type)),),
        ),
        "kind of vision_feature_layer": (type(layer).__name__, ("int",)),
        "activation of the projector": (getattr(config, "projector_hidden_act", None), ("gelu",)),
        # llama.cpp takes it for a file of an old kind, whose two layers have each other's names.
        "vision layers as wide as their inner width": (
            vision_type is not None and vision.intermediate_size == vision.hidden_size,
            (False,),
        ),
    }
    for what, (found, known) in expected.items():
        if found not in known:
            raise UserError(
                f"{what}: {found}; llama.cpp's projector `mlp` is written for {', '.join(map(str, known))}. "
                "Leave out --format gguf"
            )
    if not 1 <= feature_depth(model) <= vision.num_hidden_layers:
        raise UserError(f"vision_feature_layer {layer} is none of the vision tower's {vision.num_hidden_layers} layers")


def feature_depth(model: PreTrainedModel) -> int:
    """How many layers of the vision tower the image features have passed."""
    layer: int = model.config.vision_feature_layer
    depth: int = layer if layer >= 0 else model.config.vision_config.num_hidden_layers + 1 + layer
    return depth


def write_decoder(file: Path, name: str, model: PreTrainedModel, tokenizer: GgufTokenizer, template: str) -> None:
    """The decoder with its tokenizer and chat template; matrices in the model's dtype, vectors in float32."""
    from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGUFWriter, get_tensor_name_map

    config = model.config.get_text_config()
    arch = MODEL_ARCH[_DECODERS[config.model_type]]
    writer = GGUFWriter(file, MODEL_ARCH_NAMES[arch])
    writer.add_name(name)
    writer.add_file_type(_file_type(model.dtype))
    _decoder_settings(writer, config)
    _tokenizer_settings(writer, tokenizer, template)
    names = get_tensor_name_map(arch, config.num_hidden_layers)
    tensors = model.state_dict()
    if config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    for key, tensor in tensors.items():
        if key.startswith(_DECODER) or key == "lm_head.weight":
            stem = f"model.{key.removeprefix(_DECODER)}" if key.startswith(_DECODER) else key
            _add(writer, _named(names, stem), _rotated(tensor, key, config), model.dtype)
    if config.rope_parameters["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", _frequency_divisors(config).numpy())
    _finish(writer)


def write_vision(file: Path, name: str, model: PreTrainedModel, image_processor: Any) -> None:
    """The vision tower, up to the layer whose features are taken, and the projector as llama.cpp's `mlp`."""
    from gguf import MODEL_ARCH, GGUFType, GGUFWriter, VisionProjectorType, get_tensor_name_map

    config, depth = model.config.vision_config, feature_depth(model)
    writer = GGUFWriter(file, "clip")
    writer.add_type(GGUFType.MMPROJ)
    writer.add_name(name)
    writer.add_file_type(_file_type(model.dtype))
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type(getattr(VisionProjectorType, "MLP", "mlp"))
    writer.add_vision_projection_dim(model.config.get_text_config().hidden_size)
    writer.add_vision_image_size(config.image_size)
    writer.add_vision_patch_size(config.patch_size)
    writer.add_vision_embedding_length(config.hidden_size)
    writer.add_vision_feed_forward_length(config.intermediate_size)
    writer.add_vision_block_count(depth)
    writer.add_vision_head_count(config.num_attention_heads)
    writer.add_vision_attention_layernorm_eps(config.layer_norm_eps)
    # Without it the file would need one layer more than is computed.
    writer.add_array("clip.vision.feature_layer", [depth])
    kind = _ACTIVATIONS[config.hidden_act]
    writer.add_vision_use_gelu(kind == "gelu")
    writer.add_vision_use_silu(kind == "silu")
    scaled = bool(image_processor.do_normalize)
    writer.add_vision_image_mean([float(value) for value in image_processor.image_mean] if scaled else [0.0] * 3)
    writer.add_vision_image_std([float(value) for value in image_processor.image_std] if scaled else [1.0] * 3)
    names = get_tensor_name_map(MODEL_ARCH.MMPROJ, config.num_hidden_layers)
    tensors = model.state_dict()
    for key, tensor in tensors.items():
        stem = key.removeprefix(_TOWER).removeprefix("vision_model.")
        if key.startswith(_TOWER) and _is_computed(stem, depth):
            _add(writer, _named(names, f"vision_tower.vision_model.{stem}"), tensor, model.dtype)
    for number, layer in ((0, "linear_1"), (2, "linear_2")):
        weight = tensors[f"{_PROJECTOR}{layer}.weight"]
        # llama.cpp adds a bias to both.
        bias = tensors.get(f"{_PROJECTOR}{layer}.bias", weight.new_zeros(len(weight)))
        _add(writer, f"mm.{number}.weight", weight, model.dtype)
        _add(writer, f"mm.{number}.bias", bias, model.dtype)
    _finish(writer)


def _decoder_settings(writer: Any, config: Any) -> None:
    from gguf import RopeScalingType

    rope = config.rope_parameters
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))


def _tokenizer_settings(writer: Any, tokenizer: GgufTokenizer, template: str) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(tokenizer.pre)
    writer.add_token_list(tokenizer.tokens)
    writer.add_token_types(tokenizer.types)
    writer.add_token_merges(tokenizer.merges)
    for name, number in tokenizer.special_ids.items():
        getattr(writer, f"add_{name}_token_id")(number)
    # The chat template writes them itself, where the student saw them.
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    writer.add_chat_template(template)


def _is_computed(stem: str, depth: int) -> bool:
    """Whether image features depend on this tensor of the vision tower."""
    parts = stem.split(".")
    if parts[:2] == ["encoder", "layers"]:
        return int(parts[2]) < depth
    return parts[0] in ("embeddings", "pre_layrnorm") and parts[-1] != "position_ids"


def _named(names: Any, key: str) -> str:
    name: str | None = names.get_name(key, try_suffixes=(".weight", ".bias"))
    if name is None:
        raise UserError(f"GGUF files have no name for the tensor {key}; leave out --format gguf")
    return name


def _rotated(tensor: Tensor, key: str, config: Any) -> Tensor:
    """Rows of a Llama's queries and keys in the order of llama.cpp, which rotates neighbours and not halves."""
    layer = key.split(".")[-2]
    if config.model_type != "llama" or layer not in ("q_proj", "k_proj"):
        return tensor
    heads = config.num_attention_heads if layer == "q_proj" else config.num_key_value_heads
    halves = tensor.reshape(heads, 2, len(tensor) // heads // 2, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)


def _frequency_divisors(config: Any) -> Tensor:
    """What Llama 3.1's scaling divides the rotary frequencies by, `[head_dim / 2]` in float32."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled_d, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    dims_d = torch.arange(len(scaled_d)) / len(scaled_d)
    divisors_d: Tensor = (float(config.rope_parameters["rope_theta"]) ** -dims_d / scaled_d).float()
    return divisors_d


def _add(writer: Any, name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    from gguf import GGMLQuantizationType

    # llama.cpp adds vectors and positions in float32 only, and its convolution has no bfloat16.
    whole = tensor.ndim == 1 or name == "v.position_embd.weight" or (tensor.ndim == 4 and dtype == torch.bfloat16)
    tensor = (tensor.float() if whole else tensor.to(dtype)).contiguous()
    if tensor.dtype == torch.bfloat16:
        writer.add_tensor(name, tensor.view(torch.uint8).numpy(), raw_dtype=GGMLQuantizationType.BF16)
    else:
        writer.add_tensor(name, tensor.numpy())


def _file_type(dtype: torch.dtype) -> int:
    from gguf import LlamaFileType

    kinds = {torch.float16: LlamaFileType.MOSTLY_F16, torch.bfloat16: LlamaFileType.MOSTLY_BF16}
    return int(kinds.get(dtype, LlamaFileType.ALL_F32))


def _finish(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
