"""What vLLM's Transformers modeling backend does with an exported folder, without vLLM: run as a script.

By its documentation and source (vllm/model_executor/models/registry.py and transformers/ of 2026): the class that
`auto_map.AutoModel` names is made without weights, its attention replaced; weights go in by their names; pictures go
through `get_image_features`, are split into one part a picture, and enter at the placeholders that the processor
reports; the decoder is called with embeddings, positions and `attention_instances`; the head is vLLM's own.
"""

import inspect
import json
import re
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, ProcessorMixin
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from stages.checkpoints.processors import load_processor


def pictures(processor: Any) -> list[Image.Image]:
    """Two of different sizes; one for the families whose library code gives the features of all as one."""
    all_pictures = [Image.linear_gradient("L").convert("RGB").resize(size) for size in ((48, 48), (90, 30))]
    return all_pictures[: 1 if type(processor).__name__ in ("Idefics3Processor", "SmolVLMProcessor") else 2]


def question(processor: Any) -> str:
    """About the pictures, as the chat template writes it."""
    content = [{"type": "image"}] * len(pictures(processor)) + [{"type": "text", "text": "Is it red?"}]
    # SmolVLM's own method asks for the half that reads videos, which needs torchvision.
    text: str = ProcessorMixin.apply_chat_template(
        processor, [{"role": "user", "content": content}], add_generation_prompt=True
    )
    return text


def vllm_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """Causal attention `[1, heads, T, width]` by the object that vLLM made for this layer; masks are not read."""
    assert attention_mask is None
    scaled = kwargs["attention_instances"][module.layer_idx]
    out = scaled(query, key, value, kwargs["scaling"])
    return out.transpose(1, 2), None


def causal(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """What stands for vLLM's attention."""
    return nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)


def load(folder: str) -> tuple[Any, Tensor]:
    """The base model as vLLM makes it, with weights, and the head's."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    model_class = get_class_from_dynamic_module(config.auto_map["AutoModel"], folder)
    assert model_class.is_backend_compatible()
    config.get_text_config()._attn_implementation = "vllm"
    config.dtype = torch.get_default_dtype()
    settings = {"config": config, "dtype": torch.float32, "trust_remote_code": True}
    with torch.device("meta"):
        assert AutoModel.from_config(**settings).get_decoder() is not None
    with init_empty_weights(include_buffers=False):
        model = AutoModel.from_config(**settings)
    assert type(model).__name__ == model_class.__name__
    assert model.get_decoder().config._attn_implementation == "vllm"
    children = "|".join(name for name, _ in model.named_children())
    weights = {}
    for name, tensor in load_file(f"{folder}/model.safetensors").items():
        if (prefix := model.base_model_prefix) and prefix != "model":
            name = re.sub(rf"^{prefix}\.", "model.", name)
        weights[re.sub(rf"^(?!model\.)(({children}).*)", r"model.\1", name)] = tensor
    found = model.load_state_dict(
        {name.removeprefix("model."): t for name, t in weights.items() if name != "lm_head.weight"},
        strict=False,
        assign=True,
    )
    assert (found.missing_keys, found.unexpected_keys) == ([], [])
    text = config.get_text_config()
    embedding = nn.Embedding(text.vocab_size, text.hidden_size, _weight=model.get_input_embeddings().weight)
    model.set_input_embeddings(embedding)
    tied = text.tie_word_embeddings or config.tie_word_embeddings
    return model.eval(), embedding.weight if tied else weights["lm_head.weight"]


def features_of(model: Any, processor: Any, inputs: dict[str, Tensor], images: list[Image.Image]) -> list[Tensor]:
    """One tensor a picture, split by what the processor says of their sizes."""
    counts = processor._get_num_multimodal_tokens(image_sizes=[(image.height, image.width) for image in images])
    grid = inputs.get("image_grid_thw")
    patches = counts["num_image_patches"] if grid is None else grid.prod(-1).tolist()
    found = model.get_image_features(inputs.pop("pixel_values"), **inputs)
    found = found[0] if isinstance(found, tuple) else found.pooler_output
    if not isinstance(found, Tensor):
        return list(found)
    rows = found.reshape(-1, found.shape[-1])
    assert rows.shape[0] % sum(patches) == 0
    return list(rows.split([count * (rows.shape[0] // sum(patches)) for count in patches]))


def positions_of(model: Any, ids: Tensor, is_image: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    """`[1, T]`, or `[3, 1, T]` where the config of the decoder says that positions are 3D."""
    if "mrope_section" not in (model.config.get_text_config().rope_parameters or {}):
        return torch.arange(len(ids))[None]
    accepted = inspect.signature(model.get_rope_index).parameters
    given = {"image_grid_thw": inputs["image_grid_thw"], "mm_token_type_ids": is_image.int()[None]}
    given |= dict.fromkeys(("video_grid_thw", "second_per_grid_ts"))
    positions, _ = model.get_rope_index(
        input_ids=ids[None], **{name: value for name, value in given.items() if name in accepted}
    )
    return positions[:, 0][:, None].contiguous()


def logits_of(folder: str) -> Tensor:
    """`[T, V]` of the question about pictures."""
    model, head = load(folder)
    # By AutoProcessor some families need torchvision, for the half that reads videos.
    processor = load_processor(Path(f"{folder}-processor"))
    images = pictures(processor)
    inputs = processor(
        images=images, text=question(processor), return_text_replacement_offsets=True, return_tensors="pt"
    )
    (replacements,) = inputs.pop("text_replacement_offsets")
    for name in ("mm_token_type_ids", "token_type_ids", "attention_mask"):
        inputs.pop(name, None)
    (ids,) = inputs.pop("input_ids")
    features = features_of(model, processor, dict(inputs), images)
    # The token that an expansion repeats holds the features.
    expanded = [processor.tokenizer.encode(one["replacement"], add_special_tokens=False) for one in replacements]
    holders = {int(torch.tensor(part).mode().values) for part in expanded}
    is_image = torch.isin(ids, torch.tensor(sorted(holders)))
    assert [part.shape[0] for part in features] == [sum(token in holders for token in part) for part in expanded]
    embeds = model.get_input_embeddings()(ids).masked_scatter(is_image[:, None], torch.cat(features))
    outputs = model(
        input_ids=None,
        inputs_embeds=embeds[None],
        use_cache=False,
        position_ids=positions_of(model, ids, is_image, inputs),
        attention_instances=[causal] * model.config.get_text_config().num_hidden_layers,
        return_dict=False,
    )
    logits: Tensor = outputs[0][0] @ head.T
    return logits


def main() -> None:
    """Writes the logits of each folder, or why there are none."""
    torch.set_num_threads(1)
    ALL_ATTENTION_FUNCTIONS["vllm"] = vllm_attention
    found = {}
    with torch.inference_mode():
        for folder in sys.argv[2:]:
            try:
                found[folder] = logits_of(folder).tolist()
            except (AssertionError, AttributeError, ImportError, KeyError, TypeError, ValueError) as error:
                found[folder] = f"{type(error).__name__}: {error}"
    Path(sys.argv[1]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
