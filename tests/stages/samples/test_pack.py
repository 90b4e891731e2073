import json
import os
import re
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from stages.images import Picture, read_picture
from stages.samples import image_files, pack
from stages.samples.pack import PackConfig, PackReport, pack_samples
from storage.errors import TooManySkipped, UserError
from storage.samples.members import StoredSample
from storage.samples.sample_set import SampleSet
from tests.recorded_progress import RecordedProgress
from tests.stages.samples.llava_data import LlavaFolder, bomb_png, image_bytes, record, turns

LENIENT = PackConfig(max_skipped_fraction=1.0)


def read_shards(out: Path) -> list[list[StoredSample]]:
    samples, shards = SampleSet.open(str(out)), []
    for number in range(len(samples.index.shards)):
        with samples.shard(number) as shard:
            shards.append([shard.read(row) for row in range(len(shard))])
    return shards


def read_ledger(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def data_bytes(out: Path) -> dict[str, bytes]:
    """Every file but the report, which holds the time taken."""
    return {path.name: path.read_bytes() for path in out.iterdir() if path.name != "pack-report.json"}


def test_samples_come_back_with_their_conversations_and_the_images_bytes_as_they_were(
    llava: LlavaFolder, tmp_path: Path
) -> None:
    records = [record("x", "a.jpg"), record("y", "b.png"), record("z", "deep/c.webp"), record("t")]
    report = pack_samples(llava.write_json(records), llava.images, tmp_path / "out")

    (samples,) = read_shards(tmp_path / "out")
    assert [sample.key for sample in samples] == ["000000000", "000000001", "000000002", "000000003"]
    assert [sample.record for sample in samples] == records
    assert [sample.images for sample in samples] == [
        ((llava.images / "a.jpg").read_bytes(),),
        ((llava.images / "b.png").read_bytes(),),
        ((llava.images / "deep/c.webp").read_bytes(),),
        (),
    ]
    assert (report.num_samples, report.num_images, report.num_text_only, report.num_shards) == (4, 3, 1, 1)
    assert report.num_skipped == {}
    assert report.num_bytes == (tmp_path / "out/samples-000000.tar").stat().st_size
    assert (tmp_path / "out/skipped.jsonl").read_bytes() == b""
    assert PackReport.model_validate_json((tmp_path / "out/pack-report.json").read_text()) == report


def test_several_images_of_a_sample_keep_their_order(llava: LlavaFolder, tmp_path: Path) -> None:
    source = llava.write_json([record("x", ["b.png", "a.jpg"])])
    pack_samples(source, llava.images, tmp_path / "out")
    ((sample,),) = read_shards(tmp_path / "out")
    assert sample.images == tuple((llava.images / name).read_bytes() for name in ("b.png", "a.jpg"))


def test_conversations_about_one_image_lie_side_by_side_in_order_of_first_appearance(
    llava: LlavaFolder, tmp_path: Path
) -> None:
    images = ["a.jpg", "b.png", None, "a.jpg", ["a.jpg", "b.png"], "b.png", None, "a.jpg"]
    source = llava.write_json([record(f"id{number}", image) for number, image in enumerate(images)])
    report = pack_samples(source, llava.images, tmp_path / "out")
    (samples,) = read_shards(tmp_path / "out")
    assert [int(sample.key) for sample in samples] == [0, 3, 7, 1, 5, 2, 4, 6]
    assert report.num_images == 2


def test_shards_are_bounded_by_count_and_a_group_is_not_split(llava: LlavaFolder, tmp_path: Path) -> None:
    images = ["a.jpg", "a.jpg", "b.png", "b.png", "deep/c.webp"]
    source = llava.write_json([record(f"id{number}", image) for number, image in enumerate(images)])
    pack_samples(source, llava.images, tmp_path / "out", PackConfig(max_samples_per_shard=3))
    assert [[int(s.key) for s in shard] for shard in read_shards(tmp_path / "out")] == [[0, 1], [2, 3, 4]]


def test_a_group_larger_than_a_shard_is_cut(llava: LlavaFolder, tmp_path: Path) -> None:
    source = llava.write_json([record(f"id{number}", "a.jpg") for number in range(7)])
    pack_samples(source, llava.images, tmp_path / "out", PackConfig(max_samples_per_shard=3))
    assert [len(shard) for shard in read_shards(tmp_path / "out")] == [3, 3, 1]


def test_shards_are_bounded_by_bytes(llava: LlavaFolder, tmp_path: Path) -> None:
    for number in range(6):
        llava.add_image(f"{number}.png", image_bytes(number))
    source = llava.write_json([record(f"id{number}", f"{number}.png") for number in range(6)])
    report = pack_samples(source, llava.images, tmp_path / "out", PackConfig(max_shard_bytes=12_000))
    assert report.num_shards > 1
    assert all(path.stat().st_size <= 12_000 for path in (tmp_path / "out").glob("*.tar"))


def test_packing_twice_gives_the_same_bytes(llava: LlavaFolder, tmp_path: Path) -> None:
    broken = {**record("bad", "a.jpg"), "conversations": []}
    source = llava.write_json([record("x", "a.jpg"), broken, record("t"), record("y", "b.png")])
    for name in ("one", "two"):
        pack_samples(source, llava.images, tmp_path / name, LENIENT)
    assert data_bytes(tmp_path / "one") == data_bytes(tmp_path / "two")


def _missing(llava: LlavaFolder) -> None:
    (llava.images / "bad.png").unlink(missing_ok=True)


def _truncated(llava: LlavaFolder) -> None:
    llava.add_image("bad.png", image_bytes(1, size=64)[:-40])


def _flipped(llava: LlavaFolder) -> None:
    data = bytearray(image_bytes(1))
    data[-20] ^= 0xFF
    llava.add_image("bad.png", bytes(data))


def _bomb(llava: LlavaFolder) -> None:
    llava.add_image("bad.png", bomb_png())


def _empty(llava: LlavaFolder) -> None:
    llava.add_image("bad.png", b"")


def _ppm(llava: LlavaFolder) -> None:
    llava.add_image("bad.png", image_bytes(1, "PPM"))


def _text(llava: LlavaFolder) -> None:
    llava.add_image("bad.png", b"<html>404 not found</html>")


def _directory(llava: LlavaFolder) -> None:
    (llava.images / "bad.png").mkdir()


def _pipe(llava: LlavaFolder) -> None:
    os.mkfifo(llava.images / "bad.png")


def _link_out(llava: LlavaFolder) -> None:
    (llava.root / "secret.png").write_bytes(image_bytes(1))
    (llava.images / "bad.png").symlink_to(llava.root / "secret.png")


def _link_to_itself(llava: LlavaFolder) -> None:
    (llava.images / "bad.png").symlink_to(llava.images / "bad.png")


BAD_IMAGES: dict[str, tuple[Callable[[LlavaFolder], None], str]] = {
    "missing": (_missing, "missing_image"),
    "truncated": (_truncated, "broken_image"),
    "with a wrong checksum": (_flipped, "broken_image"),
    "a decompression bomb": (_bomb, "image_too_large"),
    "empty": (_empty, "empty_image"),
    "of a format that is not read": (_ppm, "unsupported_image"),
    "a web page": (_text, "unsupported_image"),
    "a folder": (_directory, "missing_image"),
    "a pipe": (_pipe, "missing_image"),
    "a link out of the folder": (_link_out, "path_leaves_folder"),
    "a link to itself": (_link_to_itself, "missing_image"),
}


@pytest.mark.parametrize("case", BAD_IMAGES)
def test_every_conversation_about_a_bad_image_is_in_the_ledger_with_the_reason(
    case: str, llava: LlavaFolder, tmp_path: Path
) -> None:
    spoil, reason = BAD_IMAGES[case]
    spoil(llava)
    images = ["bad.png", "a.jpg", ["a.jpg", "bad.png"], "bad.png"]
    source = llava.write_json([record(f"id{number}", image) for number, image in enumerate(images)])
    report = pack_samples(source, llava.images, tmp_path / "out", LENIENT)

    assert report.num_skipped == {reason: 3}
    ledger = read_ledger(tmp_path / "out/skipped.jsonl")
    assert [(line["ordinal"], line["id"], line["reason"]) for line in ledger] == [
        (0, "id0", reason),
        (2, "id2", reason),
        (3, "id3", reason),
    ]
    assert all("bad.png" in line["detail"] and "0x" not in line["detail"] for line in ledger)
    ((sample,),) = read_shards(tmp_path / "out")
    assert sample.record["id"] == "id1"


def test_images_are_known_by_their_content_and_those_with_exif_turns_are_counted(
    llava: LlavaFolder, tmp_path: Path
) -> None:
    for name, kind in (("cover.jpg", "GIF"), ("scan", "TIFF"), ("plot.png", "BMP")):
        llava.add_image(name, image_bytes(1, kind))
    exif = Image.Exif()
    exif[0x0112] = 8
    for name in ("unused.jpg", "turned.jpg"):
        Image.new("RGB", (4, 2)).save(llava.images / name, exif=exif)
    names = ["cover.jpg", "scan", "plot.png", "turned.jpg", "turned.jpg"]
    source = llava.write_json([record(f"id{number}", image) for number, image in enumerate(names)])
    report = pack_samples(source, llava.images, tmp_path / "out")
    with tarfile.open(tmp_path / "out/samples-000000.tar") as tar:
        members = [Path(name).suffix for name in tar.getnames() if not name.endswith(".json")]
    assert members == [".gif", ".tif", ".bmp", ".jpg", ".jpg"]
    assert (report.num_images, report.num_turned) == (4, 1)
    (samples,) = read_shards(tmp_path / "out")
    assert [sample.images[0] for sample in samples] == [(llava.images / name).read_bytes() for name in names]


def test_a_link_that_stays_in_the_folder_is_followed(llava: LlavaFolder, tmp_path: Path) -> None:
    (llava.images / "link.jpg").symlink_to(llava.images / "a.jpg")
    report = pack_samples(llava.write_json([record("x", "link.jpg")]), llava.images, tmp_path / "out")
    assert report.num_samples == 1


def test_the_pixel_limit_is_the_configured_one(llava: LlavaFolder, tmp_path: Path) -> None:
    source = llava.write_json([record("x", "a.jpg")])
    with pytest.raises(TooManySkipped, match="image_too_large"):
        pack_samples(source, llava.images, tmp_path / "out", PackConfig(max_image_pixels=63))


def test_an_image_file_larger_than_a_shard_is_too_large(llava: LlavaFolder, tmp_path: Path) -> None:
    source = llava.write_json([record("x", "a.jpg"), record("t")])
    config = PackConfig(max_shard_bytes=500, max_skipped_fraction=1.0)
    report = pack_samples(source, llava.images, tmp_path / "out", config)
    assert report.num_skipped == {"image_too_large": 1}


def test_an_id_of_any_length_is_kept_and_a_name_that_no_file_can_have_is_a_missing_image(
    llava: LlavaFolder, tmp_path: Path
) -> None:
    names = ["x" * 300 + ".png", "x/" * 3000 + "a.png"]
    unusable = [record(f"{number}" + "z" * 10_000, name) for number, name in enumerate(names)]
    source = llava.write_json([record("y" * 10_000, "a.jpg"), *unusable])
    report = pack_samples(source, llava.images, tmp_path / "out", LENIENT)
    assert report.num_skipped == {"missing_image": 2}
    ((sample,),) = read_shards(tmp_path / "out")
    assert (sample.key, sample.record["id"]) == ("000000000", "y" * 10_000)
    ledger = read_ledger(tmp_path / "out/skipped.jsonl")
    assert [line["id"] for line in ledger] == [each["id"] for each in unusable]
    assert all("is longer than the name of a file may be" in line["detail"] for line in ledger)


def test_an_image_is_decoded_once_however_many_samples_share_it(
    llava: LlavaFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[bytes] = []

    def read(data: bytes, max_pixels: int) -> Picture:
        decoded.append(data)
        return read_picture(data, max_pixels)

    monkeypatch.setattr(image_files, "read_picture", read)
    images = ["a.jpg", "b.png", "a.jpg", ["a.jpg", "b.png"]]
    source = llava.write_json([record(f"id{number}", image) for number, image in enumerate(images)])
    pack_samples(source, llava.images, tmp_path / "out")
    assert len(decoded) == 2


def test_bad_lines_and_bad_records_are_in_the_ledger_in_file_order(llava: LlavaFolder, tmp_path: Path) -> None:
    good = json.dumps(record("x", "a.jpg")).encode()
    unanswered = json.dumps({"id": "q", "conversations": turns("q")}).encode()
    source = llava.write_lines([b"{", good, b'"caf\xe9"', unanswered])
    pack_samples(source, llava.images, tmp_path / "out", LENIENT)
    ledger = read_ledger(tmp_path / "out/skipped.jsonl")
    assert [(line["ordinal"], line["id"], line["reason"]) for line in ledger] == [
        (0, None, "bad_json_line"),
        (2, None, "not_utf8"),
        (3, "q", "answer_missing"),
    ]
    ((sample,),) = read_shards(tmp_path / "out")
    assert sample.key == "000000001"


def test_a_record_without_an_id_never_clashes(llava: LlavaFolder, tmp_path: Path) -> None:
    source = llava.write_json([record("1"), {"conversations": turns("q", "a")}])
    pack_samples(source, llava.images, tmp_path / "out")
    (samples,) = read_shards(tmp_path / "out")
    assert [sample.record["id"] for sample in samples] == ["1", "1"]


def test_too_many_skipped_says_how_many_which_where_and_what_to_do_and_leaves_only_the_ledger(
    llava: LlavaFolder, tmp_path: Path
) -> None:
    records = [record("x", "a.jpg"), record("y", "lost.png"), {"id": "z", "conversations": []}, record("t")]
    source, out = llava.write_json(records), tmp_path / "out"
    with pytest.raises(TooManySkipped) as refused:
        pack_samples(source, llava.images, out, PackConfig(max_skipped_fraction=0.49))
    message = str(refused.value)
    for part in ("2 of 4", "empty_conversation 1", "missing_image 1", "id y", "lost.png", "0.500000"):
        assert part in message
    assert str(out / "skipped.jsonl") in message
    assert [path.name for path in out.iterdir()] == ["skipped.jsonl"]
    assert len(read_ledger(out / "skipped.jsonl")) == 2

    assert pack_samples(source, llava.images, out, PackConfig(max_skipped_fraction=0.5)).num_samples == 2


def test_the_fraction_that_the_refusal_names_is_enough(llava: LlavaFolder, tmp_path: Path) -> None:
    source = llava.write_json([record("x", "a.jpg"), {"messages": []}, record("t")])
    with pytest.raises(TooManySkipped) as refused:
        pack_samples(source, llava.images, tmp_path / "out")
    named = re.search(r"at least ([0-9.]+)", str(refused.value))
    assert named
    config = PackConfig(max_skipped_fraction=float(named[1]))
    assert pack_samples(source, llava.images, tmp_path / "out", config).num_samples == 2


def test_when_nothing_is_left_to_pack_it_fails_whatever_is_allowed(llava: LlavaFolder, tmp_path: Path) -> None:
    with pytest.raises(TooManySkipped, match="1 of 1"):
        pack_samples(llava.write_json([{"messages": []}]), llava.images, tmp_path / "out", LENIENT)
    with pytest.raises(UserError, match="no records"):
        pack_samples(llava.write_json([]), llava.images, tmp_path / "out", LENIENT)


def test_packing_again_changes_nothing_and_mends_a_lost_shard(llava: LlavaFolder, tmp_path: Path) -> None:
    source, out = llava.write_json([record("x", "a.jpg"), record("t")]), tmp_path / "out"
    pack_samples(source, llava.images, out)
    before = data_bytes(out)
    (out / "samples-000000.tar").write_bytes(b"")
    pack_samples(source, llava.images, out)
    assert data_bytes(out) == before


def test_another_data_set_is_never_mixed_in(llava: LlavaFolder, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pack_samples(llava.write_json([record("x", "a.jpg")]), llava.images, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(UserError, match="already holds another data set"):
        pack_samples(llava.write_json([record("y", "b.png")]), llava.images, out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_shards_of_another_size_are_refused_before_a_record_is_packed(llava: LlavaFolder, tmp_path: Path) -> None:
    source, out = llava.write_json([record("x", "a.jpg"), record("y", "b.png"), record("t")]), tmp_path / "out"
    pack_samples(source, llava.images, out)
    before = data_bytes(out)
    for other in ({"max_samples_per_shard": 1}, {"max_shard_bytes": 9999}):
        progress = RecordedProgress()
        limits = {"max_samples_per_shard": 512, "max_shard_bytes": 268435456}
        had, has = ("{max_samples_per_shard} .*{max_shard_bytes}".format_map(each) for each in (limits, limits | other))
        with pytest.raises(
            UserError, match=f"already holds shards of at most {had} bytes, now {has}, .* former --samp"
        ):
            pack_samples(source, llava.images, out, PackConfig(**other), progress)
        assert progress.tasks == []
    assert data_bytes(out) == before
    # Without the report the limits cannot be told, and shards are compared when they are there.
    for damage in ("{", "[]", "{}", None):
        (out / "pack-report.json").write_text(damage) if damage else (out / "pack-report.json").unlink()
        with pytest.raises(UserError, match="already holds another data set, or this one in other shards"):
            pack_samples(source, llava.images, out, PackConfig(max_samples_per_shard=1))
    assert pack_samples(source, llava.images, out).num_shards == 1


def test_a_refused_run_over_a_finished_folder_leaves_its_ledger_beside_the_good_one(
    llava: LlavaFolder, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    pack_samples(llava.write_json([record("x", "a.jpg")]), llava.images, out)
    before = data_bytes(out)
    with pytest.raises(TooManySkipped, match=r"skipped\.refused\.jsonl"):
        pack_samples(llava.write_json([{"messages": []}]), llava.images, out)
    after = data_bytes(out)
    assert after.pop("skipped.refused.jsonl")
    assert after == before


def test_a_folder_with_foreign_files_is_refused(llava: LlavaFolder, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "samples-000000.tar").write_bytes(b"somebody's")
    with pytest.raises(UserError, match=r"samples-000000\.tar"):
        pack_samples(llava.write_json([record("x")]), llava.images, out)
    assert (out / "samples-000000.tar").read_bytes() == b"somebody's"


@pytest.mark.parametrize("moment", [1, 2, 3])
def test_a_run_stopped_at_any_group_leaves_nothing_and_the_next_one_is_whole(
    moment: int, llava: LlavaFolder, tmp_path: Path
) -> None:
    source = llava.write_json([record("x", "a.jpg"), record("y", "b.png"), record("t")])
    out = tmp_path / "out"

    def stop(name: str, done: float) -> None:
        if done == moment:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack_samples(source, llava.images, out, PackConfig(max_samples_per_shard=1), RecordedProgress(stop))
    assert list(out.iterdir()) == []
    assert pack_samples(source, llava.images, out).num_samples == 3


def test_a_run_killed_while_it_published_is_finished_by_the_next(llava: LlavaFolder, tmp_path: Path) -> None:
    source, out = llava.write_json([record("x", "a.jpg"), record("t")]), tmp_path / "out"
    pack_samples(source, llava.images, tmp_path / "whole")
    (out / "packing.partial").mkdir(parents=True)
    (out / "packing.partial/index.json").write_bytes(b"{}")
    for number in range(3):
        (out / f"samples-{number:06d}.tar").write_bytes(b"left behind")
        (out / f"samples-{number:06d}.json").write_bytes(b"left behind")
    pack_samples(source, llava.images, out)
    assert data_bytes(out) == data_bytes(tmp_path / "whole")


KILLED_WHEN = {
    "the second group is packed": """
def stop(name, done):
    if name == "pack" and done == 2:
        os.kill(os.getpid(), signal.SIGKILL)
pack_samples(source, images, out, config, RecordedProgress(stop))
""",
    "two files are published": """
published = []
replace = Path.replace
def stop(self, target):
    if Path(target).parent == out:
        published.append(target)
    if len(published) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return replace(self, target)
Path.replace = stop
pack_samples(source, images, out, config)
""",
}


@pytest.mark.parametrize("moment", KILLED_WHEN)
def test_after_a_kill_the_same_command_gives_the_bytes_of_an_undisturbed_run(
    moment: str, llava: LlavaFolder, tmp_path: Path
) -> None:
    source = llava.write_json([record("x", "a.jpg"), record("y", "b.png"), record("t")])
    out, config = tmp_path / "out", PackConfig(max_samples_per_shard=1)
    prelude = f"""
import os, signal
from pathlib import Path
from stages.samples.pack import PackConfig, pack_samples
from tests.recorded_progress import RecordedProgress
source, images, out = map(Path, {[str(source), str(llava.images), str(out)]!r})
config = PackConfig(max_samples_per_shard=1)
"""
    killed = subprocess.run([sys.executable, "-c", prelude + KILLED_WHEN[moment]], timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert not (out / "index.json").exists()

    pack_samples(source, llava.images, out, config)
    pack_samples(source, llava.images, tmp_path / "whole", config)
    assert data_bytes(out) == data_bytes(tmp_path / "whole")


def test_progress_ends_with_every_sample_and_its_image_bytes(
    llava: LlavaFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pack, "_RECORDS_BETWEEN_REPORTS", 1)
    progress = RecordedProgress()
    source = llava.write_json([record("x", "a.jpg"), record("t"), record("y", "a.jpg")])
    pack_samples(source, llava.images, tmp_path / "out", progress=progress)
    num_bytes = (llava.images / "a.jpg").stat().st_size
    reading = [("read records", done, None) for done in (1, 2, 3)]
    assert progress.steps == [*reading, ("pack", 2, 3), ("pack", 3, 3)]
    assert progress.notes == [f"{num_bytes / 1e6:,.1f} MB"] * 2


def test_a_data_file_that_changes_between_the_passes_is_noticed(llava: LlavaFolder, tmp_path: Path) -> None:
    # More than a reader holds in its buffer.
    lines = [json.dumps(record("x" * 50_000, name)).encode() for name in ("a.jpg", "b.png", None)]

    changes = {
        "bad_json_line": [lines[0], b"{" * 50_000],
        "it has other images": [lines[0], lines[2], lines[1]],
        "it is no more there": lines[:2],
    }
    for how, spoiled in changes.items():
        source = llava.write_lines(lines)
        progress = RecordedProgress(lambda _, done, spoiled=spoiled: done == 1 and llava.write_lines(spoiled))
        with pytest.raises(UserError, match=f"{how}.*changed while it was packed"):
            pack_samples(source, llava.images, tmp_path / "out", progress=progress)


def test_paths_that_start_at_the_folder_above_say_so(llava: LlavaFolder, tmp_path: Path) -> None:
    for path, hinted in (("images/a.jpg", True), ("images/lost.png", False), ("other/a.jpg", False)):
        with pytest.raises(TooManySkipped) as refused:
            pack_samples(llava.write_json([record("x", path), record("t")]), llava.images, tmp_path / "out")
        assert f"{path} is not a file of the image folder" in str(refused.value)
        assert ("it is one of the folder above, so give that" in str(refused.value)) == hinted


def test_a_missing_image_folder_is_named(llava: LlavaFolder, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere"):
        pack_samples(llava.write_json([record("x")]), tmp_path / "nowhere", tmp_path / "out")
