"""Students that keep their own vision tower and projector: losses by the textbook, refusals, stages.

The textbook takes eager attention of both models, one sample at a time, with inputs from each one's own processor.
"""

import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import functional as F
from transformers import AddedToken, AutoModelForImageTextToText, AutoTokenizer

from stages.attention.capture import enable_capture
from stages.checkpoints.processors import load_processor
from stages.families.registry import family_of
from stages.student.data.collator import Collator
from stages.student.data.sample_reader import SampleReader, resolve_reader_spec
from stages.student.layer_matching import MatchingConfig, match_layers
from stages.student.losses.attention import attention_alignment_loss
from stages.student.losses.logits import logit_distillation_loss
from stages.student.model.loading import load_student
from stages.student.model.student import projector_parameters
from stages.student.stage_config import DistilledFinetuning
from stages.student.training.loop import train_stage
from stages.student.training.objective import BatchTotals, DistillationObjective
from stages.student.training.setup import StageSetup
from stages.student.training.stage_run import StageRun
from stages.student.training.train_config import TrainConfig
from storage.errors import UserError
from storage.samples.sample_set import SampleSet
from storage.streaming.stream import Source, StreamConfig, StreamedSample
from tests.checkpoints import make_tiny_llava, make_tiny_lm
from tests.stages.distilled import TinyData, extract_here
from tests.stages.extracted_families import LAYERS, Extracted, attentions_by_layer, eager, eager_maps, processed
from tests.storage.builders import target_stream
from tests.tiny_families import RECIPES, make_tiny_family
from tests.tiny_newer_recipes import NEWER

FAMILIES = (
    *("qwen2_5_vl", "llava_next", "llava_onevision", "idefics3", "internvl", "qwen3_vl"),
    *(name for name in NEWER if name in RECIPES and family_of(name).why_not_with_own_vision() is None),
)
Extract = Callable[[str], Extracted]


@pytest.fixture(scope="module")
def llava(extract: Extract, tmp_path_factory: pytest.TempPathFactory) -> Extracted:
    """Targets of a LLaVA teacher over the families' samples."""
    folder = tmp_path_factory.mktemp("llava")
    teacher = make_tiny_llava(folder / "teacher", num_layers=4)
    return extracted_by(teacher, extract("qwen2_5_vl").samples, folder / "targets")


def extracted_by(teacher: Path, samples: Path, out: Path) -> Extracted:
    settings = {"layers": LAYERS, "num_matched": 1, "map_codec": "float16", "logit_codec": "float16", "top_k": 1000}
    store = extract_here(TinyData(teacher, teacher, samples), out, **settings)
    return Extracted(teacher, samples, store, {})


def with_another_placeholder(folder: Path) -> Path:
    """A smaller LLaVA of other weights that reads the teacher's tokens, but has an image token of its own."""
    make_tiny_llava(folder, num_layers=3, hidden=16, seed=5, extra_vocab=8)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([AddedToken("<picture>", special=True)])
    number = tokenizer.convert_tokens_to_ids("<picture>")
    tokenizer.save_pretrained(folder)
    for name, key, value in (
        ("config.json", "image_token_index", number),
        ("tokenizer_config.json", "image_token", "<picture>"),
        ("processor_config.json", "image_token", "<picture>"),
    ):
        fields = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**fields, key: value}))
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text().replace("<image>", "<picture>"))
    return folder


def make_student(model_type: str, folder: Path) -> Path:
    if model_type == "llava":
        return with_another_placeholder(folder)
    return make_tiny_family(folder, model_type, seed=7)


def streamed(extracted: Extracted) -> list[StreamedSample]:
    config = StreamConfig(seed=0, shuffle_shards=0, batch_size=5)
    stream = target_stream(extracted.samples, extracted.store, config, rank=0, world_size=1, epoch=0)
    return next(iter(stream))


def stage_run(extracted: Extracted, student: Path, output: Path, initial: Path | None = None, **train: Any) -> StageRun:
    settings = {
        "vision": "own",
        "loader": {"microbatch_size": 2},
        "matching": {"num_matched": 1},
        "lora": {"rank": 4, "alpha": 8},
        **train,
    }
    (name,) = {"dpt", "dft"} & train.keys()
    return StageRun(
        name=name,
        config=TrainConfig.model_validate(settings),
        decoder=str(student),
        initial=initial,
        sources=(Source(SampleSet.open(extracted.samples), extracted.store),),
        output=output,
    )


@pytest.mark.parametrize("model_type", ["llava", *FAMILIES])
def test_cached_losses_and_gradients_are_those_of_the_teacher_in_the_loop(
    model_type: str, llava: Extracted, extract: Extract, tmp_path: Path
) -> None:
    extracted = llava if model_type == "llava" else extract(model_type)
    folder = make_student(model_type, tmp_path / "student")
    samples = streamed(extracted)
    spec = resolve_reader_spec(extracted.store, folder, own_vision=True, kd_weight=1.0)
    assert spec.reader.max_length is None
    fingerprint = extracted.store.manifest.fingerprint
    student = load_student(folder)
    depth = student.config.get_text_config().num_hidden_layers
    matching, _ = match_layers(depth, extracted.store.manifest, MatchingConfig(num_matched=1))
    assert matching.windows == (LAYERS,)

    expected, expected_gradients = textbook(extracted, folder, samples, matching.student_layers[0])
    enable_capture(student)
    # Loader processes that are started afresh get it by pickle.
    batch = pickle.loads(pickle.dumps(Collator(spec.reader)))(samples)
    objective = DistillationObjective(student, DistilledFinetuning(), fingerprint.logit_codec, matching)
    loss, terms = objective(batch, BatchTotals(len(batch.answers), batch.num_with_image))
    loss.backward()
    for name, value in expected.items():
        assert float(terms[name]) == pytest.approx(value, rel=2e-3), name
    found = [parameter.grad for parameter in projector_parameters(student)]
    assert len(found) == len(expected_gradients) > 0
    scale = max(float(gradient.norm()) for gradient in expected_gradients)
    for gradient, wanted in zip(found, expected_gradients, strict=True):
        assert gradient is not None
        assert float((gradient - wanted).norm()) < 5e-3 * scale


def textbook(
    extracted: Extracted, folder: Path, samples: list[StreamedSample], layer: int
) -> tuple[dict[str, float], list[Tensor]]:
    """Loss terms of the batch and the gradients of the student's projector."""
    teacher, student = eager(extracted.checkpoint), eager(folder)
    read_teacher, read_student = load_processor(extracted.checkpoint), load_processor(folder)
    lm, kd, attention = [], [], []
    for sample in samples:
        theirs, own = processed(read_teacher, sample), processed(read_student, sample)
        is_image = theirs["input_ids"][0] == teacher.config.image_token_id
        assert torch.equal(own["input_ids"][0] == student.config.image_token_id, is_image)
        answers = sample.targets.answer_mask.nonzero()[:, 0]
        seen = student(**own, output_attentions=True)
        teacher_maps, teacher_logits = eager_maps(teacher, theirs)
        rows = seen.logits[0, answers - 1]
        lm.append(F.cross_entropy(rows, own["input_ids"][0, answers], reduction="none"))
        kd.append(logit_distillation_loss(rows, teacher_logits[answers - 1]) * len(answers))
        if bool(is_image.any()):
            own_map = attentions_by_layer(student, seen.attentions)[layer][0].mean(0)[is_image][:, is_image]
            attention.append(attention_alignment_loss(own_map[None, None], teacher_maps.mean(0)[None, None]))
    rows = torch.cat(lm)
    terms = {"lm": rows.mean(), "kd": torch.stack(kd).sum() / len(rows), "attention": torch.stack(attention).mean()}
    gradients = torch.autograd.grad(sum(terms.values()), projector_parameters(student))
    return {name: float(value.detach()) for name, value in terms.items()}, list(gradients)


def test_all_of_the_projector_has_a_gradient_whatever_the_batch_holds(extract: Extract, tmp_path: Path) -> None:
    """Processes that train together wait for each one."""
    extracted = extract("llava_onevision")
    folder = make_student("llava_onevision", tmp_path / "student")
    student, _ = StageSetup(stage_run(extracted, folder, tmp_path / "run", dpt={"batch_size": 4})).load()
    collator = Collator(resolve_reader_spec(extracted.store, folder, own_vision=True, kd_weight=1.0).reader)
    codec = extracted.store.manifest.fingerprint.logit_codec
    objective = DistillationObjective(student, DistilledFinetuning(attention_weight=0.0), codec, None)
    samples = {len(sample.images): sample for sample in streamed(extracted)}
    assert samples.keys() == {0, 1, 2}
    for sample in samples.values():
        student.zero_grad()
        loss, _ = objective(collator([sample]), BatchTotals(4, 1))
        loss.backward()
        gradients = [parameter.grad for parameter in projector_parameters(student)]
        assert all(gradient is not None for gradient in gradients)
        assert any(bool(gradient.any()) for gradient in gradients) == bool(sample.images)


@pytest.mark.parametrize("model_type", ["llava", "qwen2_5_vl"])
def test_both_stages_train_what_they_say_and_leave_a_model_of_the_library(
    model_type: str, llava: Extracted, extract: Extract, tmp_path: Path
) -> None:
    extracted = llava if model_type == "llava" else extract(model_type)
    folder = make_student(model_type, tmp_path / "student")
    accelerator = Accelerator(cpu=True)
    rate = {"batch_size": 4, "max_steps": 2, "learning_rate": 1e-2}
    dpt = stage_run(extracted, folder, tmp_path / "dpt", dpt=rate)
    train_stage(dpt, accelerator)
    first = tmp_path / "dpt" / "student"
    dft = stage_run(extracted, folder, tmp_path / "dft", first, dft=rate)
    report = train_stage(dft, accelerator)
    assert set(report.losses) == {"loss", "lm", "kd", "attention"}
    second = tmp_path / "dft" / "student"

    models = [AutoModelForImageTextToText.from_pretrained(place) for place in (folder, first, second)]
    assert {type(model).__module__.split(".")[0] for model in models} == {"transformers"}
    assert "auto_map" not in json.loads((second / "config.json").read_text())
    before, between, after = (model.state_dict() for model in models)
    projector = {
        "llava": "model.multi_modal_projector.",
        "qwen2_5_vl": "model.visual.merger.",
    }[model_type]
    learnt = {name for name in before if not torch.equal(before[name], between[name])}
    assert learnt
    assert all(name.startswith(projector) for name in learnt)
    learnt = {name for name in before if not torch.equal(between[name], after[name])}
    assert {name.startswith(projector) for name in learnt} == {True, False}
    assert all(name.startswith((projector, "model.language_model.layers.")) for name in learnt)
    assert load_processor(second).image_token_id == models[0].config.image_token_id


def test_a_frozen_projector_stays_and_a_stage_that_trains_it_alone_is_refused(extract: Extract, tmp_path: Path) -> None:
    extracted = extract("qwen2_5_vl")
    folder = make_student("qwen2_5_vl", tmp_path / "student")
    rate = {"batch_size": 4, "max_steps": 1, "learning_rate": 1e-2}
    run = stage_run(extracted, folder, tmp_path / "dft", projector="frozen", dft=rate)
    student, _ = StageSetup(run).load()
    assert not any(parameter.requires_grad for parameter in projector_parameters(student))
    assert any(parameter.requires_grad for parameter in student.parameters())
    train_stage(run, Accelerator(cpu=True))
    with pytest.raises(UserError, match="nothing learns in a stage that trains the projector alone"):
        StageSetup(stage_run(extracted, folder, tmp_path / "dpt", projector="frozen", dpt=rate)).load()


def test_another_number_of_image_tokens_is_refused_before_training_and_in_each_batch(
    llava: Extracted, tmp_path: Path
) -> None:
    folder = make_tiny_llava(tmp_path / "student", image_size=48)
    message = r"sample \d{9}: the student makes 36 image tokens of its 1 images, the teacher's targets hold 16"
    with pytest.raises(UserError, match=message):
        StageSetup(stage_run(llava, folder, tmp_path / "run", dft={"batch_size": 4}))
    collator = Collator(resolve_reader_spec(llava.store, folder, own_vision=True, kd_weight=1.0).reader)
    with pytest.raises(UserError, match=message):
        collator(streamed(llava))
    text = [sample for sample in streamed(llava) if not sample.images]
    assert len(collator(text).answers) > 0


def test_a_word_that_is_the_students_image_token_is_refused_with_its_sample(llava: Extracted, tmp_path: Path) -> None:
    folder = with_another_placeholder(tmp_path / "student")
    read = resolve_reader_spec(llava.store, folder, own_vision=True, kd_weight=1.0).reader
    sample = streamed(llava)[0]
    tokens = sample.targets.token_ids.clone()
    tokens[-2] = read.image_token_id
    broken = replace(sample, targets=replace(sample.targets, token_ids=tokens))
    assert len(read(sample).image_positions) == 16
    with pytest.raises(UserError, match=f"sample {sample.key} holds the student's image token {read.image_token_id}"):
        read(broken)


def test_what_cannot_be_such_a_student_is_refused_with_the_reason(
    llava: Extracted, extract: Extract, tmp_path: Path
) -> None:
    gemma = make_tiny_family(tmp_path / "gemma", "gemma3")
    with pytest.raises(UserError, match=r"with a student of type gemma3: its image tokens attend in both directions"):
        resolve_reader_spec(llava.store, gemma, own_vision=True, kd_weight=0.0)
    with pytest.raises(UserError, match=r"with a teacher of type gemma3: its image tokens attend in both directions"):
        resolve_reader_spec(extract("gemma3").store, llava.checkpoint, own_vision=True, kd_weight=0.0)
    with pytest.raises(UserError, match=r"no student can be built for a teacher of type gemma3: its image tokens"):
        resolve_reader_spec(
            extract("gemma3").store,
            make_tiny_lm(tmp_path / "l", tokenizer_from=gemma),
            own_vision=False,
            kd_weight=0.0,
        )
    decoder = make_tiny_lm(tmp_path / "lm", tokenizer_from=llava.checkpoint)
    with pytest.raises(UserError, match=r"is of type qwen2, which has no vision tower of its own"):
        resolve_reader_spec(llava.store, decoder, own_vision=True, kd_weight=1.0)
    with pytest.raises(UserError, match=r"is a whole multimodal model \(llava\); give --vision own"):
        resolve_reader_spec(llava.store, llava.checkpoint, own_vision=False, kd_weight=1.0)


def test_ids_past_the_students_vocabulary_are_refused(llava: Extracted) -> None:
    spec = resolve_reader_spec(llava.store, llava.checkpoint, own_vision=True, kd_weight=1.0)
    short: SampleReader = replace(spec.reader, vocab_size=50)
    with pytest.raises(UserError, match="past the student's vocabulary of 50"):
        short(streamed(llava)[0])
