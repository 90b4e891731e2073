from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.reproduction import comparison, settings
from benchmarks.reproduction.arms import CLAIMED, EXPLORED, REFERENCES
from benchmarks.reproduction.guide import AttentionGuide, Guide
from benchmarks.reproduction.model import Answerer, DecoderSize, LocalTower
from benchmarks.reproduction.oracle import oracle_maps
from benchmarks.reproduction.scenes import NUM_CELLS, draw_scenes
from benchmarks.reproduction.tower import features
from benchmarks.reproduction.training import Budget, Pictures, answers, train

SMALL = DecoderSize(layers=2, width=32)
COUNTS = {"train": 32, "validation": 16}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of a small world and an untrained teacher."""
    for module in (settings, comparison):
        monkeypatch.setattr(module, "TEACHER", SMALL)
    monkeypatch.setattr(settings, "COUNTS", COUNTS)
    monkeypatch.setattr(comparison, "STUDENT", DecoderSize(layers=2, width=16))
    monkeypatch.setattr(comparison, "STUDENT_BUDGET", {"steps": 4, "batch": 8, "fall_steps": 2})
    monkeypatch.setattr(comparison, "TEST_PICTURES", 8)
    tower = LocalTower(0)
    save_file(tower.state_dict(), tmp_path / "tower.safetensors")
    stored = {split: features(tower, draw_scenes(split, 0, count), 0) for split, count in COUNTS.items()}
    save_file(stored, tmp_path / "features.safetensors")
    save_file(Answerer(SMALL, 14, 0).state_dict(), tmp_path / "teacher.safetensors")
    comparison.targets(tmp_path)
    return tmp_path


def test_targets_are_what_the_teacher_gives_each_training_picture(folder: Path) -> None:
    train_on, _ = settings.pictures_of(folder)
    logits_BRV, maps = answers(settings.load_teacher(folder, 14), train_on, (0, 1))
    stored = load_file(folder / "targets.safetensors")
    assert torch.allclose(stored["logits"], logits_BRV, atol=1e-5)
    for layer, map_BNN in maps.items():
        assert torch.allclose(stored[str(layer)].float(), map_BNN, atol=1e-3)


@pytest.mark.parametrize("arm", ["group, early", "4 bits", "falling to 0 at half"])
def test_explored_arms_train(folder: Path, arm: str) -> None:
    found = comparison.compared_run("validation", folder, arm, 0)
    assert found["steps"] == 4


def test_arms_with_the_same_seed_differ_by_what_they_learn_from(folder: Path) -> None:
    learned: list[torch.Tensor] = []
    for arm in CLAIMED:
        comparison.compared_run("test", folder, arm, 0)
        state = load_file(folder / f"{comparison.run_name('test', arm, 0)}.safetensors")
        learned.append(state["model.decoder.layers.0.self_attn.q_proj.weight"])
    assert not any(torch.equal(a, b) for a, b in combinations(learned, 2))


def test_the_teachers_projector_stays_as_it_is_while_a_student_learns(folder: Path) -> None:
    train_on, held_out = settings.pictures_of(folder)
    teacher = settings.load_teacher(folder, 14)
    student = Answerer(DecoderSize(layers=2, width=16), 14, 0, teacher)
    before = student.adapter[1].weight.clone()  # type: ignore[operator, union-attr]
    train(student, train_on, held_out, Budget("t", steps=2, batch=8, seed=0, fall_steps=1))
    for kept, own in zip(teacher.adapter.parameters(), student.adapter[0].parameters(), strict=True):
        assert torch.equal(kept, own)
    assert not torch.equal(before, student.adapter[1].weight)  # type: ignore[arg-type]


def test_the_weight_of_attention_falls_to_zero() -> None:
    scenes = draw_scenes("train", 0, 4)
    maps_BNN = oracle_maps(torch.from_numpy(scenes.place_B6), NUM_CELLS)
    even_BNN = torch.ones(4, NUM_CELLS, NUM_CELLS).tril() / torch.arange(1, NUM_CELLS + 1)[:, None]
    guide = AttentionGuide({0: lambda rows_B: maps_BNN[rows_B]}, weight=0.5, until=0.5, sink_mask=False)
    first, middle, last = (float(guide.loss({0: even_BNN}, torch.arange(4), share)) for share in (0.0, 0.25, 0.5))
    assert first > 0
    assert middle == pytest.approx(first / 2)
    assert last == 0.0


def test_a_guide_without_anything_adds_nothing() -> None:
    assert Guide().layers == ()
    assert float(Guide().loss(torch.randn(2, 3, 4), {}, torch.arange(2), 0.0)) == 0.0


def test_maps_in_eight_bits_are_near_the_exact_ones_and_in_two_bits_further_away(folder: Path) -> None:
    stored = load_file(folder / "targets.safetensors")["0"][:4].float()
    error = {
        bits: float((comparison._coded(EXPLORED[f"{bits} bits"])(stored) - stored).abs().mean()) for bits in (8, 4, 2)
    }
    assert error[8] < error[4] < error[2] < float(stored.mean())


def test_pictures_of_the_test_split_are_no_pictures_of_another_split() -> None:
    kinds = [draw_scenes(split, settings.SEED, 8).kind_BN for split in ("train", "validation", "test")]
    assert all((a != b).any() for a, b in ((kinds[0], kinds[2]), (kinds[1], kinds[2])))


def test_a_difference_is_taken_seed_by_seed_and_flipped_in_all_ways() -> None:
    def run(end: float) -> dict[str, object]:
        point = {"step": 700, "end_named": end, "middle_named": 0.1}
        reached = {"colour": 1.0, "end": end, "middle": 0.5, "end_named": end, "middle_named": 0.1}
        steps = {"end": None, "end_named": None}
        return {"curve": [point], "reached": reached, "steps_to_level": steps, "processor_s_per_step": 0.1}

    lower, higher = [0.50, 0.80, 0.60, 0.70, 0.65], [0.61, 0.92, 0.70, 0.79, 0.77]
    arms = {
        name: {f"seed {seed}": run(end) for seed, end in enumerate(ends)}
        for name, ends in ((REFERENCES[0], lower), ("oracle", higher))
    }
    found = comparison.summary(arms)
    end = found["differences"][f"oracle - {REFERENCES[0]}"]["end"]
    differences = np.subtract(higher, lower)
    # The quantile of Student's t with 4 degrees of freedom, from a table.
    spread = 2.776 * differences.std(ddof=1) / 5**0.5
    assert end["mean"] == pytest.approx(differences.mean())
    assert end["interval_95"] == pytest.approx([differences.mean() - spread, differences.mean() + spread], abs=1e-4)
    assert end["sign_flip_p"] == 2 / 2**5
    assert found["arms"]["oracle"]["steps_end"]["mean"] == 700
    assert found["arms"]["oracle"]["area_end_named"]["mean"] == pytest.approx(np.mean(higher) / 2)


def test_a_sign_flip_of_differences_around_zero_is_likely() -> None:
    assert comparison.sign_flip_p([1.0, -1.0, 0.5, -0.5]) == 1.0


def test_pictures_know_their_questions() -> None:
    scenes = draw_scenes("train", 0, 2)
    assert len(Pictures.of(features(LocalTower(0), scenes, 0), scenes).questions.kind_R) == 14
