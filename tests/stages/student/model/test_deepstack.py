"""Students of teachers that add features of earlier vision layers to image tokens inside the decoder (Qwen3-VL)."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import AutoConfig
from transformers.models.qwen2.modeling_qwen2 import Qwen2Model

from stages.checkpoints.processors import load_processor
from stages.export.export import export_student
from stages.student.data.collator import Collator
from stages.student.data.sample_reader import resolve_reader_spec
from stages.student.model.build import build_student, check_decoder
from stages.student.model.loading import load_multimodal, load_student
from stages.student.model.student import projector_parameters
from stages.student.training.loop import train_stage
from stages.student.training.stage_run import StageRun
from stages.student.training.train_config import TrainConfig
from storage.errors import UserError
from storage.samples.sample_set import SampleSet
from storage.streaming.stream import Source, StreamConfig, StreamedSample
from tests.checkpoints import make_tiny_llava, make_tiny_lm
from tests.stages.extracted_families import Extracted, eager, processed
from tests.stages.student.model.rotary_textbook import positions_by_hand, rotary_by_hand, sizes_of
from tests.storage.builders import target_stream

Extract = Callable[[str], Extracted]


@pytest.fixture(params=["qwen3_vl", "qwen3_vl_moe"])
def extracted(request: pytest.FixtureRequest, extract: Extract) -> Extracted:
    return extract(request.param)


def make_student(extracted: Extracted, folder: Path, *, begun: bool = True) -> Any:
    """A student whose connectors have learnt something, unless `begun` is False."""
    decoder = make_tiny_lm(folder / "lm", tokenizer_from=extracted.checkpoint, num_layers=3)
    student = build_student(extracted.store.teacher_folder(), decoder, seed=0).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in student.model.deepstack_connectors.parameters() if begun else ():
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    return student


def given_to_the_teachers_decoder(extracted: Extracted, inputs: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
    """What stands at the image tokens of its decoder, and what its first layers add there."""
    teacher, seen = eager(extracted.checkpoint), []
    hook = lambda _, __, kwargs: seen.append(kwargs)  # noqa: E731
    teacher.get_decoder().register_forward_pre_hook(hook, with_kwargs=True)
    with torch.no_grad():
        teacher(**inputs)
    is_image = inputs["input_ids"] == teacher.config.image_token_id
    return seen[0]["inputs_embeds"][is_image], seen[0]["deepstack_visual_embeds"]


def textbook(
    student: Any, ids: Tensor, features: Tensor, levels: list[Tensor], sizes: Sequence[tuple[int, int]]
) -> Tensor:
    """Last hidden states, layer by layer; `forward` of a layer is called past its hooks."""
    model = student.model.language_model
    at = (ids[0] == student.config.image_token_id).nonzero()[:, 0]
    hidden = model.embed_tokens(ids.masked_fill(ids == student.config.image_token_id, 0))
    hidden[0, at] = student.model.post_connector(features)
    positions = torch.arange(ids.shape[1])[None]
    in_3d = positions_by_hand(ids[0].tolist(), student.config.image_token_id, sizes)
    rotary = [part[None].float() for part in rotary_by_hand(in_3d, student.config.mrope_section, interleaved=True)]
    for number, layer in enumerate(model.layers):
        hidden = layer.forward(hidden, attention_mask=None, position_ids=positions, position_embeddings=rotary)
        if number < len(levels):
            hidden[0, at] += student.model.deepstack_connectors[number](levels[number])
    return model.norm(hidden)


def test_the_first_layers_add_the_teachers_features_to_image_tokens(extracted: Extracted, tmp_path: Path) -> None:
    student, processor = make_student(extracted, tmp_path), load_processor(extracted.checkpoint)
    levels = student.config.teacher_config.vision_config.deepstack_visual_indexes
    assert len(student.model.deepstack_connectors) == student.config.deepstack == len(levels)
    for stored, *_ in extracted.with_maps:
        inputs = processed(processor, stored)
        pixels = {name: inputs[name] for name in student.config.pixel_inputs}
        with torch.no_grad():
            found = student.model(input_ids=inputs["input_ids"], **pixels, use_cache=False).last_hidden_state
            features, levels = given_to_the_teachers_decoder(extracted, inputs)
            sizes = sizes_of(student, inputs)
            expected = textbook(student, inputs["input_ids"], features, levels, sizes)
            without = textbook(student, inputs["input_ids"], features, [], sizes)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(without, expected, atol=1e-2)


def test_a_new_student_begins_without_them_and_all_its_connectors_learn(extracted: Extracted, tmp_path: Path) -> None:
    student = make_student(extracted, tmp_path, begun=False)
    assert not any(bool(parameter.any()) for parameter in student.model.deepstack_connectors.parameters())
    names = {id(parameter): name for name, parameter in student.named_parameters()}
    found = {names[id(parameter)].split(".")[1] for parameter in projector_parameters(student)}
    assert found == {"post_connector", "deepstack_connectors"}


def test_a_ragged_batch_gives_each_sample_its_own(extracted: Extracted, tmp_path: Path) -> None:
    student, processor = make_student(extracted, tmp_path), load_processor(extracted.checkpoint)
    spec = resolve_reader_spec(extracted.store, tmp_path / "lm", own_vision=False, kd_weight=1.0)
    samples = streamed(extracted)
    batch = Collator(spec.reader)(samples)
    with torch.no_grad():
        together = student.model(**batch.inputs, use_cache=False).last_hidden_state
        for row, sample in enumerate(samples):
            inputs = processed(processor, extracted.rows[sample.key][0])
            pixels = {name: inputs[name] for name in student.config.pixel_inputs if name in inputs}
            alone = student.model(input_ids=inputs["input_ids"], **pixels, use_cache=False).last_hidden_state[0]
            torch.testing.assert_close(together[row, : len(alone)], alone, atol=1e-4, rtol=1e-3)


def streamed(extracted: Extracted) -> list[StreamedSample]:
    config = StreamConfig(seed=0, shuffle_shards=0, batch_size=5)
    return next(iter(target_stream(extracted.samples, extracted.store, config, rank=0, world_size=1, epoch=0)))


def test_stages_train_the_connectors_and_what_is_saved_and_exported_answers_the_same(
    extracted: Extracted, tmp_path: Path
) -> None:
    make_student(extracted, tmp_path)
    settings = {
        "loader": {"microbatch_size": 2},
        "matching": {"num_matched": 1},
        "lora": {"rank": 4, "alpha": 8},
        "dpt": {"batch_size": 2, "max_steps": 2, "learning_rate": 1e-2},
        "dft": {"batch_size": 2, "max_steps": 2, "learning_rate": 1e-2},
    }
    initial = None
    for name in ("dpt", "dft"):
        run = StageRun(
            name=name,
            config=TrainConfig.model_validate(settings),
            decoder=str(tmp_path / "lm"),
            initial=initial,
            sources=(Source(SampleSet.open(extracted.samples), extracted.store),),
            output=tmp_path / name,
        )
        train_stage(run, Accelerator(cpu=True))
        initial = tmp_path / name / "student"
        learnt = load_student(initial).model.deepstack_connectors
        assert all(bool(parameter.any()) for parameter in learnt.parameters())
    assert export_student(tmp_path / "dft" / "student", tmp_path / "out").post_connector == "kept"
    student, exported = load_student(tmp_path / "dft" / "student").eval(), load_multimodal(tmp_path / "out").eval()
    inputs = processed(load_processor(extracted.checkpoint), extracted.with_maps[0][0])
    pixels = {name: inputs[name] for name in student.config.pixel_inputs}
    ids = inputs["input_ids"]
    out = exported.generate(input_ids=ids, **pixels, max_new_tokens=3, do_sample=False, eos_token_id=None)
    with torch.no_grad():
        for _ in range(3):
            logits = student(input_ids=ids, **pixels, use_cache=False).logits
            ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], 1)
    assert out.tolist() == ids.tolist()


def test_activation_checkpointing_changes_no_gradient(extracted: Extracted, tmp_path: Path) -> None:
    student = make_student(extracted, tmp_path).train()
    spec = resolve_reader_spec(extracted.store, tmp_path / "lm", own_vision=False, kd_weight=1.0)
    inputs = Collator(spec.reader)(streamed(extracted)).inputs
    gradients = []
    for again in (False, True):
        if again:
            student.activation_checkpointing_enable({"use_reentrant": False})
        student.zero_grad()
        student.model(**inputs, use_cache=False).last_hidden_state.square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in projector_parameters(student)])
    assert all(bool(gradient.any()) for gradient in gradients[0])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_a_decoder_with_fewer_layers_is_refused(tmp_path: Path) -> None:
    folder = make_tiny_lm(tmp_path / "lm", tokenizer_from=make_tiny_llava(tmp_path / "teacher"), num_layers=3)
    config = AutoConfig.from_pretrained(folder)
    check_decoder(folder, config, deepstack=3)
    with pytest.raises(UserError, match=r"of type qwen2, whose first 4 layers cannot be given the features"):
        check_decoder(folder, config, deepstack=4)


def test_a_decoder_whose_layers_are_not_told_is_refused_before_and_while_it_runs(
    extract: Extract, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extracted = extract("qwen3_vl")
    student = make_student(extracted, tmp_path)
    plain = Qwen2Model.forward
    monkeypatch.setattr(Qwen2Model, "forward", lambda self, deepstack=None, **kwargs: plain(self, **kwargs))
    with pytest.raises(UserError, match=r"or does not hand on what they are called with; name another decoder"):
        resolve_reader_spec(extracted.store, tmp_path / "lm", own_vision=False, kd_weight=0.0)
    inputs = processed(load_processor(extracted.checkpoint), extracted.with_maps[0][0])
    pixels = {name: inputs[name] for name in student.config.pixel_inputs}
    with pytest.raises(ValueError, match="are not given the features that they are to add"):
        student.model(input_ids=inputs["input_ids"], **pixels)
