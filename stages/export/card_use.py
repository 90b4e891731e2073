"""What a model card says of the use of an export: by transformers, or by llama.cpp."""

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
    never_generated: list[int]
    """Tokens that stand for no text, such as the image token."""


def use_of_folder(name: str, model_class: str, custom_code: str | None) -> list[str]:
    """How transformers loads a folder, and what serves it."""
    if custom_code is None:
        served = (
            f"`{model_class}` is a class of transformers, so that servers with support for it load this folder without "
            "code of its own."
        )
        return [_USE.format(name=name, trust=""), "### Serving", served]
    served = (
        f"`{model_class}` is defined by this folder: transformers loads it, and servers that run such code. llama.cpp "
        "does not; for it, `cdp export --format gguf` writes students of LLaVA 1.5 teachers with SigLIP towers."
    )
    code = f"Loading runs `{custom_code}` of this folder, which needs PyTorch and transformers only."
    return [code, _USE.format(name=name, trust=", trust_remote_code=True"), "### Serving", served]


def use_of_gguf(files: GgufFiles) -> str:
    """How llama.cpp serves the files, and what it must be given."""
    how = (_CROP if files.is_cropped else _RESIZE).format(size=files.image_size, how=files.resampling)
    bias = "".join(f" --logit-bias {token}-inf" for token in files.never_generated)
    return _USE_GGUF.format(decoder=files.decoder, vision=files.vision, bias=bias, size=files.image_size, resize=how)
