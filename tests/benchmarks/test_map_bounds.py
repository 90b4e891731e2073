import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.attention_maps import synthetic_layers
from benchmarks.map_bounds import CODECS, WINDOW_LAYERS, Sizes, measure_size, student_logs, student_loss
from benchmarks.results import RESULTS
from stages.student.losses.attention import attention_alignment_loss
from storage.codecs.attention_maps import MapCodec
from storage.codecs.codec_settings import MapCodecConfig, MapCodecName

LARGEST_ANGLE = 4e-3
"""Of `auto`, as `docs/codecs.md` says."""
CODECS_PAGE = Path(__file__).parents[2] / "docs/codecs.md"
DEVIATIONS = (None, 1.0, 0.3, 0.1)


def chosen(num_tokens: int) -> MapCodecName:
    return MapCodecConfig(name="auto").of_size(num_tokens).name


def test_the_loss_written_out_is_the_one_that_students_learn_from() -> None:
    exact_NN = synthetic_layers(20, 5, seed=0).double().mean(0)
    logs_NN = student_logs(exact_NN, 0.3, 0, 2.5)
    keep_NN = (exact_NN <= exact_NN.mean() + exact_NN.std()) & (exact_NN > 0)
    loss, gradient_NN, _ = student_loss(logs_NN, exact_NN, exact_NN, keep_NN)
    logs_NN.requires_grad_()
    student_NN = logs_NN.softmax(-1) * exact_NN.sum(-1, keepdim=True)
    expected = attention_alignment_loss(student_NN[None, None], exact_NN[None, None])
    assert loss == pytest.approx(float(expected.detach()), rel=1e-6)
    (expected_NN,) = torch.autograd.grad(expected, logs_NN)
    torch.testing.assert_close(gradient_NN, expected_NN, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize(("num_tokens", "num_samples"), [(9, 40), (16, 24), (36, 16), (100, 6), (400, 1)])
def test_stored_maps_turn_the_pooled_vector_by_no_more_than_stated(num_tokens: int, num_samples: int) -> None:
    """Windows with sinks; students of other maps, and ever nearer to their teacher, down to cosines of 0.9999."""
    # Seeds that the benchmark does not use.
    found = measure_size(num_tokens, range(500, 500 + num_samples), 2.5, DEVIATIONS)
    for deviation, codecs in found.items():
        errors = codecs[chosen(num_tokens)]
        assert errors["angle_worst"] <= LARGEST_ANGLE
        assert errors["angle_worst"] > 1e-5, "there is something to bound"
        if deviation != 0.1:
            assert errors["batch_loss"] <= 5e-3
            assert errors["batch_gradient"] <= 5e-2


def test_4_bits_break_the_bound_where_maps_are_small() -> None:
    found = measure_size(16, range(40), 2.5, (0.3,))[0.3]
    assert found["sqrt4"]["angle_worst"] > 2 * LARGEST_ANGLE
    assert found["sqrt4"]["sample_worst"] > 5e-2


@pytest.mark.parametrize("name", CODECS[1:])
def test_loss_and_gradient_of_the_pooled_vector_err_by_the_angle_as_stated(name: MapCodecName) -> None:
    """|L' - L| <= e (theta + e), and the gradient by at most e / sin(theta) of its size, whatever the student."""
    for seed in range(6):
        maps_LNN = synthetic_layers(16, WINDOW_LAYERS, seed)
        exact_NN = maps_LNN.double().mean(0)
        codec = MapCodec(MapCodecConfig(name=name), (tuple(range(WINDOW_LAYERS)),))
        (coded_NN,), (keep_NN,) = codec.decode_windows(codec.encode(maps_LNN))
        for deviation in (1.0, 0.1):
            logs_NN = student_logs(exact_NN, deviation, seed, 2.5)
            loss, _, exact_N = student_loss(logs_NN, exact_NN, exact_NN, keep_NN)
            coded_loss, _, coded_N = student_loss(logs_NN, exact_NN, coded_NN.double(), keep_NN)
            a_N = pooled_student(logs_NN, exact_NN, keep_NN).requires_grad_()
            gradients = [
                torch.autograd.grad(1 - torch.cosine_similarity(a_N, b_N, dim=0), a_N)[0] for b_N in (exact_N, coded_N)
            ]
            theta = math.acos(1 - loss)
            angle = math.acos(min(1.0, float(torch.cosine_similarity(exact_N, coded_N, dim=0))))
            assert abs(coded_loss - loss) <= angle * (theta + angle) + 1e-12
            error = float((gradients[1] - gradients[0]).norm() / gradients[0].norm())
            assert error <= 1.001 * angle / math.sin(theta) + 1e-9


def pooled_student(logs_NN: torch.Tensor, masses_NN: torch.Tensor, keep_NN: torch.Tensor) -> torch.Tensor:
    student_NN = logs_NN.softmax(-1) * masses_NN.sum(-1, keepdim=True)
    kept_NN = (keep_NN & (student_NN <= student_NN.mean() + student_NN.std())).double()
    return (student_NN * kept_NN).sum(0) / kept_NN.sum(0).clamp(min=1)


def test_the_saved_results_hold_what_the_documents_claim() -> None:
    saved = json.loads((RESULTS / "map_bounds.json").read_text())
    for row in saved["rows"]:
        errors = row[chosen(row["image_tokens"])]
        assert errors["angle_worst"] <= LARGEST_ANGLE
        if row["deviation"] != 0.1:
            assert errors["batch_loss"] <= 5e-3, row
            assert errors["batch_gradient"] <= 5e-2, row
    assert {"hardware", "date", "command"} <= saved.keys()


def errors_of(rows: Sequence[dict[str, Any]], key: str, codec: MapCodecName | None = None) -> float:
    """The largest of these rows, by default with the codec that `auto` takes."""
    return max(float(row[codec or chosen(row["image_tokens"])][key]) for row in rows)


def figures(*values: float) -> list[str]:
    """As the tables show them."""
    return [f"{value:.1e}".replace("e-0", "e-") for value in values]


def test_the_tables_of_the_document_are_those_of_the_saved_results() -> None:
    stated = json.loads((RESULTS / "map_bounds.json").read_text())["rows"]
    page = CODECS_PAGE.read_text().splitlines()
    for num_tokens, count in Sizes().samples:
        rows = [row for row in stated if row["image_tokens"] == num_tokens]
        angles = [errors_of(rows, "angle_worst", name) for name in (*CODECS, chosen(num_tokens))]
        assert f"| {' | '.join([str(num_tokens), str(count), *figures(*angles)])} |" in page
    names = ("another sample's map", "noise 1", "noise 0.3", "noise 0.1")
    for name, deviation in zip(names, DEVIATIONS, strict=True):
        rows = [row for row in stated if row["deviation"] == deviation]
        medians = [row["float16"]["loss_median"] for row in rows]
        cells = [
            " to ".join(figures(min(medians), max(medians))),
            *figures(errors_of(rows, "batch_loss"), errors_of(rows, "batch_gradient")),
            ", ".join(figures(errors_of(rows, "gradient_median"), errors_of(rows, "gradient_worst"))),
            ", ".join(figures(errors_of(rows, "batch_loss", "sqrt4"), errors_of(rows, "batch_gradient", "sqrt4"))),
        ]
        assert f"| {name} | {' | '.join(cells)} |" in page
