"""LLaVA with the vision tower of Pixtral, which takes images of any size."""

from pathlib import Path

import pytest
import torch
from transformers.utils import is_torchvision_available

from stages.checkpoints.processors import load_processor
from stages.student.data.collator import Collator
from stages.student.data.sample_reader import resolve_reader_spec
from stages.student.model.build import build_student
from storage.codecs.attention_maps import MapCodec
from storage.streaming.stream import StreamConfig
from tests.checkpoints import make_tiny_lm
from tests.stages.extracted_families import Extracted, eager, eager_maps, extract_family, make_samples, processed
from tests.storage.builders import target_stream
from tests.tiny_newer_recipes import PIXTRAL

pytestmark = pytest.mark.skipif(not is_torchvision_available(), reason="its processor asks for torchvision")


@pytest.fixture(scope="module")
def extracted(tmp_path_factory: pytest.TempPathFactory) -> Extracted:
    folder = tmp_path_factory.mktemp("pixtral")
    return extract_family("llava", make_samples(folder), folder, PIXTRAL)


def test_stored_maps_are_those_of_eager_attention_and_shared_as_in_other_families(extracted: Extracted) -> None:
    model, processor = eager(extracted.checkpoint), load_processor(extracted.checkpoint)
    made_from = extracted.store.manifest.fingerprint
    assert made_from.prefix_reuse
    codec = MapCodec.of_layers(made_from.map_codec, made_from.layers, made_from.windows)
    sizes = set()
    for stored, targets, maps in extracted.with_maps:
        inputs = processed(processor, stored)
        assert targets.token_ids.tolist() == inputs["input_ids"][0].tolist()
        torch.testing.assert_close(codec.decode(maps), eager_maps(model, inputs)[0], atol=1e-5, rtol=1e-3)
        sizes.add(maps.num_tokens)
    assert len(sizes) > 1
    assert (extracted.store.commits[0].num_maps, extracted.store.commits[0].num_map_references) == (3, 4)


def test_a_student_has_the_teachers_image_features_in_a_ragged_batch(extracted: Extracted, tmp_path: Path) -> None:
    decoder = make_tiny_lm(tmp_path / "lm", tokenizer_from=extracted.checkpoint, num_layers=3)
    student = build_student(extracted.store.teacher_folder(), decoder, seed=0).eval()
    spec = resolve_reader_spec(extracted.store, decoder, own_vision=False, kd_weight=1.0)
    config = StreamConfig(seed=0, shuffle_shards=0, batch_size=5)
    samples = next(iter(target_stream(extracted.samples, extracted.store, config, rank=0, world_size=1, epoch=0)))
    batch = Collator(spec.reader)(samples)
    with torch.no_grad():
        together = student.model(**batch.inputs, use_cache=False).last_hidden_state
        for row, sample in enumerate(samples):
            alone = student.model(**Collator(spec.reader)([sample]).inputs, use_cache=False).last_hidden_state[0]
            length = len(sample.targets.token_ids)
            torch.testing.assert_close(together[row, :length], alone[:length], atol=1e-4, rtol=1e-3)
