r"""Renders a report page: template, style and script in one file; nothing in it can load or run anything else.

All text of others is escaped, and stands there with escapes such as `\u202e` for what would not be seen.
"""

import base64
import hashlib
import io
import json
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
from jinja2 import Environment, StrictUndefined
from numpy.typing import NDArray
from PIL import Image

from pipeline.report.page import TEACHER, GallerySample, MapPanel, Page
from pipeline.ui.report.charts import bar_chart, line_chart
from storage.printable import printable

_FOLDER: Final = Path(__file__).parent
_NUM_COLOURS: Final = 8
"""Of models other than the teacher, in `page.css`; more models take them again."""
_LARGEST_PICTURE: Final = 384
"""Pixels of a picture's longer side in the page."""
_SMALL_PICTURE: Final = 128
"""Up to here pixels are kept as they are, and seen."""


def render_page(page: Page) -> str:
    """The page as HTML."""
    style, script = ((_FOLDER / name).read_text("utf-8") for name in ("page.css", "gallery.js"))
    environment = Environment(
        autoescape=True,
        finalize=partial(_shown, keep="\n"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = environment.from_string((_FOLDER / "page.html.jinja").read_text("utf-8"))
    colours = _colours(page)
    return template.render(
        page=page,
        style=style,
        script=script,
        style_hash=_hash(style),
        script_hash=_hash(script),
        data=_in_script(gallery_data(page.samples, colours)) if page.samples else "",
        colour=lambda model: colours.get(model, "other"),
        bar_chart=bar_chart,
        line_chart=line_chart,
    )


def gallery_data(samples: tuple[GallerySample, ...], colours: dict[str, str]) -> list[dict[str, Any]]:
    """What the page's script shows, as JSON holds it; maps as bytes in base64."""
    return [
        {
            "key": sample.key,
            "question": sample.question,
            "answer": sample.answer,
            "image": _data_url(sample.image),
            "pixels": max(sample.image.size) <= _SMALL_PICTURE,
            "aspect": round(sample.image.width / sample.image.height, 4),
            "boxes": _boxes(sample.boxes_N4),
            "words": sample.words,
            "panels": [_panel(panel, colours) for panel in sample.panels],
            "questions": [
                {"suite": one.suite, "question": one.question, "expected": one.expected, "answers": one.answers}
                for one in sample.questions
            ],
        }
        for sample in samples
    ]


def _panel(panel: MapPanel, colours: dict[str, str]) -> dict[str, Any]:
    found: dict[str, Any] = {
        "name": panel.name,
        "colour": colours.get(panel.name, colours[TEACHER] if panel.name.startswith(TEACHER) else "other"),
        "layers": panel.layers,
        "pooled": _coded(panel.pooled_WN),
        "sinks": _coded(panel.with_sinks_WN),
        "words": None,
    }
    if panel.words_WQN is not None:
        found["words"] = _coded(panel.words_WQN)
    return found


def _coded(maps: NDArray[np.float32]) -> dict[str, Any]:
    """Each map in 8 bits of its largest value, and these values."""
    flat = np.nan_to_num(maps.reshape(-1, maps.shape[-1]).astype(np.float64)).clip(0)
    peaks = flat.max(-1, initial=0)
    levels = (flat / np.maximum(peaks, 1e-30)[:, None] * 255).round().astype(np.uint8)
    return {"peaks": [float(f"{peak:.4g}") for peak in peaks], "levels": base64.b64encode(levels.tobytes()).decode()}


def _boxes(boxes_N4: NDArray[np.float32]) -> str:
    """Edges in 16 bits, of -1 to 2 pictures: a padded picture's tokens lie partly outside."""
    levels = ((boxes_N4.clip(-1, 2) + 1) / 3 * 65535).round().astype("<u2")
    return base64.b64encode(levels.tobytes()).decode()


def _colours(page: Page) -> dict[str, str]:
    others = [model for model in page.models if model != TEACHER]
    return {TEACHER: "teacher"} | {model: str(number % _NUM_COLOURS) for number, model in enumerate(others)}


def _data_url(image: Image.Image) -> str:
    buffer, shown = io.BytesIO(), image.convert("RGB")
    if max(shown.size) <= _SMALL_PICTURE:
        shown.save(buffer, format="PNG", optimize=True)
        kind = "png"
    else:
        shown.thumbnail((_LARGEST_PICTURE, _LARGEST_PICTURE), Image.Resampling.LANCZOS)
        shown.save(buffer, format="JPEG", quality=85)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _in_script(data: Any) -> str:
    """JSON in ASCII that neither ends its script element nor begins a comment."""
    text = json.dumps(_printable_all(data), separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _printable_all(data: Any) -> Any:
    if isinstance(data, str):
        return printable(data, keep="\n")
    if isinstance(data, dict):
        return {name: _printable_all(value) for name, value in data.items()}
    return [_printable_all(value) for value in data] if isinstance(data, list | tuple) else data


def _shown(value: Any, keep: str) -> Any:
    # Our own parts of the page, which the template marks as safe, stay as they are.
    return printable(value, keep) if isinstance(value, str) and not hasattr(value, "__html__") else value


def _hash(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
