"""The post-connector folded into the projector gives the same image features, in every family with students."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from stages.checkpoints.processors import load_processor
from stages.families.registry import FAMILIES
from stages.student.model.build import build_student
from stages.student.model.projector_folding import (
    carried_vector,
    fold_post_connector,
    folded_linear,
    has_post_connector,
    take_apart,
)
from tests.checkpoints import make_tiny_lm
from tests.stages.extracted_families import Extracted, processed
from tests.tiny_families import RECIPES

ABLE = sorted(name for name in RECIPES if FAMILIES[name].why_no_student() is None and FAMILIES[name].last_linear)


@pytest.mark.parametrize("with_bias", [True, False])
def test_two_linear_layers_and_their_fold_agree_in_float64(with_bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    weight_TI, bias_T, post_ST, post_bias_S, x_BI = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((7, 5), (7,), (3, 7), (3,), (4, 5))
    )
    weight_SI, bias_S = folded_linear(weight_TI, bias_T if with_bias else None, post_ST, post_bias_S)
    expected = (x_BI @ weight_TI.T + (bias_T if with_bias else 0)) @ post_ST.T + post_bias_S
    torch.testing.assert_close(x_BI @ weight_SI.T + bias_S, expected, atol=1e-13, rtol=1e-13)
    torch.testing.assert_close(carried_vector(bias_T, post_ST, post_bias_S), post_ST @ bias_T + post_bias_S)


def test_a_fold_of_half_precision_weights_is_rounded_once() -> None:
    generator = torch.Generator().manual_seed(0)
    weight_TI, post_ST, post_bias_S = (
        torch.randn(shape, generator=generator).bfloat16() for shape in ((64, 32), (16, 64), (16,))
    )
    weight_SI, bias_S = folded_linear(weight_TI, None, post_ST, post_bias_S)
    exact = post_ST.double() @ weight_TI.double()
    assert weight_SI.dtype == bias_S.dtype == torch.bfloat16
    assert bool(((weight_SI.double() - exact).abs() <= exact.abs() * 2**-8).all())


@pytest.mark.parametrize("model_type", ABLE)
def test_a_folded_student_of_any_family_has_the_same_image_features(
    model_type: str, extract: Callable[[str], Extracted], tmp_path: Path
) -> None:
    extracted = extract(model_type)
    decoder = make_tiny_lm(tmp_path / "lm", tokenizer_from=extracted.checkpoint, num_layers=2)
    student = build_student(extracted.store.teacher_folder(), decoder, seed=0).eval()
    torch.nn.init.normal_(student.model.post_connector.bias, generator=torch.Generator().manual_seed(1))
    parts = take_apart(student)
    before = {name: tensor.clone() for name, tensor in parts.tensors.items()}
    folded = fold_post_connector(parts)
    assert has_post_connector(parts)
    assert not has_post_connector(folded)
    assert all(torch.equal(parts.tensors[name], tensor) for name, tensor in before.items())
    assert parts.config.folded_linear is None

    model, processor = folded.build().eval(), load_processor(extracted.checkpoint)
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in student.parameters())
    for stored, *_ in extracted.with_maps:
        inputs = processed(processor, stored)
        pixels = {name: inputs[name] for name in student.config.pixel_inputs if name in inputs}
        with torch.no_grad():
            outputs = [some.get_image_features(**pixels).pooler_output for some in (model, student)]
        found, expected = ([one] if isinstance(one, torch.Tensor) else list(one) for one in outputs)
        assert {part.shape[-1] for part in expected} == {24}
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
