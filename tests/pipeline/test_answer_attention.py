"""Answer attention from extraction to a student: refusals, resume, several processes, held-out samples."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from pipeline.extraction.config import ExtractConfig
from pipeline.extraction.extract import extract
from pipeline.runtime.interruption import Interrupted
from pipeline.training import train
from stages.student.training.objective import TERMS
from stages.teacher.config import TeacherConfig
from storage.errors import FingerprintMismatch, UserError
from storage.integrity.verify import verify
from storage.targets.store import TargetStore
from tests.conftest import TinyWorld
from tests.pipeline.in_process import without_ray
from tests.pipeline.processes import run_here, tree
from tests.pipeline.runs import run_file
from tests.pipeline.steps import AtEachStep
from tests.pipeline.test_distributed import ONE, TORCHRUN, assert_same_stage, trained
from tests.pipeline.training_kills import weights

LEARN = ("train.dft.answer_attention_weight=0.5",)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def extract_answers(tiny: TinyWorld, out: Path, *, on: bool = True) -> None:
    teacher = TeacherConfig(checkpoint=str(tiny.teacher), batch_size=4, answer_attention=on)
    with without_ray():
        extract(teacher, str(tiny.samples), str(out), ExtractConfig())


@pytest.fixture(scope="module")
def answers(tiny: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with answer attention."""
    out = tmp_path_factory.mktemp("answers") / "store"
    extract_answers(tiny, out)
    return out


@pytest.fixture(scope="module")
def whole(tiny: TinyWorld, answers: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in one go that learns from it."""
    torch.set_num_threads(1)
    output = tmp_path_factory.mktemp("whole") / "run"
    train(run_file(tiny, answers, output, *LEARN), ["dpt", "dft"])
    return output


def metrics(run: Path, stage: str = "dft") -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / stage / "metrics.jsonl").read_text().splitlines()]


def test_shards_that_are_made_again_have_the_same_bytes(tiny: TinyWorld, answers: Path, tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    shutil.copytree(answers, begun)
    for number in (1, 4):
        commit = begun / f"commits/{number:06d}.json"
        shutil.rmtree(begun / json.loads(commit.read_bytes())["path"])
        commit.unlink()
    extract_answers(tiny, begun)
    found, expected = (
        {name: data for name, data in tree(folder).items() if not name.startswith("reports/")}
        for folder in (begun, answers)
    )
    assert found == expected
    assert verify(begun, tiny.samples).findings == ()


def test_a_store_without_it_is_not_gone_on_with_as_one_with_it_nor_the_other_way(
    tiny: TinyWorld, answers: Path, targets: Path
) -> None:
    for folder, on in ((targets, True), (answers, False)):
        before = tree(folder)
        with pytest.raises(FingerprintMismatch, match="answer_attention: stored"):
            extract_answers(tiny, folder, on=on)
        assert tree(folder) == before


def test_a_student_that_asks_for_what_a_store_lacks_is_refused_before_anything_is_written(
    tiny: TinyWorld, targets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = "dft has an answer_attention_weight, but .* holds no answer attention; extract into a new folder"
    with pytest.raises(UserError, match=said):
        train(run_file(tiny, targets, tmp_path / "run", *LEARN), ["dpt", "dft"])
    assert not (tmp_path / "run" / "dpt").exists()
    places = ("--samples", tiny.samples, "--targets", targets, "--student", tiny.student_lm)
    words = ("train-student", *places, "--output", tmp_path / "new", "--set", LEARN[0])
    done = run_here(*words, monkeypatch=monkeypatch, capsys=capsys)
    assert done.code == 2
    assert "holds no answer attention" in " ".join(done.err.split())
    assert not (tmp_path / "new").exists()


def test_the_second_of_two_sources_is_looked_at_too(
    tiny: TinyWorld, answers: Path, targets: Path, tmp_path: Path
) -> None:
    sources = [{"samples": str(tiny.samples), "targets": str(store)} for store in (answers, targets)]
    mixed = f"train.dft.sources={json.dumps(sources)}"
    with pytest.raises(UserError, match=f"dft has an answer_attention_weight, but {targets} holds no answer"):
        train(run_file(tiny, answers, tmp_path / "run", *LEARN, mixed), ["dpt", "dft"])
    # A stage that does not ask for it may mix them.
    train(run_file(tiny, answers, tmp_path / "mixed", mixed), ["dpt", "dft"])
    assert (tmp_path / "mixed/dft/student").is_dir()


def test_the_term_is_in_the_loss_the_metrics_and_the_report(whole: Path) -> None:
    lines = metrics(whole)
    assert all({*TERMS} <= line.keys() for line in lines)
    for line in lines:
        total = line["lm"] + line["kd"] + line["attention"] + 0.5 * line["answer_attention"]
        assert line["loss"] == pytest.approx(total, rel=1e-5)
    assert "answer_attention" not in metrics(whole, "dpt")[0]
    assert "answer_attention" in json.loads((whole / "dft/report.json").read_text())["losses"]


def test_a_large_weight_brings_answers_nearer_to_the_teachers(tiny: TinyWorld, answers: Path, tmp_path: Path) -> None:
    last = []
    for weight in (1e-9, 100.0):
        run = tmp_path / str(weight)
        train(run_file(tiny, answers, run, f"train.dft.answer_attention_weight={weight}"), ["dpt", "dft"])
        last.append(metrics(run)[-1]["answer_attention"])
    assert last[1] < 0.99 * last[0]


def test_a_stage_that_does_not_ask_for_it_learns_as_from_a_store_without(
    tiny: TinyWorld, answers: Path, undisturbed: Path, tmp_path: Path
) -> None:
    train(run_file(tiny, answers, tmp_path / "run"), ["dpt", "dft"])
    assert weights(tmp_path / "run", "dft") == weights(undisturbed, "dft")


def test_a_run_that_is_stopped_goes_on_to_the_same_weights(
    tiny: TinyWorld, answers: Path, whole: Path, tmp_path: Path
) -> None:
    run, done = run_file(tiny, answers, tmp_path / "run", *LEARN), list[tuple[str, int]]()
    with pytest.raises(Interrupted, match="stopped dft after step 3"):
        train(run, ["dpt", "dft"], AtEachStep(lambda *at: done.append(at)), lambda: ("dft", 3) in done)
    train(run, ["dpt", "dft"])
    assert weights(tmp_path / "run", "dft") == weights(whole, "dft")
    with pytest.raises(FingerprintMismatch, match=r"differs in: dft\.answer_attention_weight"):
        train(run_file(tiny, answers, tmp_path / "run", "train.dft.answer_attention_weight=0.4"), ["dft"])


def test_it_is_learnt_alone_without_a_map_being_read(tiny: TinyWorld, answers: Path, tmp_path: Path) -> None:
    # A store whose maps are gone shows that nobody reads them.
    store = tmp_path / "store"
    shutil.copytree(answers, store)
    for number in TargetStore.open(store).commits:
        for file in (store / TargetStore.open(store).commits[number].path / "map_codes/c").rglob("*"):
            if file.is_file():
                file.write_bytes(bytes(file.stat().st_size))
    train(run_file(tiny, store, tmp_path / "run", *LEARN, "train.dft.attention_weight=0"), ["dpt", "dft"])
    assert all({"lm", "kd", "answer_attention"} == line.keys() & {*TERMS} for line in metrics(tmp_path / "run"))


def test_activation_checkpointing_changes_no_step(tiny: TinyWorld, answers: Path, whole: Path, tmp_path: Path) -> None:
    settings = (*LEARN, "train.parallel.activation_checkpointing=true")
    train(run_file(tiny, answers, tmp_path / "run", *settings), ["dpt", "dft"])
    assert [line["loss"] for line in metrics(tmp_path / "run")] == pytest.approx(
        [line["loss"] for line in metrics(whole)], rel=1e-5
    )


def test_the_loss_on_held_out_samples_is_the_mean_over_their_answers(
    tiny: TinyWorld, answers: Path, tmp_path: Path
) -> None:
    held = "train.validation={share: 0.4, every: 2}"
    alone = ("train.dft.max_steps=2", "train.lora.dropout=0.0", "train.loader.microbatch_size=1")
    values = []
    for name, settings in (("one", alone), ("all", alone[:2])):
        train(run_file(tiny, answers, tmp_path / name, *LEARN, held, *settings), ["dpt", "dft"])
        values += [
            line["validation/answer_attention"] for line in metrics(tmp_path / name) if "validation/loss" in line
        ]
    assert len(values) == 2
    assert values[0] == pytest.approx(values[1], rel=1e-4)


@pytest.mark.slow
@pytest.mark.timeout(1000)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_give_the_losses_and_weights_of_one(
    strategy: str, tiny: TinyWorld, answers: Path, tmp_path: Path
) -> None:
    # One sample a process and microbatch: in some steps one process has text alone.
    settings = (*LEARN, "train.stages=[dpt,dft]", "train.loader.microbatch_size=1")
    one = trained(ONE, tiny, answers, tmp_path / "one", *settings)
    two = trained(TORCHRUN, tiny, answers, tmp_path / "two", *settings, f"train.parallel.strategy={strategy}")
    assert_same_stage(two / "dft", one / "dft")
    for ours, theirs in zip(metrics(two), metrics(one), strict=True):
        assert ours["answer_attention"] == pytest.approx(theirs["answer_attention"], rel=1e-4)
