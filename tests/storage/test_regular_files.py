"""Which links out of a folder are followed."""

from pathlib import Path

import pytest

from storage.regular_files import stays_inside


@pytest.mark.parametrize("root", ["snapshots/abc", "snapshots/abc/data", "snapshots/abc/a/b"])
@pytest.mark.parametrize(
    ("target", "is_inside"),
    [
        ("blobs/0123", True),
        ("blobs", False),
        ("blobs/a/0123", False),
        ("refs/main", False),
        ("snapshots/other/x.jpg", False),
        ("../datasets--b/blobs/0123", False),
    ],
)
def test_a_snapshot_of_the_hub_links_to_the_blobs_of_its_own_data_set_only(
    root: str, target: str, is_inside: bool, tmp_path: Path
) -> None:
    hub = tmp_path / "datasets--a"
    folder, file = hub / root, (hub / target).resolve()
    folder.mkdir(parents=True)
    link = folder / "x.jpg"
    link.symlink_to(file)
    assert stays_inside(link.resolve(), folder) == is_inside


def test_blobs_that_are_themselves_a_link_elsewhere_are_outside(tmp_path: Path) -> None:
    folder, private = tmp_path / "hub/snapshots/abc", tmp_path / "private"
    folder.mkdir(parents=True)
    private.mkdir()
    (tmp_path / "hub/blobs").symlink_to(private)
    (folder / "x.jpg").symlink_to("../../blobs/0123")
    assert not stays_inside((folder / "x.jpg").resolve(), folder)
