"""Which answers of a sample are learnt from, and what a batch of them holds."""

import torch
from torch import Tensor

from stages.conversations.encoder import EncodedConversation
from stages.student.data.answer_targets import answer_targets
from stages.student.data.batch import Batch
from stages.student.data.batch_transport import flatten
from stages.student.data.collator import Collator
from stages.student.data.sample_reader import resolve_reader_spec
from storage.streaming.order import StreamConfig
from storage.targets.store import TargetStore
from tests.checkpoints import make_foreign_lm
from tests.stages.distilled import extract_here, make_tiny_data
from tests.storage.builders import target_stream


def conversation(text: str) -> EncodedConversation:
    """`a` is a token of an answer, `i` an image token."""
    mask = torch.tensor([letter == "a" for letter in text], dtype=torch.bool)
    images = torch.tensor([n for n, letter in enumerate(text) if letter == "i"], dtype=torch.long)
    return EncodedConversation(torch.arange(len(text)), mask, {}, images)


def stored(num_answers: int, num_tokens: int) -> Tensor:
    """`[1, a, N]`; the values name the answer."""
    return torch.arange(num_answers).half()[None, :, None].expand(1, num_answers, num_tokens)


def test_answers_are_paired_in_order_and_their_rows_are_one_before_their_tokens() -> None:
    found = answer_targets(conversation("..ii..aa..aaa"), stored(2, 2))
    assert found is not None
    assert (found.rows_U.tolist(), found.sizes) == ([5, 6, 9, 10, 11], (2, 3))
    assert found.stored_LaN[0, :, 0].tolist() == [0, 1]


def test_an_answer_before_any_image_is_left_out_and_one_between_two_stays() -> None:
    found = answer_targets(conversation("..aa.ii.a.i.aa"), stored(3, 3))
    assert found is not None
    assert (found.rows_U.tolist(), found.sizes) == ([7, 11, 12], (1, 2))
    assert found.stored_LaN[0, :, 0].tolist() == [1, 2]


def test_a_student_that_reads_an_answer_more_or_less_pairs_the_others() -> None:
    read = conversation("i.a.a.a")
    for num_stored, sizes in ((2, (1, 1)), (3, (1, 1, 1)), (4, (1, 1, 1))):
        found = answer_targets(read, stored(num_stored, 1))
        assert found is not None
        assert found.sizes == sizes
        assert found.stored_LaN.shape == (1, len(sizes), 1)


def test_samples_without_images_answers_or_stored_attention_have_none() -> None:
    assert answer_targets(conversation("..aa"), stored(1, 0)) is None
    assert answer_targets(conversation("..ii"), stored(0, 2)) is None
    assert answer_targets(conversation("ii.a"), None) is None
    assert answer_targets(conversation(".a.i"), stored(1, 1)) is None


def test_a_batch_carries_them_through_a_loader_and_counts_them(tmp_path) -> None:
    data = make_tiny_data(tmp_path, num_samples=10)
    extract_here(data, tmp_path / "t", layers=(2, 3), num_matched=1, answer_attention=True)
    store = TargetStore.open(tmp_path / "t")
    config = StreamConfig(seed=0, shuffle_shards=0, batch_size=10)
    (samples,) = target_stream(data.samples, store, config, with_maps=False, with_answers=True)
    spec = resolve_reader_spec(store, data.student_lm, own_vision=False, kd_weight=0)
    batch = Collator(spec.reader)(samples)
    turns = [len(sample.record["conversations"]) // 2 for sample in samples if sample.images]
    assert len(set(turns)) > 1
    assert batch.num_answers == sum(turns)
    assert batch.num_with_image == 0, "maps were not read"
    assert [one is None for one in batch.answer_targets] == [not sample.images for sample in samples]
    there: Batch = flatten(batch).restore()
    for one, other in zip(batch.answer_targets, there.answer_targets, strict=True):
        if one is not None:
            assert other is not None
            assert torch.equal(one.stored_LaN, other.stored_LaN)
            assert torch.equal(one.rows_U, other.rows_U)
            assert one.sizes == other.sizes
    # Without them the batch is as it always was.
    (plain,) = target_stream(data.samples, store, config)
    assert Collator(spec.reader)(plain).answer_targets == (None,) * 10


def test_a_student_with_its_own_tokenizer_has_the_same_answers_in_its_own_rows(tmp_path) -> None:
    data = make_tiny_data(tmp_path, num_samples=10)
    extract_here(data, tmp_path / "t", layers=(2, 3), num_matched=1, max_length=200, answer_attention=True)
    store = TargetStore.open(tmp_path / "t")
    config = StreamConfig(seed=0, shuffle_shards=0, batch_size=10)
    (samples,) = target_stream(data.samples, store, config, with_answers=True)
    foreign = make_foreign_lm(tmp_path / "foreign", None)
    own = Collator(resolve_reader_spec(store, foreign, own_vision=False, kd_weight=0).reader)(samples)
    same = Collator(resolve_reader_spec(store, data.student_lm, own_vision=False, kd_weight=0).reader)(samples)
    assert own.num_answers == same.num_answers > 0
    both = zip(own.answer_targets, same.answer_targets, strict=True)
    pairs = [(ours, theirs) for ours, theirs in both if ours is not None and theirs is not None]
    assert all(torch.equal(ours.stored_LaN, theirs.stored_LaN) for ours, theirs in pairs)
    assert any(ours.sizes != theirs.sizes for ours, theirs in pairs)
