"""What the teacher's answers look at: as eager attention has it, beside maps and logits that keep every bit."""

from pathlib import Path

import pytest
import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration

from stages.conversations.answer_rows import answer_sizes
from stages.conversations.encoder import ConversationEncoder
from stages.images import decode_image
from stages.teacher.config import TeacherConfig
from stages.teacher.teacher import load_teacher
from storage.samples.sample_set import SampleSet
from storage.targets.layout import ANSWER_ARRAYS
from storage.targets.store import TargetStore
from tests.stages.distilled import TinyData, extract_here, make_tiny_data, observe_shard
from tests.storage.builders import files_of

LAYERS = (2, 3, 4)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TinyData:
    return make_tiny_data(tmp_path_factory.mktemp("answers"), num_samples=15)


@pytest.fixture(scope="module")
def store(data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> TargetStore:
    folder = tmp_path_factory.mktemp("store")
    return extract_here(data, folder, layers=LAYERS, num_matched=2, batch_size=4, answer_attention=True)


def test_sizes_are_the_runs_of_the_mask() -> None:
    for text, sizes in (("", ()), ("...", ()), (".11.1", (2, 1)), ("1", (1,)), (".1.111..1", (1, 3, 1))):
        assert answer_sizes(torch.tensor([letter == "1" for letter in text], dtype=torch.bool)) == sizes


def test_stored_rows_are_the_means_of_eager_attention_in_16_bits(data: TinyData, store: TargetStore) -> None:
    eager = LlavaForConditionalGeneration.from_pretrained(data.teacher, attn_implementation="eager").eval()
    encoder = ConversationEncoder(AutoProcessor.from_pretrained(data.teacher), eager.config.image_token_id, 1536)
    samples, seen_sizes = SampleSet.open(data.samples), set()
    for number in store.commits:
        shard = store.shard(number)
        with samples.shard(number) as tar:
            for row in range(len(shard)):
                stored, targets = tar.read(row), shard.read(row, with_answers=True)[0]
                encoded = encoder.encode(stored.record["conversations"], [decode_image(one) for one in stored.images])
                if not len(encoded.image_positions):
                    assert targets.answer_attention_LaN is None
                    continue
                with torch.no_grad():
                    seen = eager(
                        input_ids=encoded.token_ids[None], output_attentions=True, **encoded.pixel_inputs
                    ).attentions
                rows = encoded.answer_mask.nonzero()[:, 0] - 1
                parts = torch.split(rows, list(answer_sizes(encoded.answer_mask)))
                seen_sizes.add(len(parts))
                expected = torch.stack([
                    torch.stack([seen[layer][0].mean(0)[part][:, encoded.image_positions].mean(0) for part in parts])
                    for layer in LAYERS
                ])  # fmt: skip
                found = targets.answer_attention_LaN
                assert found is not None
                assert found.dtype == torch.float16
                torch.testing.assert_close(found.float(), expected, rtol=2**-11, atol=5e-7)
    assert len(seen_sizes) > 1, "conversations of one turn and of several"


def test_all_else_that_is_stored_keeps_every_bit(data: TinyData, store: TargetStore, tmp_path: Path) -> None:
    plain = extract_here(data, tmp_path, layers=LAYERS, num_matched=2, batch_size=4)
    for number, record in plain.commits.items():
        others = {
            name: info
            for name, info in store.commits[number].files.items()
            if name.partition("/")[0] not in {spec.name for spec in ANSWER_ARRAYS}
        }
        assert others == dict(record.files)
        assert (record.format_version, store.commits[number].format_version) == (3, 4)


def test_the_batch_size_changes_no_byte(data: TinyData, store: TargetStore, tmp_path: Path) -> None:
    expected = files_of(Path(store.store.url))
    assert any("answer_attention/c" in name for name in expected)
    for size in (1, 3):
        folder = tmp_path / str(size)
        extract_here(data, folder, layers=LAYERS, num_matched=2, batch_size=size, answer_attention=True)
        assert files_of(folder) == expected


def test_a_sample_whose_answers_look_nowhere_finite_is_in_the_ledger(data: TinyData) -> None:
    settings = TeacherConfig(checkpoint=str(data.teacher), layers=(6,), num_matched=1, answer_attention=True)
    broken = load_teacher(settings)
    with torch.no_grad():
        # Queries of the last layer alone, at rows that no image token comes from.
        broken.model.model.language_model.layers[6].self_attn.q_proj.bias.fill_(torch.nan)
    with SampleSet.open(data.samples).shard(0) as shard:
        seen = observe_shard(broken, shard)
    assert {sample.reason for sample in seen.skipped} == {"not_finite"}
    assert all(sample.answer_attention_LaN is None for sample in seen.samples)
