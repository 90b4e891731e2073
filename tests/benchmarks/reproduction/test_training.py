import pytest
import torch

from benchmarks.reproduction.model import Answerer, DecoderSize, LocalTower
from benchmarks.reproduction.oracle import oracle_maps
from benchmarks.reproduction.scenes import NUM_CELLS, draw_scenes
from benchmarks.reproduction.tower import features
from benchmarks.reproduction.training import Budget, Guide, Pictures, accuracy, answers, blinded, steps_to, train

SIZE = DecoderSize(layers=2, width=32)


@pytest.fixture(scope="module")
def pictures() -> Pictures:
    scenes = draw_scenes("train", 0, 32)
    return Pictures.of(features(LocalTower(0), scenes, 0), scenes)


def new_model(pictures: Pictures) -> Answerer:
    return Answerer(SIZE, len(pictures.questions.kind_Q), seed=0)


def test_a_token_of_the_tower_depends_on_its_own_cell_only() -> None:
    tower = LocalTower(0)
    pixels = torch.rand(1, 96, 96, 3)
    changed = pixels.clone()
    changed[:, 8:16, 16:24] = 0
    differs_N = (tower(pixels) != tower(changed)).any(-1)[0]
    assert differs_N.nonzero().flatten().tolist() == [12 + 2]


def test_a_question_sees_the_picture_and_no_other_question(pictures: Pictures) -> None:
    model = new_model(pictures)
    asked_BQ3 = torch.from_numpy(pictures.questions.asked_BQ3)[:2]
    features_BND = pictures.features_BND[:2].float()
    before_BQV, _ = model(features_BND, asked_BQ3)
    others = asked_BQ3.clone()
    others[:, 1:] = asked_BQ3[:, :-1]
    after_BQV, _ = model(features_BND, others)
    assert torch.allclose(before_BQV[:, 0], after_BQV[:, 0], atol=1e-6)
    other_picture_BQV, _ = model(features_BND.flip(0), asked_BQ3)
    assert not torch.allclose(before_BQV[:, 0], other_picture_BQV[:, 0], atol=1e-4)


def test_guided_attention_moves_towards_the_oracle_and_training_repeats_to_the_bit(pictures: Pictures) -> None:
    place_BK = torch.from_numpy(pictures.scenes.place_BK)
    guide = Guide(lambda rows_B: oracle_maps(place_BK[rows_B], NUM_CELLS), layers=(0,), weight=1.0, sink_mask=False)
    every_B = torch.arange(32)

    def distance(model: Answerer) -> float:
        return float(guide.loss(answers(model, pictures, (0,))[1], every_B))

    models = [new_model(pictures) for _ in range(3)]
    untrained = distance(models[0])
    budget = Budget("test", steps=12, batch=16, seed=1)
    guided = [train(model, pictures, pictures, budget, guide) for model in models[:2]]
    plain = train(models[2], pictures, pictures, budget)
    assert distance(models[0]) < min(untrained, distance(models[2]))
    assert guided[0]["curve"] == guided[1]["curve"] != plain["curve"]


def test_image_tokens_are_kept_apart_during_the_check_only(pictures: Pictures) -> None:
    model = new_model(pictures)
    sees_TT = model.sees_TT.clone()
    assert accuracy(model, pictures).keys() == blinded(model, pictures).keys()
    assert (model.sees_TT == sees_TT).all()


def test_a_level_is_reached_on_the_line_between_two_points_or_never() -> None:
    curve = [{"step": 100, "end": 0.5}, {"step": 200, "end": 0.7}, {"step": 300, "end": 0.9}]
    assert steps_to(curve, "end", 0.8) == 250
    assert steps_to(curve, "end", 0.95) is None
