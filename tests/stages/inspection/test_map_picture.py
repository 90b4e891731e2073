import torch

from stages.inspection.map_picture import MAX_LINES, map_picture


def test_a_picture_is_as_dark_as_its_map_is_strong_and_twice_as_wide_as_high() -> None:
    map_NN = torch.zeros(48, 48)
    map_NN[:, :4] = 0.16
    map_NN[24:, 24:28] = 0.04
    lines = map_picture(map_NN, " .:*#")
    assert len(lines) == MAX_LINES
    assert {len(line) for line in lines} == {2 * MAX_LINES}
    assert lines[0] == "##" + " " * 22
    assert lines[-1] == "##" + " " * 10 + "::" + " " * 10


def test_small_maps_have_a_line_for_each_query_and_empty_ones_are_blank() -> None:
    assert map_picture(torch.eye(2), " #") == ["##  ", "  ##"]
    assert map_picture(torch.zeros(3, 3), " #") == [" " * 6] * 3
