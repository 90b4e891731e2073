from pathlib import Path

import pytest

from benchmarks.extraction import Size
from benchmarks.prefix_reuse import SETS, measure

TINY = Size(layers=3, hidden=16, heads=2, patches=12, batch_size=2)


@pytest.mark.slow
def test_tokens_and_images_are_saved_where_conversations_share_an_image_and_nowhere_else(tmp_path: Path) -> None:
    rows = measure(TINY, (20, 30), tmp_path, repeats=1)
    assert [row["conversations_an_image"] for row in rows] == [data.per_image for data in SETS] == [1, 2.2, 5]
    alone, *shared = rows
    assert alone["decoder_tokens_ratio"] == alone["images_ratio"] == 1
    assert [row["images_ratio"] for row in shared] == [pytest.approx(1 / 2.2), pytest.approx(1 / 5)]
    assert 1 > shared[0]["decoder_tokens_ratio"] > shared[1]["decoder_tokens_ratio"] > 1 / 5
