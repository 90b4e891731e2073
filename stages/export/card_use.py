"""What a model card says of the use of an export: by transformers, or by llama.cpp."""

from collections.abc import Sequence

from storage.strict_model import StrictModel

_USE = """\
```python
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("{name}"{trust})
processor = AutoProcessor.from_pretrained("{name}"{trust})
picture, question = Image.open("picture.jpg"), "What is in the picture?"
content = [{{"type": "image", "image": picture}}, {{"type": "text", "text": question}}]
inputs = processor.apply_chat_template(
    [{{"role": "user", "content": content}}],
    add_generation_prompt=True,
    tokenize=True,
    return_dict=True,
    return_tensors="pt",
).to(model.device, model.dtype)
output = model.generate(**inputs, max_new_tokens=64)
print(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```"""


_USE_GGUF = """\
```bash
llama-server -m {decoder} --mmproj {vision} --jinja{bias}
```

llama.cpp fits a picture of another size into a square and pads it with grey, as this model's training did not. A
picture of {size} x {size} pixels it takes as it is, so make it that large first:

```python
{resize}
```

Image features and answers differ a little from those of transformers: llama.cpp approximates the GELU by a hyperbolic
tangent, and reads it from a table of 16 bits on a CPU."""

_RESIZE = """\
from PIL import Image

Image.open("picture.jpg").convert("RGB").resize(({size}, {size}), Image.Resampling.{how}).save("picture.png")"""

_CROP = """\
from PIL import Image, ImageOps

picture = Image.open("picture.jpg").convert("RGB")
ImageOps.fit(picture, ({size}, {size}), Image.Resampling.{how}).save("picture.png")"""


class GgufFiles(StrictModel):
    """What llama.cpp needs of a student."""

    decoder: str
    """Name of the file."""
    vision: str
    """Name of the file with the vision tower and the projector."""
    pre_tokenizer: str
    """How the vocabulary splits text, by llama.cpp's name."""
    image_size: int
    """Width and height of pictures, in pixels."""
    is_cropped: bool
    """Whether training cut the middle out of a picture; it was stretched to a square otherwise."""
    resampling: str
    """Pillow's name for how pictures were resized."""
    never_generated: tuple[int, ...]
    """Tokens that stand for no text, such as the image token."""


def use_of_folder(name: str, model_class: str, custom_code: str | None) -> list[str]:
    """How transformers loads a folder."""
    if custom_code is None:
        return [f"`{model_class}` is a class of transformers.", _USE.format(name=name, trust="")]
    code = (
        f"`{model_class}` is defined by this folder. Loading runs its `{custom_code}`, which needs PyTorch and "
        "transformers only."
    )
    return [code, _USE.format(name=name, trust=", trust_remote_code=True")]


def serving(name: str, custom_code: str | None, why_not_vllm: str | None, never_generated: Sequence[int]) -> list[str]:
    """What serves a folder for transformers, and what does not."""
    if why_not_vllm is not None:
        served = [f"vLLM does not serve this model: {why_not_vllm}. Servers that call transformers do."]
    else:
        flags = "" if custom_code is None else " --trust-remote-code --model-impl transformers"
        served = [
            "It meets the published requirements of vLLM's Transformers backend. vLLM itself was not run."
            if custom_code
            else "Servers with support for this class load the folder without code of its own.",
            f"```bash\nvllm serve {name}{flags}\n```",
        ]
        if never_generated:
            bias = ", ".join(f'"{token}": -100' for token in never_generated)
            served.append(
                "vLLM does not read `suppress_tokens` of generation_config.json. These tokens stand for no text; a "
                f'request forbids them by `"logit_bias": {{{bias}}}`.'
            )
    if custom_code is not None:
        served.append(
            "llama.cpp does not load this folder; `cdp export --format gguf` writes files for it, of students of "
            "LLaVA 1.5 teachers with SigLIP towers."
        )
    return served


def use_of_gguf(files: GgufFiles) -> str:
    """How llama.cpp serves the files, and what it must be given."""
    how = (_CROP if files.is_cropped else _RESIZE).format(size=files.image_size, how=files.resampling)
    bias = "".join(f" --logit-bias {token}-inf" for token in files.never_generated)
    return _USE_GGUF.format(decoder=files.decoder, vision=files.vision, bias=bias, size=files.image_size, resize=how)
