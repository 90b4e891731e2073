"""Which positions a stage's student has: what the settings say of a new one, what it was begun with of any other."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stages.student.run_folder import STAGE_FILE
from stages.student.training.resume_guard import record_stage
from stages.student.training.setup import StageSetup
from stages.student.training.stage_run import StageRun
from stages.student.training.train_config import TrainConfig
from storage.errors import FingerprintMismatch, UserError
from storage.samples.sample_set import SampleSet
from storage.streaming.stream import Source
from tests.checkpoints import make_tiny_lm
from tests.stages.extracted_families import Extracted


@pytest.fixture(scope="module")
def extracted(extract: Callable[[str], Extracted]) -> Extracted:
    return extract("qwen2_5_vl")


@pytest.fixture(scope="module")
def decoder(extracted: Extracted, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_lm(tmp_path_factory.mktemp("lm"), tokenizer_from=extracted.checkpoint, num_layers=3)


@pytest.fixture
def stage(extracted: Extracted, decoder: Path, tmp_path: Path) -> Callable[..., StageRun]:
    def of(initial: Path | None = None, student: Path = decoder, **settings: Any) -> StageRun:
        config = TrainConfig.model_validate({"matching": {"num_matched": 1}, **settings})
        source = Source(SampleSet.open(extracted.samples), extracted.store)
        return StageRun("dpt", config, str(student), initial, (source,), tmp_path / "dpt")

    return of


def section(setup: StageSetup) -> Any:
    return setup.load()[0].config.mrope_section


def notes(setup: StageSetup) -> list[str]:
    return [note for note in setup.notes if "positions" in note]


def test_a_new_student_has_the_teachers_positions_unless_ordinary_ones_are_asked_for(stage: Any) -> None:
    new, ordinary = StageSetup(stage()), StageSetup(stage(positions="ordinary"))
    assert (section(new), section(ordinary)) == ([1, 1, 1], None)
    assert notes(new) == notes(ordinary) == []


def test_a_stage_begun_before_there_was_the_setting_goes_on_with_ordinary_positions(stage: Any) -> None:
    record_stage(stage())
    path = stage().output / STAGE_FILE
    begun = json.loads(path.read_text())
    assert begun["settings"].pop("positions") == "teacher"
    path.write_text(json.dumps(begun))
    for positions in ("teacher", "ordinary"):
        record_stage(run := stage(positions=positions))
        setup = StageSetup(run)
        assert section(setup) is None
        said = [f"{run.output} was begun before there was train.positions, and goes on with ordinary positions"]
        assert notes(setup) == (said if positions == "teacher" else [])


def test_a_stage_does_not_go_on_with_other_positions(stage: Any) -> None:
    record_stage(stage())
    with pytest.raises(FingerprintMismatch, match=r"differs in: positions\)"):
        record_stage(stage(positions="ordinary"))


@pytest.mark.parametrize("positions", ["teacher", "ordinary"])
def test_a_saved_student_keeps_its_positions(positions: str, stage: Any, tmp_path: Path) -> None:
    setup = StageSetup(stage(positions=positions))
    saved = tmp_path / "saved"
    setup.load()[0].save_pretrained(saved)
    setup.processor.save_pretrained(saved)
    kept = {"teacher": "the teacher's 3D positions", "ordinary": "ordinary positions"}[positions]
    for asked in ("teacher", "ordinary"):
        again = StageSetup(stage(initial=saved, positions=asked))
        assert section(again) == section(setup)
        said = [f"{saved} has {kept} and keeps them; train.positions is for new students"]
        assert notes(again) == ([] if asked == positions else said)


def test_a_decoder_that_cannot_have_them_is_refused_before_it_is_loaded(
    stage: Any, extracted: Extracted, tmp_path: Path
) -> None:
    folder = make_tiny_lm(tmp_path / "lm", tokenizer_from=extracted.checkpoint, num_layers=3)
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] |= {"rope_type": "dynamic", "factor": 2.0}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"depend on the length \(dynamic\).* set train\.positions to ordinary"):
        StageSetup(stage(student=folder))
    assert section(StageSetup(stage(student=folder, positions="ordinary"))) is None
