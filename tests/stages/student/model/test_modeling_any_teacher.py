"""Students of teachers from every family that can have one: the same image features, the losses by the textbook.

The textbook takes eager attention of both models, one sample at a time, with inputs from the library's processor.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig

from stages.attention.capture import enable_capture
from stages.checkpoints.processors import load_processor
from stages.families.registry import FAMILIES, family_of
from stages.student.data.collator import Collator
from stages.student.data.sample_reader import SampleReader
from stages.student.layer_matching import MatchingConfig, match_layers
from stages.student.losses.attention import attention_alignment_loss
from stages.student.model.build import build_student
from stages.student.model.loading import load_student
from stages.student.model.modeling_any_teacher import AnyTeacherStudentForConditionalGeneration
from stages.student.model.student import Student
from stages.student.stage_config import DistilledFinetuning
from stages.student.student_kind import is_student
from stages.student.training.loop import train_stage
from stages.student.training.objective import BatchTotals, DistillationObjective
from stages.student.training.stage_run import StageRun
from stages.student.training.train_config import TrainConfig
from storage.errors import UserError
from storage.samples.sample_set import SampleSet
from storage.streaming.stream import Source, StreamConfig, StreamedSample
from tests.checkpoints import make_tiny_lm
from tests.stages.extracted_families import LAYERS, Extracted, eager, eager_maps, processed
from tests.storage.builders import target_stream
from tests.tiny_families import RECIPES

ABLE = sorted(name for name in RECIPES if FAMILIES[name].why_no_student() is None)
Extract = Callable[[str], Extracted]


def make_student(extracted: Extracted, folder: Path) -> tuple[Student, Path]:
    decoder = make_tiny_lm(folder / "lm", tokenizer_from=extracted.checkpoint, num_layers=3)
    return build_student(extracted.store.teacher_folder(), decoder, seed=0), decoder


def streamed(extracted: Extracted) -> list[StreamedSample]:
    config = StreamConfig(seed=0, shuffle_shards=0, batch_size=5)
    stream = target_stream(extracted.samples, extracted.store, config, rank=0, world_size=1, epoch=0)
    return next(iter(stream))


def collator(extracted: Extracted, student: Student) -> Collator:
    model_type = str(extracted.store.manifest.fingerprint.teacher_config["model_type"])
    processor = load_processor(extracted.store.teacher_folder())
    return Collator(SampleReader(processor, student.config.image_token_id, 10_000, family_of(model_type)))


def image_features_of_teacher(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """What the teacher's decoder is given at the image tokens."""
    seen = []
    hook = model.get_decoder().register_forward_pre_hook(
        lambda _, __, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    with torch.no_grad():
        model(**inputs)
    hook.remove()
    features: Tensor = seen[0][inputs["input_ids"] == model.config.image_token_id]
    return features


def pixels_only(student: Student, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: inputs[name] for name in student.config.pixel_inputs if name in inputs}


@pytest.mark.parametrize("model_type", ABLE)
def test_a_student_sees_the_teachers_image_features(model_type: str, extract: Extract, tmp_path: Path) -> None:
    extracted = extract(model_type)
    student, _ = make_student(extracted, tmp_path)
    assert isinstance(student, AnyTeacherStudentForConditionalGeneration)
    teacher, processor = eager(extracted.checkpoint), load_processor(extracted.checkpoint)
    for stored, *_ in extracted.with_maps:
        inputs = processed(processor, stored)
        seen = image_features_of_teacher(teacher, inputs)
        with torch.no_grad():
            features = student.get_image_features(**pixels_only(student, inputs)).pooler_output
        own = torch.cat([part.flatten(0, -2) for part in ([features] if isinstance(features, Tensor) else features)])
        torch.testing.assert_close(own, student.model.post_connector(seen), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("model_type", ABLE)
def test_a_student_loads_in_the_precision_asked_for_whatever_its_teacher_ran_in(
    model_type: str, extract: Extract, tmp_path: Path
) -> None:
    extracted = extract(model_type)
    # As extraction on a GPU leaves it.
    teacher = shutil.copytree(extracted.store.teacher_folder(), tmp_path / "teacher")
    config = AutoConfig.from_pretrained(teacher)
    for part in (config, config.get_text_config(), config.vision_config):
        part.dtype = torch.bfloat16
    config.save_pretrained(teacher)
    student = build_student(teacher, make_tiny_lm(tmp_path / "lm", tokenizer_from=teacher, num_layers=3), seed=0)
    student.save_pretrained(tmp_path / "student")
    exact = load_student(tmp_path / "student")
    assert {parameter.dtype for parameter in exact.parameters()} == {torch.float32}
    assert all(torch.equal(value, exact.get_parameter(name)) for name, value in student.named_parameters())
    half = load_student(tmp_path / "student", torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("model_type", ABLE)
def test_losses_of_a_ragged_batch_are_those_of_one_sample_at_a_time(
    model_type: str, extract: Extract, tmp_path: Path
) -> None:
    extracted = extract(model_type)
    student, _ = make_student(extracted, tmp_path)
    samples = streamed(extracted)
    matching, _ = match_layers(3, extracted.store.manifest, MatchingConfig(num_matched=1))
    expected = textbook_losses(extracted, student, samples, matching.student_layers[0])
    enable_capture(student)
    batch = collator(extracted, student)(samples)
    assert len({len(positions) for positions in batch.image_positions}) > 2, "counts of image tokens differ"
    codec = extracted.store.manifest.fingerprint.logit_codec
    objective = DistillationObjective(student, DistilledFinetuning(), codec, matching)
    loss, terms = objective(batch, BatchTotals(len(batch.answers), batch.num_with_image))
    for name, value in expected.items():
        assert float(terms[name]) == pytest.approx(float(value), rel=2e-3), name
    loss.backward()
    gradient = student.model.post_connector.weight.grad
    assert gradient is not None
    assert bool(torch.isfinite(gradient).all())
    assert float(gradient.norm()) > 0


def textbook_losses(
    extracted: Extracted, student: Student, samples: list[StreamedSample], layer: int
) -> dict[str, Tensor]:
    teacher, processor = eager(extracted.checkpoint), load_processor(extracted.checkpoint)
    student.set_attn_implementation("eager")
    lm, attention = [], []
    for sample in samples:
        stored, targets, _ = extracted.rows[sample.key]
        inputs = processed(processor, stored)
        ids = inputs["input_ids"]
        with torch.no_grad():
            own = student(input_ids=ids, **pixels_only(student, inputs), output_attentions=True)
        answers = targets.answer_mask.nonzero()[:, 0]
        lm.append(F.cross_entropy(own.logits[0, answers - 1], ids[0, answers], reduction="none"))
        positions = (ids[0] == student.config.image_token_id).nonzero()[:, 0]
        if len(positions):
            teacher_map = eager_maps(teacher, inputs)[0].mean(0)
            student_map = own.attentions[layer][0].mean(0)[positions][:, positions]
            attention.append(attention_alignment_loss(student_map[None, None], teacher_map[None, None]))
    assert len(LAYERS) == 2, "one window of both layers"
    return {"lm": torch.cat(lm).mean(), "attention": torch.stack(attention).mean()}


@pytest.mark.parametrize("model_type", ABLE)
def test_a_saved_student_is_the_same_when_loaded(model_type: str, extract: Extract, tmp_path: Path) -> None:
    student, _ = make_student(extract(model_type), tmp_path)
    student.save_pretrained(tmp_path / "saved")
    assert is_student(tmp_path / "saved")
    again = load_student(tmp_path / "saved")
    found = {**again.state_dict(), **dict(again.named_buffers())}
    for name, tensor in {**student.state_dict(), **dict(student.named_buffers())}.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("model_type", sorted(set(RECIPES) - set(ABLE)))
def test_a_family_that_can_have_no_student_is_refused_with_the_reason(
    model_type: str, extract: Extract, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=rf"{model_type}: .*students can be built for .*idefics3, internvl, .*llava, "):
        make_student(extract(model_type), tmp_path)


@pytest.mark.slow
def test_a_stage_trains_on_tiles_and_generates(extract: Extract, tmp_path: Path) -> None:
    extracted = extract("llava_onevision")
    _, decoder = make_student(extracted, tmp_path)
    config = TrainConfig.model_validate(
        {
            "loader": {"microbatch_size": 2},
            "matching": {"num_matched": 1},
            "dft": {"batch_size": 2, "max_steps": 2, "learning_rate": 1e-3},
        }
    )
    run = StageRun(
        name="dft",
        config=config,
        decoder=str(decoder),
        initial=None,
        sources=(Source(SampleSet.open(extracted.samples), extracted.store),),
        output=tmp_path / "run",
    )
    report = train_stage(run, Accelerator(cpu=True))
    assert report.steps == 2
    assert set(report.losses) >= {"lm", "kd", "attention"}
    student = load_student(tmp_path / "run" / "student").eval()
    processor = load_processor(tmp_path / "run" / "student")
    stored = extracted.with_maps[0][0]
    inputs = processed(processor, stored)
    inputs = {name: value for name, value in inputs.items() if name != "attention_mask"}
    out = student.generate(**inputs, max_new_tokens=3, do_sample=False, pad_token_id=0, eos_token_id=None)
    expected = inputs["input_ids"]
    with torch.no_grad():
        for _ in range(3):
            logits = student(input_ids=expected, **pixels_only(student, inputs), use_cache=False).logits
            expected = torch.cat([expected, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert out.tolist() == expected.tolist()


@pytest.mark.parametrize("model_type", ["qwen2_vl", "idefics3", "llava_next"])
def test_each_of_several_answers_to_one_question_sees_all_its_images(
    model_type: str, extract: Extract, tmp_path: Path
) -> None:
    extracted = extract(model_type)
    student, _ = make_student(extracted, tmp_path)
    processor = load_processor(extracted.checkpoint)
    stored = max((stored for stored, *_ in extracted.with_maps), key=lambda stored: len(stored.images))
    inputs = processed(processor, stored)
    given = {"input_ids": inputs["input_ids"], **pixels_only(student, inputs)}
    ids, pixels = student.eval()._expand_inputs_for_generation(expand_size=3, **given)
    with torch.no_grad():
        expected = student(**given).logits
        found = student(input_ids=ids, **pixels).logits
    torch.testing.assert_close(found, expected.expand(3, -1, -1), atol=1e-5, rtol=1e-4)
    beams = student.generate(**given, num_beams=2, num_return_sequences=2, max_new_tokens=2, pad_token_id=0)
    assert beams.shape[0] == 2
    with pytest.raises(ValueError, match="2 answers each for 3 samples with images; give one sample"):
        student._expand_inputs_for_generation(expand_size=2, input_ids=ids, **pixels)
