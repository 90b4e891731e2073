"""Losses and gradients from stored targets equal those with the teacher in the loop.

The online side is an independent one: eager attention of both models, whole vocabularies, the dense definitions,
one sample at a time, no padding.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoProcessor, LlavaForConditionalGeneration

from stages.attention.capture import enable_capture
from stages.checkpoints.processors import load_processor
from stages.conversations.encoder import ConversationEncoder
from stages.images import decode_image
from stages.student.data.collator import Collator
from stages.student.data.sample_reader import SampleReader
from stages.student.layer_matching import LayerMatching, MatchingConfig, match_layers
from stages.student.losses.attention import attention_alignment_loss
from stages.student.losses.logits import logit_distillation_loss
from stages.student.model.build import build_student
from stages.student.model.student import Student
from stages.student.stage_config import DistilledFinetuning
from stages.student.training.objective import BatchTotals, DistillationObjective
from storage.codecs.answer_logits import AnswerLogitsCodec
from storage.codecs.windows import window_means, window_rows
from storage.streaming.stream import StreamConfig, StreamedSample
from storage.targets.store import TargetStore
from tests.stages.distilled import TinyData, extract_here, make_tiny_data
from tests.storage.builders import target_stream

LAYERS = [2, 3, 4, 5, 6]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TinyData:
    return make_tiny_data(tmp_path_factory.mktemp("data"))


def whole_vocabulary(data: TinyData) -> int:
    processor = AutoProcessor.from_pretrained(data.teacher)
    return len(processor.tokenizer) + 100


@pytest.fixture(scope="module")
def store16(data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> TargetStore:
    out = tmp_path_factory.mktemp("targets16")
    return extract_here(
        data,
        out / "t",
        map_codec="float16",
        logit_codec="float16",
        top_k=whole_vocabulary(data),
        layers=LAYERS,
        num_matched=3,
        batch_size=4,
    )


def new_student(data: TinyData, store: TargetStore) -> Student:
    student = build_student(store.teacher_folder(), data.student_lm, seed=0)
    student.requires_grad_(False)
    student.model.language_model.requires_grad_(True)
    student.model.post_connector.requires_grad_(True)
    student.lm_head.requires_grad_(True)
    return student


def streamed(data: TinyData, store: TargetStore, count: int = 10) -> list[StreamedSample]:
    config = StreamConfig(seed=0, shuffle_shards=0, batch_size=count)
    stream = target_stream(data.samples, store, config, rank=0, world_size=1, epoch=0)
    return next(iter(stream))


def cached(
    data: TinyData, store: TargetStore, samples: list[StreamedSample]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Loss terms and gradients of one batch from stored targets."""
    student = new_student(data, store)
    enable_capture(student)
    matching, notes = match_layers(6, store.manifest, MatchingConfig(num_matched=3))
    assert not notes
    collator = Collator(SampleReader(load_processor(store.teacher_folder()), student.config.image_token_id, 10_000))
    batch = collator(samples)
    objective = objective_of(student, store, matching)
    loss, terms = objective(batch, BatchTotals(len(batch.answers), batch.num_with_image))
    loss.backward()
    return {**terms, "loss": loss.detach()}, gradients(student)


def objective_of(student: Student, store: TargetStore, matching: LayerMatching) -> DistillationObjective:
    return DistillationObjective(student, DistilledFinetuning(), store.manifest.fingerprint.logit_codec, matching)


def gradients(student: Student) -> dict[str, Tensor]:
    return {name: p.grad for name, p in student.named_parameters() if p.grad is not None}


def online(
    data: TinyData, store: TargetStore, samples: list[StreamedSample], matching: LayerMatching
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The same with the teacher in the loop, by the textbook."""
    teacher = LlavaForConditionalGeneration.from_pretrained(
        data.teacher, attn_implementation="eager", dtype=torch.float32
    ).eval()
    student = new_student(data, store)
    student.set_attn_implementation("eager")
    encoder = ConversationEncoder(AutoProcessor.from_pretrained(data.teacher), teacher.config.image_token_id, 1536)
    lm: list[Tensor] = []
    kd: list[Tensor] = []
    attention: list[Tensor] = []
    for sample in samples:
        images = [decode_image(image) for image in sample.images]
        encoded = encoder.encode(sample.record["conversations"], images)
        inputs: dict[str, Any] = {"input_ids": encoded.token_ids[None], **encoded.pixel_inputs}
        with torch.no_grad():
            seen = teacher(**inputs, output_attentions=True)
        own = student(**inputs, output_attentions=True)
        answers = encoded.answer_mask.nonzero()[:, 0]
        lm.append(F.cross_entropy(own.logits[0, answers - 1], encoded.token_ids[answers], reduction="sum"))
        kd.append(logit_distillation_loss(own.logits[0, answers - 1], seen.logits[0, answers - 1]) * len(answers))
        p = encoded.image_positions
        if len(p):
            teacher_maps = torch.stack([seen.attentions[layer][0].mean(0)[p][:, p] for layer in LAYERS])
            student_maps = torch.stack([own.attentions[layer][0].mean(0)[p][:, p] for layer in matching.student_layers])
            windows = window_means(teacher_maps, window_rows(LAYERS, matching.windows))
            attention.append(attention_alignment_loss(student_maps[:, None], windows[:, None]))
    rows = sum(int(s.targets.answer_mask.sum()) for s in samples)
    terms = {
        "lm": torch.stack(lm).sum() / rows,
        "kd": torch.stack(kd).sum() / rows,
        "attention": torch.stack(attention).mean(),
    }
    loss = torch.stack(list(terms.values())).sum()
    loss.backward()
    return {name: value.detach() for name, value in {**terms, "loss": loss}.items()}, gradients(student)


def worst_difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest difference of a gradient, relative to its norm; those that are zero but for rounding are left out."""
    assert found.keys() == expected.keys()
    scale = max(float(gradient.norm()) for gradient in expected.values())
    large = {name for name, gradient in expected.items() if gradient.norm() > 1e-4 * scale}
    assert len(large) > 20
    return max(float((found[name] - expected[name]).norm() / expected[name].norm()) for name in large)


def test_the_batch_has_text_only_samples_several_turns_and_shared_images(data: TinyData, store16: TargetStore) -> None:
    samples = streamed(data, store16)
    assert any(not s.images for s in samples)
    assert any(len(s.record["conversations"]) > 2 for s in samples)
    assert len({s.images[0] for s in samples if s.images}) < sum(bool(s.images) for s in samples)


@pytest.mark.parametrize(
    ("codec", "logit_codec", "loss_bound", "gradient_bound"),
    [
        ("float16", "float16", 1e-3, 1e-3),
        ("float16", "levels", 1e-3, 3e-3),
        ("sqrt8", "levels", 1e-3, 5e-3),
        ("auto", "levels", 1e-3, 5e-3),
        ("sqrt4", "levels", 5e-3, 5e-2),
        ("sqrt2", "levels", 5e-2, 2e-1),
    ],
)
def test_stored_targets_give_the_losses_and_gradients_of_the_teacher_in_the_loop(
    codec: str, logit_codec: str, loss_bound: float, gradient_bound: float, data: TinyData, tmp_path: Path
) -> None:
    targets = extract_here(
        data,
        tmp_path / "t",
        map_codec=codec,
        logit_codec=logit_codec,
        top_k=whole_vocabulary(data),
        layers=LAYERS,
        num_matched=3,
        batch_size=4,
    )
    samples = streamed(data, targets)
    matching, _ = match_layers(6, targets.manifest, MatchingConfig(num_matched=3))
    terms, grads = cached(data, targets, samples)
    expected_terms, expected_grads = online(data, targets, samples, matching)
    for name, value in expected_terms.items():
        assert float(terms[name]) == pytest.approx(float(value), rel=loss_bound), name
    assert worst_difference(grads, expected_grads) < gradient_bound


def test_microbatches_of_uneven_answer_lengths_sum_to_the_whole_batch(data: TinyData, store16: TargetStore) -> None:
    samples = streamed(data, store16)
    whole_terms, whole = cached(data, store16, samples)
    student = new_student(data, store16)
    enable_capture(student)
    matching, _ = match_layers(6, store16.manifest, MatchingConfig(num_matched=3))
    collator = Collator(SampleReader(load_processor(store16.teacher_folder()), student.config.image_token_id, 10_000))
    objective = objective_of(student, store16, matching)
    batches = [collator(samples[start : start + 3]) for start in range(0, len(samples), 3)]
    assert len({len(batch.answers) for batch in batches}) > 1
    totals = BatchTotals(sum(len(b.answers) for b in batches), sum(b.num_with_image for b in batches))
    total = torch.zeros(())
    for batch in batches:
        loss, _ = objective(batch, totals)
        loss.backward()
        total += loss.detach()
    assert float(total) == pytest.approx(float(whole_terms["loss"]), rel=1e-5)
    assert worst_difference(gradients(student), whole) < 1e-4


def test_the_vision_tower_in_the_student_is_that_of_the_teacher(data: TinyData, store16: TargetStore) -> None:
    teacher = LlavaForConditionalGeneration.from_pretrained(data.teacher, dtype=torch.float32)
    student = new_student(data, store16)
    state = student.state_dict()
    for name, value in teacher.state_dict().items():
        if "vision_tower" in name or "multi_modal_projector" in name:
            assert torch.equal(state[name], value), name
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        seen = teacher.model.get_image_features(pixel_values=pixels).pooler_output[0]
        own = student.model.get_image_features(pixel_values=pixels).pooler_output[0]
    torch.testing.assert_close(own, student.model.post_connector(seen))


def test_a_students_pixels_are_those_the_teacher_saw(data: TinyData, store16: TargetStore) -> None:
    processor = AutoProcessor.from_pretrained(data.teacher)
    encoder = ConversationEncoder(processor, processor.image_token_id, 1536)
    samples = streamed(data, store16)
    seen = [
        encoder.encode(s.record["conversations"], [decode_image(image) for image in s.images]).pixel_inputs
        for s in samples
    ]
    expected = torch.cat([pixels["pixel_values"] for pixels in seen if pixels])
    collator = Collator(SampleReader(load_processor(store16.teacher_folder()), processor.image_token_id, 10_000))
    assert torch.equal(collator(samples).inputs["pixel_values"], expected)


def test_targets_do_not_depend_on_the_batch_size_but_for_rounding(data: TinyData, tmp_path: Path) -> None:
    one, four = (
        extract_here(data, tmp_path / str(size), map_codec="float16", batch_size=size, max_length=200)
        for size in (1, 4)
    )
    for shard in one.commits:
        a, b = one.shard(shard), four.shard(shard)
        assert a.keys == b.keys
        for row in range(len(a)):
            (left, left_maps), (right, right_maps) = a.read(row), b.read(row)
            assert torch.equal(left.token_ids, right.token_ids)
            assert torch.equal(left.answer_mask, right.answer_mask)
            codec = one.manifest.fingerprint.logit_codec
            ours, theirs = (
                AnswerLogitsCodec(codec).decode(left.logits_RQ),
                AnswerLogitsCodec(codec).decode(right.logits_RQ),
            )
            assert torch.equal(ours.ids_RK[:, 0], theirs.ids_RK[:, 0])
            torch.testing.assert_close(ours.logprobs_RK, theirs.logprobs_RK, atol=1e-2, rtol=1e-2)
            # Drawn at the same addresses; rounding moves a draw to the next token now and then.
            assert float((ours.tail_ids[0] == theirs.tail_ids[0]).float().mean()) > 0.98
            assert (left_maps is None) == (right_maps is None)
            if left_maps is not None and right_maps is not None:
                torch.testing.assert_close(left_maps.codes_LC, right_maps.codes_LC, atol=1e-4, rtol=1e-3)


def test_text_alone_teaches_a_stage_of_the_post_connector_nothing(data: TinyData, store16: TargetStore) -> None:
    student = new_student(data, store16)
    student.requires_grad_(False)
    student.model.post_connector.requires_grad_(True)
    collator = Collator(SampleReader(load_processor(store16.teacher_folder()), student.config.image_token_id, 10_000))
    text = [sample for sample in streamed(data, store16) if not sample.images]
    codec = store16.manifest.fingerprint.logit_codec
    loss, _ = DistillationObjective(student, DistilledFinetuning(), codec, None)(collator(text), BatchTotals(50, 5))
    loss.backward()
    assert float(loss.detach()) > 0
    assert gradients(student).keys() == {"model.post_connector.weight", "model.post_connector.bias"}
    assert not any(bool(gradient.any()) for gradient in gradients(student).values())


def test_batches_of_text_alone_and_of_nothing_name_the_same_terms(data: TinyData, store16: TargetStore) -> None:
    student = new_student(data, store16)
    enable_capture(student)
    matching, _ = match_layers(6, store16.manifest, MatchingConfig(num_matched=3))
    collator = Collator(SampleReader(load_processor(store16.teacher_folder()), student.config.image_token_id, 10_000))
    objective = objective_of(student, store16, matching)
    samples = streamed(data, store16)
    text = [sample for sample in samples if not sample.images]
    names = []
    for part in (samples[:4], text, []):
        loss, terms = objective(collator(part), BatchTotals(50, 5))
        loss.backward()
        names.append(list(terms))
        assert bool(torch.isfinite(loss))
    assert names[0] == names[1] == names[2] == ["lm", "kd", "attention"]
    assert all(bool(torch.isfinite(gradient).all()) for gradient in gradients(student).values())
