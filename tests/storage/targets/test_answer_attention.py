"""Answer attention in a target store: version 4 of the format, what it adds, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr

from storage.codecs.answer_attention import fault, num_answers
from storage.errors import CorruptData, UserError
from storage.integrity.verify import verify
from storage.stores import open_store
from storage.streaming.order import StreamConfig
from storage.targets.commits import CommitRecord
from storage.targets.layout import ANSWER_ARRAYS
from storage.targets.manifest import Manifest, create_or_check
from storage.targets.shard_writer import write_shard
from storage.targets.store import TargetStore
from storage.targets.summary import summarize
from tests.fuzz.stores import make
from tests.storage.builders import extract, manifest, pack, shard_content, target_stream
from tests.storage.integrity.forging import forge
from tests.storage.targets.test_reading import folder_of, recommit

KEYS = [f"k{number}" for number in range(12)]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    extract(pack(tmp_path / "samples", (7,)), open_store(tmp_path / "targets"), answer_attention=True)
    return tmp_path


@pytest.mark.parametrize("sizes", [(9,), (1, 20, 3)])
def test_answers_round_trip_for_several_turns_images_of_several_sizes_and_text_alone(tmp_path, sizes):
    store, made_for = open_store(tmp_path), manifest(answer_attention=True)
    create_or_check(store, made_for)
    samples, maps = shard_content(made_for, KEYS, sizes=sizes)
    counts = [num_answers(sample.answer_mask) for sample in samples]
    assert {0, 1, 2} == set(counts)
    assert any(sample.map_row is None for sample in samples)
    write_shard(store, 0, made_for, "samples-000000.tar", samples, maps, [])
    shard = TargetStore.open(tmp_path).shard(0)
    for row, sample in enumerate(samples):
        assert shard.read(row)[0].answer_attention_LaN is None
        found = shard.read(row, with_answers=True)[0].answer_attention_LaN
        if sample.map_row is None:
            assert found is None
        else:
            assert found.shape == (3, counts[row], maps[sample.map_row].num_tokens)
            assert found.dtype == torch.float16
            assert torch.equal(found, sample.answer_attention_LaN)
    assert verify(tmp_path).findings == ()


def test_shards_of_text_alone_and_of_nothing_have_the_arrays_too(tmp_path):
    store, made_for = open_store(tmp_path), manifest(2, answer_attention=True)
    create_or_check(store, made_for)
    samples, _ = shard_content(made_for, KEYS)
    text = [replace(sample, map_row=None, answer_attention_LaN=None) for sample in samples]
    for number, part in enumerate(([], text)):
        write_shard(store, number, made_for, f"samples-{number:06d}.tar", part, [], [])
    targets = TargetStore.open(tmp_path)
    assert targets.shard(1).read(0, with_answers=True)[0].answer_attention_LaN is None
    assert verify(tmp_path).findings == ()


def test_all_other_arrays_have_the_bytes_of_a_store_without(root, tmp_path):
    extract(pack(tmp_path / "again", (7,)), open_store(tmp_path / "plain"))
    plain, answers = (TargetStore.open(tmp_path / name) for name in ("plain", "targets"))
    of_plain, of_answers = (dict(store.commits[0].files) for store in (plain, answers))
    added = {name for name in of_answers if name.partition("/")[0] in {spec.name for spec in ANSWER_ARRAYS}}
    assert len(added) == 4
    # But for masks, which the builder cuts into two answers.
    differing = {name for name in of_plain if of_plain[name] != of_answers[name]}
    assert differing == {"answer_mask/c/0"}
    assert of_answers.keys() - added == of_plain.keys()
    assert {record.format_version for record in plain.commits.values()} == {3}
    assert {record.format_version for record in answers.commits.values()} == {4}
    summary = summarize(tmp_path / "targets")
    stored = sum(of_answers[name].bytes for name in added)
    assert sum(summary.array_bytes[spec.name] for spec in ANSWER_ARRAYS) == stored
    assert summary.map_bytes == summarize(tmp_path / "plain").map_bytes


def test_a_store_without_refuses_to_read_answers_and_says_what_to_do(tmp_path):
    samples = pack(tmp_path / "samples", (3,))
    extract(samples, open_store(tmp_path / "targets"))
    shard = TargetStore.open(tmp_path / "targets").shard(0)
    said = r"holds no answer attention; extract into a new folder with teacher\.answer_attention=true"
    with pytest.raises(UserError, match=said):
        shard.read(0, with_answers=True)
    config = StreamConfig(seed=0, batch_size=3)
    with pytest.raises(UserError, match=said):
        list(target_stream(tmp_path / "samples", tmp_path / "targets", config, with_answers=True))


def test_the_stream_reads_answers_without_maps(root):
    config = StreamConfig(seed=0, batch_size=7)
    (batch,) = target_stream(root / "samples", root / "targets", config, with_maps=False, with_answers=True)
    assert all(sample.maps is None for sample in batch)
    assert {sample.targets.answer_attention_LaN is None for sample in batch} == {True, False}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda values: None, "answer attention None, expected"),
        (lambda values: values[:2], r"expected \(3, 1, 9\)"),
        (lambda values: torch.cat([values, values], dim=1), r"answer attention \(3, 2, 9\)"),
        (lambda values: values.float(), "expected torch.float16"),
        (lambda values: values * torch.nan, "NaN or infinite values"),
        (lambda values: -values, "a value of -"),
        (lambda values: values * 9, "values that sum to "),
    ],
)
def test_the_writer_refuses_answers_that_do_not_belong_to_the_sample(tmp_path, change, said):
    store, made_for = open_store(tmp_path), manifest(answer_attention=True)
    create_or_check(store, made_for)
    (sample, *others), maps = shard_content(made_for, KEYS[:1])
    spoiled = replace(sample, answer_attention_LaN=change(sample.answer_attention_LaN))
    with pytest.raises(ValueError, match=said):
        write_shard(store, 0, made_for, "samples-000000.tar", [spoiled, *others], maps, [])
    plain = manifest()
    with pytest.raises(ValueError, match="expected None by manifest"):
        write_shard(store, 0, plain, "samples-000000.tar", [sample], maps, [])


def test_the_largest_sum_that_rounding_makes_is_sound():
    exact = torch.full((1, 1, 728), 1 / 728)
    assert float(exact.half().double().sum()) != 1
    assert fault(exact.half()) is None


def test_every_flipped_byte_of_the_arrays_is_seen(root):
    for file in (file for spec in ANSWER_ARRAYS for file in (folder_of(root) / spec.name).rglob("*")):
        if not file.is_file():
            continue
        clean = file.read_bytes()
        for position in range(0, len(clean), 7):
            file.write_bytes(clean[:position] + bytes([clean[position] ^ 1]) + clean[position + 1 :])
            with pytest.raises(CorruptData):
                read_answers(root)
            assert not verify(root / "targets").ok
        file.write_bytes(clean)
    assert read_answers(root) == 7


def test_values_no_softmax_gives_are_found_though_every_digest_is_right(root):
    array = zarr.open_array(folder_of(root) / "answer_attention", mode="r+")
    array[...] = array[...] * 0 + np.float16(0.5)
    recommit_as_it_is(root)
    (finding,) = {finding.part: finding for finding in verify(root / "targets").findings}.values()
    assert finding.expected == "sound values"
    assert "sum to" in finding.found


def test_offsets_that_belong_to_other_answers_are_refused_though_every_digest_is_right(root):
    array = zarr.open_array(folder_of(root) / "answer_attention_offsets", mode="r+")
    offsets = array[...]
    offsets[1] += 9
    array[...] = offsets
    recommit_as_it_is(root)
    with pytest.raises(
        CorruptData, match="answer_attention_offsets: found another size at sample 0, expected 1 answer"
    ):
        read_answers(root)
    assert not verify(root / "targets").ok


@pytest.mark.parametrize("name", ["record", "teacher"])
def test_a_record_of_another_version_than_its_manifest_is_found(tmp_path, name):
    make(tmp_path)
    forge(tmp_path, name, ("format_version",), 4)
    findings = verify(tmp_path / "targets").findings
    assert "format version 4" in {finding.found for finding in findings}
    if name == "record":
        with pytest.raises(CorruptData, match="has format version 4, the manifest 3"):
            TargetStore.open(tmp_path / "targets")


def test_a_manifest_that_loses_the_field_with_every_digest_right_is_refused_by_its_shards(root):
    # As a forger would: the records name the manifest.
    fields = json.loads((root / "targets/manifest.json").read_bytes())
    del fields["fingerprint"]["answer_attention"], fields["digest"]
    plain = Manifest.model_validate({**fields, "format_version": 3})
    (root / "targets/manifest.json").write_bytes(plain.to_bytes())
    record = CommitRecord.load(open_store(root / "targets"), "commits/000000.json")
    forged = record.model_copy(update={"manifest": plain.digest})
    forged = forged.model_copy(update={"digest": forged.content_digest()})
    forged = forged.model_copy(update={"path": forged.folder_for(forged.digest)})
    (root / "targets" / record.path).rename(root / "targets" / forged.path)
    (root / "targets/commits/000000.json").write_bytes(forged.to_bytes())
    with pytest.raises(CorruptData, match="has format version 4, the manifest 3"):
        TargetStore.open(root / "targets")


def read_answers(root: Path) -> int:
    shard = TargetStore.open(root / "targets").shard(0)
    for row in range(len(shard)):
        shard.read(row, with_answers=True)
    return len(shard)


def recommit_as_it_is(root: Path) -> None:
    """The files as they are now, every digest right, in a store of version 4."""
    recommit(root, folder_of(root), format_version=4)
