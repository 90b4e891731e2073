"""Training on logits of a teacher with another tokenizer: textbook losses, refusals, resuming, sums over ranks."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from stages.checkpoints.processors import load_processor
from stages.student.data.batch_transport import flatten
from stages.student.data.collator import Collator
from stages.student.data.sample_reader import ReaderSpec, check_first_samples, resolve_reader_spec
from stages.student.losses.across_tokenizers import SPACINGS
from stages.student.model.build import build_student
from stages.student.model.student import Student
from stages.student.stage_config import Alignment, DistilledFinetuning
from stages.student.training.loop import train_stage
from stages.student.training.objective import BatchTotals, DistillationObjective
from stages.student.training.stage_run import StageRun, TrainingStopped
from stages.student.training.train_config import TrainConfig
from storage.errors import FingerprintMismatch, UserError
from storage.samples.sample_set import SampleSet
from storage.streaming.stream import Source, StreamConfig, StreamedSample
from storage.targets.store import TargetStore
from tests.checkpoints import CHATML, make_foreign_lm
from tests.stages.distilled import TinyData, extract_here, make_tiny_data
from tests.stages.student.losses.test_across_tokenizers import dense_shared, dense_uld
from tests.storage.builders import target_stream

NUM_SAMPLES = 10
WAYS: tuple[Alignment, ...] = ("uld", "shared")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TinyData:
    return make_tiny_data(tmp_path_factory.mktemp("data"), NUM_SAMPLES)


@pytest.fixture(scope="module")
def store(data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> TargetStore:
    """With the teacher's whole vocabulary, so that nothing of its answer rows is lost but rounding."""
    folder = tmp_path_factory.mktemp("targets") / "t"
    size = len(load_processor(data.teacher).tokenizer)
    return extract_here(data, folder, layers=(2, 3), num_matched=1, top_k=size, logit_codec="float16")


@pytest.fixture(scope="module", params=["teacher's template", "its own template"])
def foreign(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    own = "own" in request.param
    return make_foreign_lm(tmp_path_factory.mktemp("foreign") / "lm", CHATML if own else None)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def spec_of(store: TargetStore, foreign: Path, way: Alignment = "uld") -> ReaderSpec:
    return resolve_reader_spec(store, foreign, own_vision=False, kd_weight=1.0, kd_alignment=way)


def streamed(data: TinyData, store: TargetStore) -> list[StreamedSample]:
    config = StreamConfig(seed=0, shuffle_shards=0, batch_size=NUM_SAMPLES)
    return next(iter(target_stream(data.samples, store, config, rank=0, world_size=1, epoch=0)))


def new_student(store: TargetStore, foreign: Path, spec: ReaderSpec) -> Student:
    student = build_student(store.teacher_folder(), foreign, seed=0, image_token_id=spec.reader.image_token_id)
    return student.double()


def textbook(
    data: TinyData, store: TargetStore, foreign: Path, way: Alignment
) -> tuple[Tensor, dict[str, Tensor], int]:
    """KD loss, gradients and number of compared rows, of the teacher itself and of texts that are decoded anew."""
    spec = spec_of(store, foreign, way)
    teacher = LlavaForConditionalGeneration.from_pretrained(data.teacher).double()
    tokenizers = load_processor(store.teacher_folder()).tokenizer, spec.reader.processor.tokenizer
    student, losses = new_student(store, foreign, spec), []
    for sample in streamed(data, store):
        read = spec.reader(sample)
        pixels = {name: value.double() for name, value in read.pixel_inputs.items()}
        stored = sample.targets.token_ids.long()
        with torch.no_grad():
            theirs = teacher(input_ids=stored[None], **pixels).logits[0]
        own = student(input_ids=read.token_ids[None], **pixels).logits[0]
        sides = [
            boundaries(tokenizer, ids, mask)
            for tokenizer, ids, mask in zip(
                tokenizers, (stored, read.token_ids), (sample.targets.answer_mask, read.answer_mask), strict=True
            )
        ]
        for at in sorted(sides[0].keys() & sides[1].keys()):
            (row, with_space), (own_row, own_space) = sides[0][at], sides[1][at]
            p_V, q_V = theirs[row][None], own[own_row][None]
            if way == "uld":
                losses.append(dense_uld(q_V, p_V))
            else:
                end = "<|im_end|>" if (foreign / "chat_template.jinja").is_file() else "</s>"
                pairs = pairs_of(*tokenizers, end, with_space, own_space)
                losses.append(dense_shared(q_V, p_V, {k: v for k, v in pairs.items() if v < q_V.shape[1]}))
    loss = torch.cat(losses).mean()
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in student.named_parameters() if p.grad is not None}, len(losses)


def boundaries(tokenizer, ids: Tensor, mask: Tensor) -> dict[tuple[int, int], tuple[int, bool]]:
    """Of each answer's number and count of characters that are read: the row, and whether a space comes next."""
    found: dict[tuple[int, int], tuple[int, bool]] = {}
    number, text, begins, before = -1, "", 0, -2
    for at in mask.nonzero()[:, 0].tolist():
        if at != before + 1:
            number, text, begins = number + 1, "", at
        before = at
        follows = tokenizer.decode(ids[begins : at + 1])[len(text) :]
        lead = not text.strip() and follows.startswith(" ")
        found[number, len(text.lstrip())] = (at - 1, lead)
        text += follows
    return found


def pairs_of(teacher, student, end: str, with_space: bool, own_space: bool) -> dict[int, int]:
    """Ids whose decoded texts are the same, and the end tokens, which the chat templates write."""
    theirs = student.get_vocab()
    pairs = {}
    for token, number in teacher.get_vocab().items():
        if token == "<|endoftext|>":
            pairs[number] = theirs[end]
            continue
        if with_space and not own_space:
            if not token.startswith("Ġ"):
                continue
            token = token[1:]
        elif own_space and not with_space:
            token = "Ġ" + token
        if token in theirs and token not in ("</s>", "<|im_start|>", "<|im_end|>", "<image>"):
            pairs[number] = theirs[token]
    return pairs


@pytest.mark.parametrize("way", WAYS)
def test_loss_and_gradients_are_those_of_the_teacher_in_the_loop(
    way: Alignment, data: TinyData, store: TargetStore, foreign: Path
) -> None:
    spec = spec_of(store, foreign, way)
    student, codec = new_student(store, foreign, spec), store.manifest.fingerprint.logit_codec
    assert spec.reader.alignment is not None
    shared = spec.reader.alignment.shared_tokens(codec.vocab_size, spec.reader.vocab_size) if way == "shared" else None
    stage = DistilledFinetuning(lm_weight=0.0, attention_weight=0.0, kd_alignment=way)
    objective = DistillationObjective(student, stage, codec, None, shared)
    collator, samples = Collator(spec.reader), streamed(data, store)
    batches = [collator(samples[:3]), collator(samples[3:])]
    totals = BatchTotals(1, 1, 1, sum(len(batch.logits_RQ) for batch in batches))
    kd = torch.zeros((), dtype=torch.float64)
    for batch in batches:
        loss, terms = objective(batch.to(torch.device("cpu"), torch.float64), totals)
        loss.backward()
        kd = kd + terms["kd"]
    expected, gradients, num_compared = textbook(data, store, foreign, way)
    assert num_compared == totals.kd_rows
    assert 0 < num_compared < sum(len(batch.answers) for batch in batches)
    assert sum(batch.num_uncompared for batch in batches) == 0
    assert float(kd) == pytest.approx(float(expected), rel=2e-3)
    found = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    scale = max(float(gradient.norm()) for gradient in gradients.values())
    # An L1 distance has signs for a gradient, and rounding turns those of nearly equal probabilities around.
    bound = 0.15 if way == "uld" else 0.01
    for name, gradient in gradients.items():
        if float(gradient.norm()) > 0.1 * scale:
            assert float((found[name] - gradient).norm()) < bound * float(gradient.norm()), name
    spacings = torch.cat([batch.compared.spacing_A for batch in batches if batch.compared is not None])
    assert set(spacings.tolist()) == {SPACINGS.index((b"", b"")), SPACINGS.index((b" ", b""))}


def run_of(data: TinyData, store: TargetStore, foreign: Path, output: Path, way: Alignment, **settings) -> StageRun:
    stage = {"batch_size": 4, "max_steps": 4, "learning_rate": 1e-2, "kd_alignment": way}
    config = {
        "loader": {"microbatch_size": 2, "num_workers": 0},
        "matching": {"num_matched": 1},
        "lora": {"rank": 4, "alpha": 8},
        "dft": {**stage, **settings},
    }
    source = Source(SampleSet.open(data.samples), store)
    return StageRun("dft", TrainConfig.model_validate(config), str(foreign), None, (source,), output)


@pytest.mark.parametrize("way", WAYS)
def test_a_stage_trains_says_what_was_compared_and_resumes_to_the_same_student(
    way: Alignment, data: TinyData, store: TargetStore, foreign: Path, tmp_path: Path
) -> None:
    accelerator = Accelerator(cpu=True)
    report = train_stage(run_of(data, store, foreign, tmp_path / "whole", way), accelerator)
    assert report.losses.keys() == {"loss", "lm", "kd", "attention"}
    assert report.losses["kd"] > 0
    said = [note for note in report.notes if f"logits were compared (kd_alignment {way})" in note]
    assert len(said) == 1
    assert f"0 of {report.samples} samples had none" in said[0]
    assert any("learns from logits where both have read the same text" in note for note in report.notes)
    assert any(f"of the first samples of {store.store.url}" in note for note in report.notes)
    assert any("tokens are the student's too" in note for note in report.notes) == (way == "shared")

    asked = iter([False, False, True])
    halves = run_of(data, store, foreign, tmp_path / "halves", way)
    with pytest.raises(TrainingStopped):
        train_stage(halves, accelerator, should_stop=lambda: next(asked))
    again = train_stage(halves, accelerator)
    assert (again.losses, again.notes) == (report.losses, report.notes)
    one, other = (load_file(tmp_path / name / "student/model.safetensors") for name in ("whole", "halves"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    with pytest.raises(FingerprintMismatch, match=r"dft\.kd_alignment"):
        train_stage(
            run_of(data, store, foreign, tmp_path / "halves", "uld" if way == "shared" else "shared"), accelerator
        )


def test_without_the_setting_the_refusal_names_it(store: TargetStore, foreign: Path) -> None:
    with pytest.raises(UserError, match="set kd_alignment to uld or shared in every stage with a kd_weight"):
        resolve_reader_spec(store, foreign, own_vision=False, kd_weight=1.0)
    spec = resolve_reader_spec(store, foreign, own_vision=False, kd_weight=0.0, kd_alignment="uld")
    assert spec.reader.alignment is None


def test_a_store_none_of_whose_answers_is_spelled_alike_is_refused(
    data: TinyData, store: TargetStore, foreign: Path
) -> None:
    reader = spec_of(store, foreign).reader
    source = Source(SampleSet.open(data.samples), store)
    num_compared, num_rows = check_first_samples(source, reader)
    assert 0 < num_compared < num_rows
    assert reader.alignment is not None
    unknown = replace(reader.alignment, teacher=(None,) * len(reader.alignment.teacher))
    with pytest.raises(UserError, match=r"none of the \d+ answer rows of the first 10 samples of .* spell no answer"):
        check_first_samples(source, replace(reader, alignment=unknown))


def test_a_sample_without_a_compared_row_is_counted(data: TinyData, store: TargetStore, foreign: Path) -> None:
    reader, samples = spec_of(store, foreign).reader, streamed(data, store)
    empty = replace(samples[0].targets, answer_mask=torch.zeros_like(samples[0].targets.answer_mask))
    batch = Collator(reader)([replace(samples[0], targets=empty), *samples[1:3]])
    assert batch.num_uncompared == 1
    assert batch.compared is not None
    assert len(batch.logits_RQ) == len(batch.compared) > 0
    assert int(batch.compared.student_A.min()) >= int(reader(samples[0]).answer_mask.sum())
    # As a loader process hands it over.
    handed = flatten(batch).restore().compared
    assert handed is not None
    assert all(map(torch.equal, vars(handed).values(), vars(batch.compared).values()))


def test_other_divergences_are_refused_across_tokenizers() -> None:
    with pytest.raises(ValidationError, match="leave it at forward with kd_alignment uld"):
        DistilledFinetuning(kd_alignment="uld", kd_divergence="reverse")


@pytest.mark.parametrize("way", WAYS)
def test_a_student_with_the_teachers_tokenizer_may_be_compared_so_too(
    way: Alignment, data: TinyData, store: TargetStore, tmp_path: Path
) -> None:
    accelerator = Accelerator(cpu=True)
    report = train_stage(run_of(data, store, data.student_lm, tmp_path / way, way, max_steps=1), accelerator)
    same = train_stage(run_of(data, store, data.student_lm, tmp_path / "same", "same", max_steps=1), accelerator)
    assert "(100.0%)" in report.notes[-1]
    if way == "shared":
        assert report.losses["kd"] == pytest.approx(same.losses["kd"], rel=1e-2)
    assert report.losses["lm"] == pytest.approx(same.losses["lm"], rel=1e-6)
    assert json.loads((tmp_path / way / "report.json").read_text())["notes"]
