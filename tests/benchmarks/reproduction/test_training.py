from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.reproduction.guide import AttentionGuide, Guide
from benchmarks.reproduction.model import Answerer, DecoderSize, LocalTower
from benchmarks.reproduction.optimizer import LOWEST, Optimizer, rate_factor
from benchmarks.reproduction.oracle import oracle_maps
from benchmarks.reproduction.scenes import NUM_CELLS, draw_scenes
from benchmarks.reproduction.tower import features
from benchmarks.reproduction.training import Budget, Phase, Pictures, accuracy, answers, blinded, steps_to, train

SIZE = DecoderSize(layers=2, width=32)


@pytest.fixture(scope="module")
def pictures() -> Pictures:
    scenes = draw_scenes("train", 0, 32)
    return Pictures.of(features(LocalTower(0), scenes, 0), scenes)


def new_model(pictures: Pictures) -> Answerer:
    return Answerer(SIZE, len(pictures.questions.kind_R), seed=0)


def test_a_token_of_the_tower_depends_on_its_own_cell_only() -> None:
    tower = LocalTower(0)
    pixels = 255 * torch.rand(1, 96, 96, 3)
    changed = pixels.clone()
    changed[:, 8:16, 16:24] = 0
    differs_N = (tower(pixels) != tower(changed)).any(-1)[0]
    assert differs_N.nonzero().flatten().tolist() == [12 + 2]


def test_a_question_sees_the_picture_and_no_other_question(pictures: Pictures) -> None:
    model = new_model(pictures)
    asked_BR3 = torch.from_numpy(pictures.questions.asked_BR3)[:2]
    features_BNd = pictures.features_BNd[:2].float()
    before_BRV, _ = model(features_BNd, asked_BR3)
    others = asked_BR3.clone()
    others[:, 1:] = asked_BR3[:, :-1]
    after_BRV, _ = model(features_BNd, others)
    assert torch.allclose(before_BRV[:, 0], after_BRV[:, 0], atol=1e-6)
    other_picture_BRV, _ = model(features_BNd.flip(0), asked_BR3)
    assert not torch.allclose(before_BRV[:, 0], other_picture_BRV[:, 0], atol=1e-4)


def test_guided_attention_moves_towards_the_oracle_and_training_repeats_to_the_bit(pictures: Pictures) -> None:
    place_B6 = torch.from_numpy(pictures.scenes.place_B6)
    attention = AttentionGuide({0: lambda rows_B: oracle_maps(place_B6[rows_B], NUM_CELLS)}, sink_mask=False)
    guide = Guide(attention)
    every_B = torch.arange(32)

    def distance(model: Answerer) -> float:
        return float(attention.loss(answers(model, pictures, (0,))[1], every_B, 0.0))

    models = [new_model(pictures) for _ in range(3)]
    untrained = distance(models[0])
    budget = Budget("test", steps=12, batch=16, seed=1, fall_steps=4)
    guided = [train(model, pictures, pictures, budget, guide) for model in models[:2]]
    plain = train(models[2], pictures, pictures, budget)
    assert distance(models[0]) < min(untrained, distance(models[2]))
    assert guided[0]["curve"] == guided[1]["curve"] != plain["curve"]


def test_a_killed_training_goes_on_to_the_same_weights(
    pictures: Pictures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    budget = Budget("test", steps=10, batch=16, seed=1, fall_steps=4, every=3)
    undisturbed = new_model(pictures)
    expected = train(undisturbed, pictures, pictures, budget)
    monkeypatch.setattr(Optimizer, "step", killed_after(7, Optimizer.step))
    with pytest.raises(KeyboardInterrupt):
        train(new_model(pictures), pictures, pictures, budget, checkpoint=tmp_path / "kept.safetensors")
    monkeypatch.undo()
    resumed = new_model(pictures)
    found = train(resumed, pictures, pictures, budget, checkpoint=tmp_path / "kept.safetensors")
    assert found["curve"] == expected["curve"]
    for name, tensor in undisturbed.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def killed_after(steps: int, step: Callable[[Optimizer, float], None]) -> Callable[[Optimizer, float], None]:
    left = iter(range(steps))

    def killed(self: Optimizer, factor: float) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt
        step(self, factor)

    return killed


def test_a_checkpoint_of_other_settings_is_refused_and_stays(pictures: Pictures, tmp_path: Path) -> None:
    path = tmp_path / "kept.safetensors"
    budget = Budget("test", steps=2, batch=16, seed=1, fall_steps=1)
    train(new_model(pictures), pictures, pictures, budget, checkpoint=path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="give another --folder"):
        train(new_model(pictures), pictures, pictures, replace(budget, seed=2), checkpoint=path)
    assert path.read_bytes() == before


def test_a_mastered_world_ends_the_training_when_the_rates_have_fallen(pictures: Pictures) -> None:
    budget = Budget("test", steps=20, batch=16, seed=1, fall_steps=3, every=4, mastered=0.01)
    found = train(new_model(pictures), pictures, pictures, budget)
    assert found["steps"] == 4 + 3


def test_a_phase_weighs_kinds_from_its_first_step_to_that_of_the_next() -> None:
    phases = (Phase(0, {"colour": 1.0, "end": 0.0}), Phase(5, {"colour": 0.5}))
    budget = Budget("test", steps=10, batch=1, seed=0, fall_steps=1, phases=phases)
    assert [budget.weight_R(step, ("colour", "end")).tolist() for step in (0, 4, 5)] == [[1, 0], [1, 0], [0.5, 1]]


def test_each_picture_comes_once_an_epoch_and_in_another_order_in_the_next() -> None:
    budget = Budget("test", steps=8, batch=8, seed=3, fall_steps=1)
    epochs = [torch.cat([budget.rows_B(4 * epoch + step, 32) for step in range(4)]) for epoch in range(2)]
    assert all(sorted(rows.tolist()) == list(range(32)) for rows in epochs)
    assert epochs[0].tolist() != epochs[1].tolist()


def test_the_rates_rise_stay_and_fall() -> None:
    assert [rate_factor(step, 100, 50) for step in (0, 24, 60, 100, 125, 150)] == [0.02, 0.5, 1, 1, 0.5, LOWEST]


def test_image_tokens_are_kept_apart_during_the_check_only(pictures: Pictures) -> None:
    model = new_model(pictures)
    sees_TT = model.sees_TT.clone()
    assert accuracy(model, pictures).keys() == blinded(model, pictures).keys()
    assert (model.sees_TT == sees_TT).all()


def test_a_level_is_reached_on_the_line_between_two_points_or_never() -> None:
    curve = [{"step": 100, "end": 0.5}, {"step": 200, "end": 0.7}, {"step": 300, "end": 0.9}]
    assert steps_to(curve, "end", 0.8) == 250
    assert steps_to(curve, "end", 0.95) is None
