"""Samples made ready ahead: in order, bounded, in batches of one length."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import pytest
import torch

from stages.conversations.encoder import EncodedConversation
from stages.teacher import batching
from stages.teacher.batching import BatchSize, LengthBatcher, PreparedSample, prefetch
from storage.targets.commits import SkippedSample


def size_of(value: int) -> BatchSize:
    return BatchSize(value, on_gpu=False)


def sample(row: int, length: int = 40, pixels: int = 0) -> PreparedSample:
    return PreparedSample(
        row=row,
        key=f"k{row}",
        id="",
        encoded=EncodedConversation(
            token_ids=torch.zeros(length, dtype=torch.long),
            answer_mask=torch.zeros(length, dtype=torch.bool),
            pixel_inputs={"pixel_values": torch.zeros(pixels)},
            image_positions=torch.zeros(0, dtype=torch.long),
        ),
        map_key=None,
    )


def slowest_first(row: int) -> PreparedSample:
    time.sleep(0.05 if row == 0 else 0)
    return sample(row)


@pytest.mark.parametrize("make", [sample, slowest_first])
def test_rows_come_in_order_whatever_thread_is_done_first(make: Callable[[int], PreparedSample]) -> None:
    with ThreadPoolExecutor(3) as threads:
        rows = [one.row for one in prefetch(make, 20, threads, size_of(4)) if isinstance(one, PreparedSample)]
    assert rows == list(range(20))


def test_no_more_than_a_bounded_number_of_rows_is_made_ahead() -> None:
    made: list[int] = []

    def make(row: int) -> PreparedSample:
        made.append(row)
        return sample(row)

    with ThreadPoolExecutor(3) as threads:
        rows = prefetch(make, 1000, threads, size_of(5))
        assert [one.key for one in islice(rows, 7)] == [f"k{row}" for row in range(7)]
        time.sleep(0.1)
        assert len(made) <= 7 + batching.PREFETCHED_BATCHES * 5
        rows.close()
    assert len(made) <= 7 + batching.PREFETCHED_BATCHES * 5


def test_an_error_in_a_thread_reaches_whoever_asks_for_the_row() -> None:
    def make(row: int) -> PreparedSample | SkippedSample:
        if row == 3:
            raise OSError("the tar is damaged")
        return sample(row)

    with ThreadPoolExecutor(2) as threads:
        rows = prefetch(make, 10, threads, size_of(2))
        assert len(list(islice(rows, 3))) == 3
        with pytest.raises(OSError, match="the tar is damaged"):
            next(rows)


def test_a_batch_holds_samples_of_one_padded_length_and_each_sample_is_in_one_batch() -> None:
    lengths = [33, 64, 65, 40, 31, 96, 50, 64, 64, 10]
    batcher = LengthBatcher(size_of(3))
    samples = [sample(row, length) for row, length in enumerate(lengths)]
    batches = [batch for one in samples if (batch := batcher.add(one)) is not None]
    batches += batcher.rest()
    assert all(len({one.padded_length for one in batch}) == 1 for batch in batches)
    assert sorted(one.row for batch in batches for one in batch) == list(range(len(lengths)))
    assert [one.row for one in batches[0]] == [0, 1, 3]
    assert {one.padded_length for one in samples} == {32, 64, 96}


def test_when_too_many_samples_wait_the_fullest_length_goes() -> None:
    batcher = LengthBatcher(size_of(20))
    # Nine lengths, one of them twice as frequent as the others.
    held = [batcher.add(sample(row, length=32 * (1 + row % 10 % 9))) for row in range(81)]
    assert [row for row, batch in enumerate(held) if batch] == [79]
    assert {len(one.encoded.token_ids) for one in held[79] or []} == {32}
    assert len(held[79] or []) == 16


def test_when_too_many_pixels_wait_a_batch_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "HELD_BYTES", 4000)
    batcher = LengthBatcher(size_of(50))
    held = [batcher.add(sample(row, pixels=400)) for row in range(3)]
    assert [len(batch or []) for batch in held] == [0, 0, 3]
