"""Students whose tokenizer is not the teacher's: they read the stored conversations by it, without a logit loss."""

import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

from stages.attention.capture import enable_capture
from stages.checkpoints.processors import load_processor
from stages.families.registry import FAMILIES
from stages.student.data.collator import Collator
from stages.student.data.sample_reader import resolve_reader_spec
from stages.student.layer_matching import MatchingConfig, match_layers
from stages.student.losses.attention import attention_alignment_loss
from stages.student.model.build import build_student
from stages.student.model.loading import load_student
from stages.student.stage_config import DistilledFinetuning
from stages.student.training.loop import train_stage
from stages.student.training.objective import BatchTotals, DistillationObjective
from stages.student.training.setup import StageSetup
from stages.student.training.stage_run import StageRun
from stages.student.training.train_config import TrainConfig
from storage.errors import UserError
from storage.samples.sample_set import SampleSet
from storage.streaming.stream import Source, StreamConfig, StreamedSample
from storage.targets.store import TargetStore
from tests.checkpoints import CHATML, make_foreign_lm, make_tiny_llava
from tests.stages.distilled import TinyData, extract_here, make_tiny_data
from tests.stages.extracted_families import Extracted, eager
from tests.storage.builders import target_stream
from tests.tiny_families import RECIPES

ABLE = sorted(name for name in RECIPES if FAMILIES[name].why_no_student() is None)
Extract = Callable[[str], Extracted]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TinyData:
    return make_tiny_data(tmp_path_factory.mktemp("data"), num_samples=10)


@pytest.fixture(scope="module")
def store(data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> TargetStore:
    folder = tmp_path_factory.mktemp("targets") / "t"
    return extract_here(data, folder, map_codec="float16", layers=(2, 3), num_matched=1, max_length=200)


@pytest.fixture(params=["teacher's template", "plain string template"])
def foreign(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return make_foreign_lm(tmp_path / "foreign", CHATML if "plain" in request.param else None)


def streamed(samples: Path, store: TargetStore, count: int = 10) -> list[StreamedSample]:
    config = StreamConfig(seed=0, shuffle_shards=0, batch_size=count)
    return next(iter(target_stream(samples, store, config, rank=0, world_size=1, epoch=0)))


def test_a_logit_loss_refuses_it_and_names_the_way_out(foreign: Path, store: TargetStore) -> None:
    with pytest.raises(UserError, match=r"(?s)vocabulary entries: .* ids differ.*set kd_weight to 0 in every stage"):
        resolve_reader_spec(store, foreign, own_vision=False, kd_weight=0.5)
    spec = resolve_reader_spec(store, foreign, own_vision=False, kd_weight=0.0)
    assert spec.reader.max_length == 200
    assert "reads with its own and does not learn from logits" in spec.notes[0]


def test_its_tokens_are_the_conversation_with_as_many_image_tokens_as_are_stored(
    foreign: Path, data: TinyData, store: TargetStore
) -> None:
    spec = resolve_reader_spec(store, foreign, own_vision=False, kd_weight=0.0)
    read, tokenizer = spec.reader, spec.reader.processor.tokenizer
    teacher = load_processor(store.teacher_folder()).tokenizer
    plain = json.loads((foreign / "tokenizer_config.json").read_text())
    chatml = (foreign / "chat_template.jinja").is_file()
    end = "<|im_end|>" if chatml else "</s>"
    assert plain["eos_token"] == "</s>"
    for sample in streamed(data.samples, store):
        found = read(sample)
        assert len(found.image_positions) == 16 * len(sample.images)
        assert (
            found.image_positions.tolist() == (found.token_ids == spec.reader.image_token_id).nonzero()[:, 0].tolist()
        )
        answers = [turn["value"] for turn in sample.record["conversations"] if turn["from"] == "gpt"]
        seen = tokenizer.decode(found.token_ids[found.answer_mask])
        assert seen == "".join(f"{'' if chatml else ' '}{answer}{end}" for answer in answers)
        words = tokenizer.decode(found.token_ids[found.token_ids != spec.reader.image_token_id])
        for turn in sample.record["conversations"]:
            assert turn["value"].replace("<image>", "").strip() in words
        assert ("<|im_start|>user" in words) == chatml
        theirs = teacher.decode(sample.targets.token_ids[sample.targets.answer_mask])
        assert [a in theirs for a in answers] == [True] * len(answers)
        assert len(found.token_ids) != len(sample.targets.token_ids)


def test_losses_are_those_of_its_own_tokens_and_the_teachers_maps(
    foreign: Path, data: TinyData, store: TargetStore
) -> None:
    spec = resolve_reader_spec(store, foreign, own_vision=False, kd_weight=0.0)
    samples = streamed(data.samples, store)
    fingerprint = store.manifest.fingerprint
    matching, _ = match_layers(6, store.manifest, MatchingConfig(num_matched=1))
    (layer,) = matching.student_layers

    def student_of() -> torch.nn.Module:
        return build_student(store.teacher_folder(), foreign, seed=0, image_token_id=spec.reader.image_token_id)

    teacher, own = eager(data.teacher), student_of().eval()
    own.set_attn_implementation("eager")
    lm, attention = [], []
    for sample in samples:
        read = spec.reader(sample)
        with torch.no_grad():
            seen = own(input_ids=read.token_ids[None], output_attentions=True, **read.pixel_inputs)
        answers = read.answer_mask.nonzero()[:, 0]
        lm.append(F.cross_entropy(seen.logits[0, answers - 1], read.token_ids[answers], reduction="none"))
        p = read.image_positions
        if len(p):
            maps = [seen.attentions[layer][0].mean(0)[p][:, p]]
            ids = sample.targets.token_ids.long()
            with torch.no_grad():
                theirs = teacher(input_ids=ids[None], output_attentions=True, **read.pixel_inputs).attentions
            where = (ids == teacher.config.image_token_id).nonzero()[:, 0]
            window = torch.stack([theirs[number][0].mean(0)[where][:, where] for number in (2, 3)]).mean(0)
            attention.append(attention_alignment_loss(torch.stack(maps)[:, None], window[None, None]))

    student = student_of()
    enable_capture(student)
    batch = Collator(spec.reader)(samples)
    stage = DistilledFinetuning(kd_weight=0.0)
    objective = DistillationObjective(student, stage, fingerprint.logit_codec, matching)
    _, terms = objective(batch, BatchTotals(len(batch.answers), batch.num_with_image))
    assert terms.keys() == {"lm", "attention"}
    assert float(terms["lm"]) == pytest.approx(float(torch.cat(lm).mean()), rel=1e-4)
    assert float(terms["attention"]) == pytest.approx(float(torch.stack(attention).mean()), rel=1e-3)


def test_the_placeholder_differs_from_every_word_of_the_tokenizer(foreign: Path, store: TargetStore) -> None:
    spec = resolve_reader_spec(store, foreign, own_vision=False, kd_weight=0.0)
    before = PreTrainedTokenizerFast.from_pretrained(foreign).get_vocab()
    assert spec.reader.image_token_id not in before.values()
    assert spec.reader.vocab_size == len(before)


def test_stages_train_on_its_own_tokens_and_the_student_keeps_its_tokenizer(
    foreign: Path, data: TinyData, store: TargetStore, tmp_path: Path
) -> None:
    def run(name: str, initial: Path | None) -> StageRun:
        stage = {"batch_size": 4, "max_steps": 2, "learning_rate": 1e-2, "kd_weight": 0.0}
        settings = {
            "loader": {"microbatch_size": 2},
            "matching": {"num_matched": 1},
            "lora": {"rank": 4, "alpha": 8},
            "dpt": stage,
            "dft": stage,
        }
        return StageRun(
            name=name,  # type: ignore[arg-type]
            config=TrainConfig.model_validate(settings),
            decoder=str(foreign),
            initial=initial,
            sources=(Source(SampleSet.open(data.samples), store),),
            output=tmp_path / name,
        )

    first, second = run("dpt", None), run("dft", tmp_path / "dpt" / "student")
    accelerator = Accelerator(cpu=True)
    report = train_stage(first, accelerator)
    assert "reads with its own and does not learn from logits" in report.notes[0]
    report = train_stage(second, accelerator)
    assert report.losses.keys() == {"loss", "lm", "attention"}
    saved = tmp_path / "dft" / "student"
    begun, ended = (resolve_reader_spec(store, place, own_vision=False, kd_weight=0.0) for place in (foreign, saved))
    assert load_student(saved).config.image_token_id == begun.reader.image_token_id == ended.reader.image_token_id
    for sample in streamed(data.samples, store):
        assert torch.equal(begun.reader(sample).token_ids, ended.reader(sample).token_ids)
    with pytest.raises(UserError, match="set kd_weight to 0"):
        StageSetup(replace(second, config=TrainConfig()))


def test_a_sample_that_its_tokens_make_too_long_is_named(foreign: Path, data: TinyData, store: TargetStore) -> None:
    spec = resolve_reader_spec(store, foreign, own_vision=False, kd_weight=0.0)
    sample = next(sample for sample in streamed(data.samples, store) if sample.images)
    with pytest.raises(UserError, match=rf"sample {sample.key} cannot be read by the student's own tokenizer: image_"):
        replace(spec.reader, max_length=12)(sample)


def test_an_answer_that_only_its_tokens_make_too_long_is_read_up_to_max_length(
    foreign: Path, data: TinyData, store: TargetStore
) -> None:
    spec = resolve_reader_spec(store, foreign, own_vision=False, kd_weight=0.0)
    assert spec.reader.cut == store.manifest.fingerprint.cut == "whole_turns"
    sample = next(sample for sample in streamed(data.samples, store) if sample.images)
    whole = spec.reader(sample)
    first, length = int(whole.answer_mask.nonzero()[0]), len(whole.token_ids)
    read = replace(spec.reader, max_length=first + 1)(sample)
    assert torch.equal(read.token_ids, whole.token_ids[: first + 1])
    assert int(read.answer_mask.sum()) == 1
    assert len(replace(spec.reader, max_length=length)(sample).token_ids) == length


def test_a_template_of_parts_is_used_as_it_is(data: TinyData, store: TargetStore, tmp_path: Path) -> None:
    template = (make_tiny_llava(tmp_path / "other") / "chat_template.jinja").read_text().replace("USER: ", "Human: ")
    folder = make_foreign_lm(tmp_path / "foreign", template)
    spec = resolve_reader_spec(store, folder, own_vision=False, kd_weight=0.0)
    assert spec.reader.processor.chat_template == template
    read = spec.reader(streamed(data.samples, store)[0])
    assert spec.reader.processor.tokenizer.decode(read.token_ids).startswith("Human: ")


@pytest.mark.parametrize("model_type", ABLE)
def test_every_family_of_teachers_can_teach_it(model_type: str, extract: Extract, tmp_path: Path) -> None:
    extracted = extract(model_type)
    folder = make_foreign_lm(tmp_path / "foreign", CHATML, num_layers=3)
    spec = resolve_reader_spec(extracted.store, folder, own_vision=False, kd_weight=0.0)
    reader = replace(spec.reader, vocab_size=1000)
    student = build_student(extracted.store.teacher_folder(), folder, seed=0, image_token_id=spec.reader.image_token_id)
    student.resize_token_embeddings(1000)
    collator = pickle.loads(pickle.dumps(Collator(reader)))
    for sample in streamed(extracted.samples, extracted.store, count=5):
        batch = collator([sample])
        stored = sample.targets.token_ids == spec.reader.stored_image_id
        assert len(batch.image_positions[0]) == int(stored.sum())
        with torch.no_grad():
            hidden = student.model(**batch.inputs, use_cache=False).last_hidden_state
        assert bool(torch.isfinite(hidden).all())
