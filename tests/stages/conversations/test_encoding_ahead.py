import threading
import time
from collections.abc import Iterator

import pytest

from stages.conversations.encoding_ahead import batches_ahead, encoded_ahead


@pytest.mark.parametrize(("count", "sizes"), [(0, []), (1, [1]), (6, [3, 3]), (7, [3, 3, 1])])
def test_items_come_in_their_order_whatever_takes_longest(count: int, sizes: list[int]) -> None:
    def encode(number: int) -> int:
        time.sleep(0.01 * (number % 3 == 0))
        return number * number

    batches = list(batches_ahead(range(count), encode, 3, 4))
    assert [len(batch) for batch in batches] == sizes
    assert [item for batch in batches for item in batch] == [number * number for number in range(count)]


def test_two_batches_are_taken_at_most_and_in_the_thread_of_the_caller() -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for number in range(20):
            assert threading.current_thread() is threading.main_thread()
            taken.append(number)
            yield number

    batches = batches_ahead(items(), str, 3, 2)
    assert next(batches) == ["0", "1", "2"]
    assert len(taken) == 6
    assert next(batches) == ["3", "4", "5"]
    assert len(taken) == 9
    batches.close()  # type: ignore[attr-defined]


def test_the_first_error_in_order_is_raised_with_its_batch() -> None:
    batches = batches_ahead([4, 2, 0, 1], lambda number: 4 // number, 2, 2)
    assert next(batches) == [1, 2]
    with pytest.raises(ZeroDivisionError):
        next(batches)


def test_one_item_is_asked_for_at_a_time_and_so_many_are_held() -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for number in range(20):
            taken.append(number)
            yield number

    encoded = encoded_ahead(items(), str, 4, 2)
    assert (next(encoded), len(taken)) == ("0", 4)
    assert (next(encoded), len(taken)) == ("1", 5)
    assert list(encoded) == [str(number) for number in range(2, 20)]
