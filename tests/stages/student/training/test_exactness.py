"""Losses and gradients of awkward batches equal those of a textbook, one sample at a time, in float64.

The textbook is eager attention of both models on unpadded samples, whole vocabularies and dense formulas. Its teacher
is once the teacher in the loop, which differs by the rounding of 16-bit codes, and once what is stored, which does not.
"""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoProcessor, LlavaForConditionalGeneration

from stages.attention.capture import enable_capture
from stages.checkpoints.processors import load_processor
from stages.conversations.encoder import ConversationEncoder, EncodedConversation
from stages.images import decode_image
from stages.samples.pack import PackConfig, pack_samples
from stages.student.data.collator import Collator
from stages.student.data.sample_reader import SampleReader
from stages.student.layer_matching import LayerMatching, MatchingConfig, match_layers
from stages.student.losses.head import answer_losses
from stages.student.model.build import build_student
from stages.student.model.student import Student
from stages.student.stage_config import AttentionLoss, DistilledFinetuning
from stages.student.training.forward import decode_windows
from stages.student.training.objective import BatchTotals, DistillationObjective
from storage.codecs.answer_logits import AnswerLogitsCodec
from storage.streaming.stream import StreamConfig, StreamedSample
from storage.targets.store import TargetStore
from tests.checkpoints import draw_random_image, make_tiny_llava, make_tiny_lm
from tests.stages.distilled import TinyData, extract_here
from tests.storage.builders import target_stream

MAX_LENGTH = 150
LAYERS = tuple(range(8))
"""All of the teacher's, so that any part of them can be matched."""
QUESTION, ANSWER = "What is the color of the square?", "The square is red."
CPU = torch.device("cpu")

# Images, then turns.
RECORDS: dict[str, tuple[int, list[str]]] = {
    "text": (0, [QUESTION, ANSWER]),
    "longer-text": (0, ["Describe a circle.", "A circle is left of a triangle.", "And then?", "Red."]),
    "one-image": (1, [f"<image>\n{QUESTION}", ANSWER]),
    "two-images": (2, ["<image>\nIs it red?\n<image>\nAnd this?", "Both are blue."]),
    "image-at-the-end": (1, ["Which caption fits this image?\n<image>", "A: a red square above a blue circle."]),
    "several-turns": (1, [f"<image>\n{QUESTION}", ANSWER, "And the triangle?", "Green.", "Sure?", "Yes, it is green."]),
    "an-image-a-turn": (2, ["<image>\nIs it red?", ANSWER, "<image>\nAnd this?", "It is blue."]),
    "images-after-an-answer": (2, ["Hello.", "Hello, what is it?", "<image>\n<image>\nAre they red?", "Both are."]),
    "cut": (1, [f"<image>\n{QUESTION}", ANSWER, "Say it again and again.", f"{ANSWER} " * 20]),
}
CASES = {
    "text only": ["text", "longer-text"],
    "one image": ["one-image"],
    "several images": ["two-images"],
    "images in several turns": ["an-image-a-turn"],
    "an answer before any image": ["images-after-an-answer"],
    "several turns": ["several-turns"],
    "cut at the maximal length inside an answer": ["cut"],
    "image counts that differ": ["two-images", "text", "one-image", "longer-text", "image-at-the-end"],
    "all at once": list(RECORDS),
}


@dataclass(frozen=True)
class World:
    """A teacher, a student's decoder of 6 layers, and targets of `RECORDS` in one shard, whole and in 16 bits."""

    data: TinyData
    store: TargetStore
    samples: dict[str, StreamedSample]
    matched: MatchingConfig = field(default_factory=lambda: MatchingConfig(num_matched=3))

    @property
    def matching(self) -> LayerMatching:
        return match_layers(6, self.store.manifest, self.matched)[0]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("exactness")
    teacher = make_tiny_llava(folder / "teacher", num_layers=8)
    student_lm = make_tiny_lm(folder / "lm", tokenizer_from=teacher, num_layers=6)
    data = TinyData(teacher, student_lm, folder / "samples")
    write_samples(folder)
    store = extract_here(
        data,
        folder / "targets",
        map_codec="float16",
        logit_codec="float16",
        top_k=1000,
        temperatures=(2.0,),
        layers=LAYERS,
        num_matched=3,
        max_length=MAX_LENGTH,
        cut="tokens",
        answer_attention=True,
    )
    config = StreamConfig(seed=0, shuffle_shards=0, batch_size=len(RECORDS))
    stream = target_stream(data.samples, store, config, rank=0, world_size=1, epoch=0, with_answers=True)
    return World(data, store, {sample.record["id"]: sample for sample in next(iter(stream))})


def write_samples(folder: Path) -> None:
    rng = random.Random(0)
    (folder / "images").mkdir()
    records = []
    for name, (num_images, texts) in RECORDS.items():
        names = [f"{name}-{number}.png" for number in range(num_images)]
        for image in names:
            draw_random_image(rng).save(folder / "images" / image)
        turns = [{"from": ("human", "gpt")[turn % 2], "value": text} for turn, text in enumerate(texts)]
        records.append({"id": name, "conversations": turns} | ({"image": names} if names else {}))
    (folder / "data.json").write_text(json.dumps(records))
    pack_samples(folder / "data.json", folder / "images", folder / "samples", PackConfig())


def new_student(world: World) -> Student:
    """All of decoder, head and post-connector learn, in float64."""
    student = build_student(world.store.teacher_folder(), world.data.student_lm, seed=0).double()
    student.requires_grad_(False)
    for part in (student.model.language_model, student.model.post_connector, student.lm_head):
        part.requires_grad_(True)
    return student


Result = tuple[dict[str, float], dict[str, Tensor]]


def result_of(student: Student, terms: dict[str, Tensor]) -> Result:
    gradients = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    return {name: float(value.detach()) for name, value in terms.items()}, gradients


def trained_on(world: World, names: list[str], stage: DistilledFinetuning) -> Result:
    """What training computes of one batch."""
    student = new_student(world)
    enable_capture(student)
    reader = SampleReader(load_processor(world.store.teacher_folder()), student.config.image_token_id, 10_000)
    batch = Collator(reader)([world.samples[name] for name in names]).to(CPU, torch.float64)
    objective = DistillationObjective(student, stage, world.store.manifest.fingerprint.logit_codec, world.matching)
    loss, terms = objective(batch, BatchTotals(len(batch.answers), batch.num_with_image, batch.num_answers))
    loss.backward()
    return result_of(student, terms)


@dataclass(frozen=True)
class TeacherSide:
    """What the textbook is told of the teacher for one sample: `[R, V]`, `[W, N, N]` and `[W, a, N]`, float64."""

    probs_RV: Tensor
    windows_WNN: Tensor | None
    answers_WaN: Tensor | None


def in_the_loop(world: World) -> Callable[[str, EncodedConversation], TeacherSide]:
    teacher = LlavaForConditionalGeneration.from_pretrained(world.data.teacher, attn_implementation="eager").double()

    def say(_: str, encoded: EncodedConversation) -> TeacherSide:
        with torch.no_grad():
            seen = teacher(**model_inputs(encoded), output_attentions=True)
        probs = seen.logits[0, answer_rows(encoded)].softmax(-1)
        p = encoded.image_positions
        maps = {layer: seen.attentions[layer][0].double().mean(0)[p][:, p] for layer in LAYERS}
        # In 16 bits by definition, so that both sides tell sinks by the same values.
        answers = {layer: answer_vectors(seen.attentions[layer][0], encoded).half() for layer in LAYERS}
        windows, of_answers = (
            torch.stack([torch.stack([of[layer].double() for layer in window]).mean(0) for window in of_matching])
            for of, of_matching in ((maps, world.matching.windows), (answers, world.matching.windows))
        )
        return TeacherSide(probs, windows, of_answers) if len(p) else TeacherSide(probs, None, None)

    return say


def as_stored(world: World) -> Callable[[str, EncodedConversation], TeacherSide]:
    codec = world.store.manifest.fingerprint.logit_codec

    def say(name: str, encoded: EncodedConversation) -> TeacherSide:
        sample = world.samples[name]
        stored = AnswerLogitsCodec(codec).decode(sample.targets.logits_RQ)
        logits = torch.zeros(len(stored), codec.vocab_size, dtype=torch.float64)
        logits.scatter_(1, stored.ids_RK, stored.logprobs_RK.double())
        if sample.maps is None or (stored_LaN := sample.targets.answer_attention_LaN) is None:
            return TeacherSide(logits.softmax(-1), None, None)
        windows = decode_windows([sample.maps], world.matching, CPU).maps_WBNN[:, 0].double()
        answers = [stored_LaN[list(window)].double().mean(0) for window in world.matching.windows]
        return TeacherSide(logits.softmax(-1), windows, torch.stack(answers))

    return say


def model_inputs(encoded: EncodedConversation) -> dict[str, Any]:
    pixels = {name: value.double() for name, value in encoded.pixel_inputs.items()}
    return {"input_ids": encoded.token_ids[None], **pixels}


def answer_rows(encoded: EncodedConversation) -> Tensor:
    return encoded.answer_mask.nonzero()[:, 0] - 1


def answer_vectors(attention_HTT: Tensor, encoded: EncodedConversation) -> Tensor:
    """`[a, N]`: of each answer the mean over heads and its rows of eager attention to the image tokens."""
    found: list[list[int]] = []
    for at in encoded.answer_mask.nonzero()[:, 0].tolist():
        if found and found[-1][-1] == at - 2:
            found[-1].append(at - 1)
        else:
            found.append([at - 1])
    mean_TT = attention_HTT.double().mean(0)
    vectors = [mean_TT[rows][:, encoded.image_positions].mean(0) for rows in found]
    return torch.stack(vectors)


def textbook(
    world: World,
    names: list[str],
    stage: DistilledFinetuning,
    teacher: Callable[[str, EncodedConversation], TeacherSide],
) -> Result:
    student = new_student(world)
    student.set_attn_implementation("eager")
    lm, kd, attention, of_answers, num_rows = [], [], [], [], 0
    for name in names:
        encoded = cut_by_hand(world, name)
        said, own = teacher(name, encoded), student(**model_inputs(encoded), output_attentions=True)
        rows = answer_rows(encoded)
        num_rows += len(rows)
        logits, temperature = own.logits[0, rows], stage.kd_temperature
        lm.append(F.cross_entropy(logits, encoded.token_ids[rows + 1], reduction="sum"))
        softer = said.probs_RV ** (1 / temperature)
        p, q = softer / softer.sum(-1, keepdim=True), (logits / temperature).softmax(-1)
        kd.append(row_losses(p, q, stage.kd_divergence).sum())
        if said.windows_WNN is not None:
            p = encoded.image_positions
            maps = [own.attentions[layer][0].double().mean(0)[p][:, p] for layer in world.matching.student_layers]
            attention.append(sum(pair_loss(a, b, stage) for a, b in zip(maps, said.windows_WNN, strict=True)))
            vectors = [answer_vectors(own.attentions[layer][0], encoded) for layer in world.matching.student_layers]
            for answer in range(len(vectors[0])):
                if float(vectors[0][answer].detach().sum()) == 0:
                    continue
                pairs = zip(vectors, said.answers_WaN, strict=True)
                of_answers.append(sum(vector_loss(a[answer], b[answer], stage) for a, b in pairs))
    terms = {
        "lm": torch.stack(lm).sum() / num_rows,
        "kd": torch.stack(kd).sum() / num_rows,
        "attention": torch.stack(attention).mean() if attention else torch.zeros(()),
    }
    weights = {"lm": stage.lm_weight, "kd": stage.kd_weight, "attention": stage.attention_weight}
    if stage.answer_attention_weight:
        terms["answer_attention"] = torch.stack(of_answers).mean() if of_answers else torch.zeros(())
        weights["answer_attention"] = stage.answer_attention_weight
    terms = {name: value for name, value in terms.items() if weights[name]}
    torch.stack([weights[name] * value for name, value in terms.items()]).sum().backward()
    return result_of(student, terms)


def cut_by_hand(world: World, name: str) -> EncodedConversation:
    """The sample's tokens up to `MAX_LENGTH`, from an encoder that cuts nothing."""
    processor = AutoProcessor.from_pretrained(world.data.teacher)
    encoder = ConversationEncoder(processor, processor.image_token_id, 10**6)
    sample = world.samples[name]
    whole = encoder.encode(sample.record["conversations"], [decode_image(image) for image in sample.images])
    return EncodedConversation(
        whole.token_ids[:MAX_LENGTH], whole.answer_mask[:MAX_LENGTH], whole.pixel_inputs, whole.image_positions
    )


def pair_loss(a: Tensor, b: Tensor, stage: DistilledFinetuning) -> Tensor:
    keep = b > 0
    if stage.attention_sink_mask:
        keep = keep & (a <= a.mean() + a.std()) & (b <= b.mean() + b.std())
    if stage.attention_loss == "row_kl":
        kept = [row for row in range(len(a)) if int(keep[row].sum()) > 1]
        rows = [(a[row][keep[row]], b[row][keep[row]]) for row in kept]
        return torch.stack([kl(b_n / b_n.sum(), a_n / a_n.sum()) for a_n, b_n in rows]).mean()
    return compared(*((m * keep).sum(0) / keep.sum(0).clamp(min=1) for m in (a, b)), stage)


def vector_loss(a_N: Tensor, b_N: Tensor, stage: DistilledFinetuning) -> Tensor:
    keep = b_N > 0
    if stage.attention_sink_mask:
        keep = keep & (a_N <= a_N.mean() + a_N.std()) & (b_N <= b_N.mean() + b_N.std())
    return compared(a_N * keep, b_N * keep, stage)


def compared(a_N: Tensor, b_N: Tensor, stage: DistilledFinetuning) -> Tensor:
    if stage.attention_loss == "cosine":
        return 1 - (a_N @ b_N) / (a_N.norm() * b_N.norm())
    if stage.attention_loss == "mse":
        return (a_N - b_N).square().mean()
    return kl(b_N / b_N.sum(), a_N / a_N.sum())


def row_losses(p: Tensor, q: Tensor, divergence: str) -> Tensor:
    middle = (p + q) / 2
    return {
        "forward": -(p * q.log()).sum(-1),
        "reverse": kl(q, p),
        "symmetric": (kl(p, q) + kl(q, p)) / 2,
        "jensen_shannon": (kl(p, middle) + kl(q, middle)) / 2,
    }[divergence]


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p.clamp(min=1e-300).log() - q.clamp(min=1e-300).log())).sum(-1)


def worst_difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest difference of a gradient, relative to its norm; those that are zero but for rounding are left out."""
    scale = max(float(gradient.norm()) for gradient in expected.values())
    large = {name for name, gradient in expected.items() if float(gradient.norm()) > 1e-4 * scale}
    assert len(large) > 20
    return max(float((found[name] - expected[name]).norm() / expected[name].norm()) for name in large)


def test_the_records_are_what_their_names_say(world: World) -> None:
    assert list(world.samples) == list(RECORDS)
    assert world.matching.stored_masks
    lengths = {name: len(sample.targets.token_ids) for name, sample in world.samples.items()}
    assert [name for name, length in lengths.items() if length == MAX_LENGTH] == ["cut"]
    assert bool(world.samples["cut"].targets.answer_mask[-1]), "the cut is inside an answer"
    maps = {name: sample.maps for name, sample in world.samples.items()}
    assert {name: m.num_tokens for name, m in maps.items() if m is not None} == {
        "one-image": 16, "two-images": 32, "image-at-the-end": 16, "several-turns": 16, "an-image-a-turn": 32,
        "images-after-an-answer": 32, "cut": 16
    }  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_batch_gives_the_losses_and_gradients_of_its_samples_one_by_one(case: str, world: World) -> None:
    stage = DistilledFinetuning(kd_weight=0.7, attention_weight=1.3, answer_attention_weight=0.9)
    terms, gradients = trained_on(world, CASES[case], stage)
    expected_terms, expected = textbook(world, CASES[case], stage, as_stored(world))
    # The library's eager attention takes its softmax in float32.
    assert terms == pytest.approx(expected_terms, rel=2e-6)
    assert worst_difference(gradients, expected) < 1e-5
    expected_terms, expected = textbook(world, CASES[case], stage, in_the_loop(world))
    assert terms == pytest.approx(expected_terms, rel=1e-3)
    assert worst_difference(gradients, expected) < 2e-3


def test_logits_in_many_parts_give_the_losses_and_gradients_of_logits_in_one(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole_terms, whole = trained_on(world, list(RECORDS), DistilledFinetuning())
    vocab_size = world.store.manifest.fingerprint.logit_codec.vocab_size
    monkeypatch.setitem(answer_losses.__kwdefaults__, "logits_at_once", 7 * vocab_size)
    terms, gradients = trained_on(world, list(RECORDS), DistilledFinetuning())
    assert terms == pytest.approx(whole_terms, rel=1e-12)
    assert worst_difference(gradients, whole) < 1e-12


SETTINGS: list[dict[str, Any]] = [
    {"attention_loss": "kl"},
    {"attention_loss": "mse", "attention_weight": 1000.0},
    {"attention_loss": "row_kl"},
    {"attention_sink_mask": False},
    {"attention_sink_mask": False, "attention_loss": "row_kl"},
    {"attention_sink_mask": False, "attention_loss": "kl"},
    {"kd_divergence": "reverse"},
    {"kd_divergence": "symmetric"},
    {"kd_divergence": "jensen_shannon"},
    {"kd_temperature": 2.0},
    {"kd_temperature": 2.0, "kd_divergence": "reverse"},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: ", ".join(f"{k}={v}" for k, v in settings.items()))
def test_settings_of_the_losses_change_what_is_trained_on_as_the_textbook_says(
    settings: dict[str, Any], world: World
) -> None:
    stage = DistilledFinetuning(**settings)
    terms, gradients = trained_on(world, list(RECORDS), stage)
    expected_terms, expected = textbook(world, list(RECORDS), stage, as_stored(world))
    assert terms == pytest.approx(expected_terms, rel=1e-5)
    assert worst_difference(gradients, expected) < 1e-4
    published, _ = trained_on(world, list(RECORDS), DistilledFinetuning())
    changed = "attention" if settings.keys() & {"attention_loss", "attention_sink_mask"} else "kd"
    assert terms[changed] != pytest.approx(published[changed], rel=0.01)


@pytest.mark.parametrize("sink_mask", [True, False])
@pytest.mark.parametrize("kind", ["cosine", "kl", "mse", "row_kl"])
def test_answer_attention_alone_is_learnt_as_the_textbook_says_however_it_is_compared(
    kind: AttentionLoss, sink_mask: bool, world: World
) -> None:
    weight = 1000.0 if kind == "mse" else 1.0
    stage = DistilledFinetuning(
        attention_weight=0, answer_attention_weight=weight, attention_loss=kind, attention_sink_mask=sink_mask
    )
    terms, gradients = trained_on(world, list(RECORDS), stage)
    assert list(terms) == ["lm", "kd", "answer_attention"]
    assert terms["answer_attention"] * weight > 0.01
    expected_terms, expected = textbook(world, list(RECORDS), stage, as_stored(world))
    assert terms == pytest.approx(expected_terms, rel=1e-5)
    assert worst_difference(gradients, expected) < 1e-4
    expected_terms, expected = textbook(world, list(RECORDS), stage, in_the_loop(world))
    assert terms == pytest.approx(expected_terms, rel=1e-3)
    assert worst_difference(gradients, expected) < 2e-3


LAYER_SETTINGS: list[tuple[dict[str, Any], tuple[int, ...], tuple[tuple[int, ...], ...]]] = [
    ({"kind": "one_to_one", "num_matched": 3}, (2, 3, 4), ((0,), (4,), (7,))),
    ({"span": "early"}, (0, 1), ((0, 1), (1, 2))),
    ({"span": "late"}, (4, 5), ((6,), (7,))),
]


@pytest.mark.parametrize(("settings", "layers", "windows"), LAYER_SETTINGS, ids=["one to one", "early", "late"])
def test_other_matched_layers_are_trained_on_as_the_textbook_says(
    settings: dict[str, Any], layers: tuple[int, ...], windows: tuple[tuple[int, ...], ...], world: World
) -> None:
    other = replace(world, matched=MatchingConfig.model_validate(settings))
    assert (other.matching.student_layers, other.matching.windows) == (layers, windows)
    stage = DistilledFinetuning(answer_attention_weight=1)
    terms, gradients = trained_on(other, list(RECORDS), stage)
    expected_terms, expected = textbook(other, list(RECORDS), stage, as_stored(other))
    assert terms == pytest.approx(expected_terms, rel=1e-5)
    assert worst_difference(gradients, expected) < 1e-4
    expected_terms, expected = textbook(other, list(RECORDS), stage, in_the_loop(other))
    assert terms == pytest.approx(expected_terms, rel=1e-3)
    assert worst_difference(gradients, expected) < 2e-3
    published, _ = trained_on(world, list(RECORDS), stage)
    for name in ("attention", "answer_attention"):
        assert terms[name] != pytest.approx(published[name], rel=0.01)
