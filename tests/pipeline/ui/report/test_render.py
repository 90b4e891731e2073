"""The report page as text: escaping, what it may load, and how large it is."""

import base64
import hashlib
import json
import re
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from pipeline.report.page import TEACHER, Page
from pipeline.ui.report.render import gallery_data, render_page
from tests.pipeline.report.pages import HOSTILE, full_page, gallery_sample, without_samples


def test_text_of_others_cannot_leave_its_place() -> None:
    html = render_page(full_page((HOSTILE, f"{HOSTILE}2"), HOSTILE))
    assert html.count("<script") == 2
    assert html.count("</script>") == 2
    assert "<b>" not in html
    assert "<!--" not in html
    assert all(char.isprintable() or char == "\n" for char in html)
    assert "&lt;script&gt;alert(1)" in html
    assert "\\x1b[31m\\u202eevil" in html


def test_the_policy_allows_this_style_and_this_script_and_no_request() -> None:
    html = render_page(full_page())
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]+)"', html)
    rules = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert rules["img-src"] == "data:"
    for kind, pattern in (("style", r"<style>(.*?)</style>"), ("script", r"<script>(.*?)</script>")):
        (content,) = re.findall(pattern, html, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert rules[f"{kind}-src"] == f"'sha256-{digest}'"
    # The policy would refuse these; nothing on the page needs them.
    assert not re.search(r"\sstyle=|\son[a-z]+=", html)
    addresses = re.findall(r'(?:src|href)="([^"]*)"', html)
    assert [address for address in addresses if not address.startswith(("#", "data:,"))] == []


def test_maps_are_kept_within_half_a_level_of_their_largest_value() -> None:
    sample = gallery_sample(0, ("sft",))
    (data,) = gallery_data((sample,), {TEACHER: "teacher", "sft": "0"})
    for panel, shown in zip(sample.panels, data["panels"], strict=True):
        for name, maps in (("pooled", panel.pooled_WN), ("sinks", panel.with_sinks_WN), ("words", panel.words_WQN)):
            if maps is None:
                assert shown[name] is None
                continue
            flat = maps.reshape(-1, maps.shape[-1])
            levels = np.frombuffer(base64.b64decode(shown[name]["levels"]), np.uint8).reshape(flat.shape)
            peaks = np.array(shown[name]["peaks"])[:, None]
            assert np.abs(levels / 255 * peaks - flat).max() <= flat.max() * (0.5 / 255 + 1e-3)
    edges = np.frombuffer(base64.b64decode(data["boxes"]), "<u2").reshape(-1, 4) / 65535 * 3 - 1
    assert np.abs(edges - sample.boxes_N4).max() < 1e-4


def test_sixteen_samples_of_eight_layers_and_three_students_take_about_four_megabytes() -> None:
    num_tokens, num_layers, num_words = 576, 8, 8
    generator = np.random.default_rng(0)

    def maps(*shape: int) -> np.ndarray:
        return generator.random((*shape, num_tokens), dtype=np.float32)

    sample = gallery_sample(0, ("a", "b", "c"))
    panels = tuple(
        replace(
            panel,
            layers=tuple(f"layer {layer}" for layer in range(num_layers)),
            pooled_WN=maps(num_layers),
            with_sinks_WN=maps(num_layers),
            words_WQN=None if panel.words_WQN is None else maps(num_layers, num_words),
        )
        for panel in sample.panels
    )
    photo = Image.fromarray(generator.integers(0, 256, (48, 64, 3), dtype=np.uint8)).resize((640, 480))
    large = replace(sample, image=photo, boxes_N4=maps(4)[:, :num_tokens].T, words=("w",) * num_words, panels=panels)
    page = replace(full_page(("a", "b", "c")), samples=(large,) * 16)
    assert 3.5e6 < len(render_page(page).encode()) < 4.5e6


def test_sections_without_content_are_left_out() -> None:
    html = render_page(Page(title="Nothing yet"))
    assert "<h2>" not in html
    assert "<script" not in html
    assert "gallery" not in re.sub(r"<style>.*</style>", "", html, flags=re.DOTALL)
    assert 'id="attention"' not in render_page(without_samples(full_page()))


@pytest.mark.parametrize(("size", "kind"), [((32, 24), "png"), ((1000, 700), "jpeg")])
def test_small_pictures_keep_their_pixels_and_large_ones_are_made_smaller(size: tuple[int, int], kind: str) -> None:
    sample = replace(gallery_sample(0, ("sft",)), image=Image.new("RGB", size))
    (data,) = gallery_data((sample,), {TEACHER: "teacher"})
    assert data["image"].startswith(f"data:image/{kind};base64,")
    assert data["pixels"] == (kind == "png")
    assert json.dumps(data)
