"""What goes from rank 0 to the others comes out as it went in."""

import io
import os

import pytest
import torch

from stages.conversations.encoder import EncodedConversation
from stages.teacher.batching import PreparedSample
from stages.teacher.rank_messages import Pass, read_fields, read_pass, write_fields, write_pass


def sample(key: str, *, with_image: bool) -> PreparedSample:
    images = torch.arange(2, 6) if with_image else torch.zeros(0, dtype=torch.long)
    # Of other types, without dimensions, and not in a row.
    pixels = {
        "pixel_values": torch.randn(2, 4, 3).transpose(0, 1),
        "sizes": torch.tensor(7),
        "half": torch.randn(3).bfloat16(),
    }
    encoded = EncodedConversation(
        token_ids=torch.arange(9),
        answer_mask=torch.arange(9) > 6,
        pixel_inputs=pixels if with_image else {},
        image_positions=images,
        num_images=int(with_image),
    )
    cells_X = torch.tensor([0, 0, 1, 1], dtype=torch.int32) if with_image else None
    return PreparedSample(3, key, "id", encoded, f"map of {key}" if with_image else None, cells_X=cells_X)


def test_a_pass_is_read_as_it_was_written() -> None:
    batch = [sample("a", with_image=True), sample("b", with_image=False), sample("c", with_image=True)]
    pipe = io.BytesIO()
    write_pass(pipe, Pass("run_prefixes", batch, {batch[2]}, [1, 0, 0]))
    write_pass(pipe, Pass("run_teacher", batch[1:2]))
    pipe.seek(0)
    found, second, third = read_pass(pipe), read_pass(pipe), read_pass(pipe)
    assert found is not None
    assert second is not None
    assert third is None
    assert (found.name, found.rows) == ("run_prefixes", [1, 0, 0])
    assert list(found.wanted) == [found.batch[2]], "by what it is, not by what it holds"
    assert (second.name, list(second.wanted), len(second.batch)) == ("run_teacher", [], 1)
    for one, other in zip(batch, found.batch, strict=True):
        assert (other.key, other.map_key, other.encoded.num_images) == (one.key, one.map_key, one.encoded.num_images)
        assert (other.num_map_tokens, other.prefix_length) == (one.num_map_tokens, one.prefix_length)
        ours, theirs = ({**vars(each.encoded), **each.encoded.pixel_inputs} for each in (one, other))
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            if isinstance(value, torch.Tensor):
                assert theirs[name].dtype == value.dtype
                assert torch.equal(theirs[name], value), name


@pytest.mark.parametrize("left", [3, 12, 40])
def test_a_pipe_that_is_closed_in_the_middle_of_an_answer_has_none(left: int) -> None:
    pipe = io.BytesIO()
    write_fields(pipe, {"state": "failed", "detail": "x" * 100})
    assert read_fields(io.BytesIO(pipe.getvalue()[:left])) is None


def test_an_answer_larger_than_a_pipe_takes_at_once_is_read_whole() -> None:
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb", buffering=0) as source, os.fdopen(writing, "wb") as target:
        write_fields(target, {"state": "first"})
        write_fields(target, {"state": "x" * 30_000})
        assert read_fields(source) == {"state": "first"}
        assert read_fields(source) == {"state": "x" * 30_000}
