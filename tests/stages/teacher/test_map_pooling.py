"""Maps of cells: as pooling the maps of tokens, for families whose tokens have places, and refused for others."""

from pathlib import Path

import pytest
import torch

from stages.families.token_grids import TokenGrid, token_cells
from storage.codecs.attention_maps import MapCodec
from storage.codecs.token_cells import attended_cells
from storage.errors import FingerprintMismatch, UserError
from storage.integrity.verify import verify
from storage.stores import open_store
from storage.targets.manifest import Manifest, create_or_check
from storage.targets.store import TargetStore
from tests.checkpoints import make_tiny_llava
from tests.stages.distilled import TinyData, extract_here
from tests.stages.extracted_families import make_samples
from tests.storage.builders import files_of
from tests.tiny_families import make_tiny_family

PLAIN = {"layers": (1, 2), "num_matched": 1, "batch_size": 3, "map_codec": "float16"}


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_samples(tmp_path_factory.mktemp("pooled"))


def data_of(family: str, samples: Path, folder: Path, image_size: int = 32) -> TinyData:
    if family == "llava":
        teacher = make_tiny_llava(folder / "teacher", num_layers=4, image_size=image_size)
    else:
        teacher = make_tiny_family(folder / "teacher", family)
    return TinyData(teacher, folder, samples)


def layers_of(store: TargetStore, row: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    fingerprint = store.manifest.fingerprint
    codec = MapCodec.of_layers(fingerprint.map_codec, fingerprint.layers, fingerprint.windows)
    found = store.shard(0).read_map(row)
    return codec.decode(found).double(), found.cells_X


@pytest.mark.parametrize("family", ["llava", "llava-odd", "llava_next", "qwen2_vl", "idefics3", "internvl"])
def test_extracted_maps_of_cells_are_the_pooled_maps_of_tokens(family: str, samples: Path, tmp_path: Path) -> None:
    name, _, odd = family.partition("-")
    data = data_of(name, samples, tmp_path, 40 if odd else 32)
    plain = extract_here(data, tmp_path / "plain", **PLAIN)
    pooled = extract_here(data, tmp_path / "pooled", **PLAIN, map_pooling=2)
    assert (plain.manifest.format_version, pooled.manifest.format_version) == (3, 5)
    num_maps = len(plain.shard(0).map_num_tokens)
    assert num_maps == len(pooled.shard(0).map_num_tokens) > 2
    for row in range(num_maps):
        maps_LXX, none = layers_of(plain, row)
        found_LNN, cells_X = layers_of(pooled, row)
        assert none is None
        assert cells_X is not None
        members_XN = torch.nn.functional.one_hot(cells_X.long()).double()
        expected_LNN = members_XN.T @ maps_LXX @ members_XN / members_XN.sum(0)[:, None]
        # Both are rounded to 16 bits.
        torch.testing.assert_close(found_LNN, expected_LNN, rtol=2**-10, atol=2**-22)
        assert bool((found_LNN[:, ~attended_cells(cells_X)] == 0).all())
        sizes = members_XN.sum(0)
        assert float(sizes.max()) <= 4
        if name == "llava" and len(cells_X) in (16, 25):
            assert sizes.tolist() == [4.0] * 4 if not odd else [4.0, 4, 2, 4, 4, 2, 2, 2, 1]
    assert verify(tmp_path / "pooled", samples).findings == ()


@pytest.mark.parametrize("family", ["llava_onevision", "gemma3"])
def test_a_family_whose_tokens_have_no_known_places_is_refused_by_name(
    family: str, samples: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=f"image tokens of {family} form no cells: .*set teacher.map_pooling to 1"):
        extract_here(data_of(family, samples, tmp_path), tmp_path / "pooled", **PLAIN, map_pooling=2)


def test_batch_size_and_reuse_of_the_image_change_no_byte_of_maps_of_cells(samples: Path, tmp_path: Path) -> None:
    data = data_of("llava", samples, tmp_path)
    settings = {**PLAIN, "map_pooling": 2, "answer_attention": True, "map_codec": "sqrt8", "prefix_reuse": "off"}
    for size in (1, 4):
        extract_here(data, tmp_path / str(size), **{**settings, "batch_size": size})
    assert files_of(tmp_path / "1") == files_of(tmp_path / "4")
    shared = extract_here(data, tmp_path / "shared", **{**settings, "prefix_reuse": "on"}).shard(0)
    alone = TargetStore.open(tmp_path / "1").shard(0)
    for row in range(len(alone)):
        ours, theirs = (one.read(row, with_answers=True)[0].answer_attention_LaN for one in (shared, alone))
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=2**-9, atol=1e-5)


def test_answer_attention_to_cells_is_the_sum_over_their_tokens(samples: Path, tmp_path: Path) -> None:
    data = data_of("llava", samples, tmp_path)
    plain = extract_here(data, tmp_path / "plain", **PLAIN, answer_attention=True).shard(0)
    pooled = extract_here(data, tmp_path / "pooled", **PLAIN, answer_attention=True, map_pooling=2).shard(0)
    for row in range(len(plain)):
        tokens, cells = (one.read(row, with_answers=True)[0] for one in (plain, pooled))
        if tokens.answer_attention_LaN is None:
            assert cells.cells_X is None
            continue
        assert cells.cells_X is not None
        members_XN = torch.nn.functional.one_hot(cells.cells_X.long()).double()
        expected = tokens.answer_attention_LaN.double() @ members_XN
        torch.testing.assert_close(cells.answer_attention_LaN.double(), expected, rtol=2**-9, atol=2**-22)


def test_samples_of_too_many_image_tokens_are_in_the_ledger(samples: Path, tmp_path: Path) -> None:
    data = data_of("llava", samples, tmp_path)
    record = extract_here(data, tmp_path / "limited", **PLAIN, max_image_tokens=16).commits[0]
    (left_out,) = record.skipped
    assert left_out.reason == "too_many_image_tokens"
    assert left_out.detail == "32 image tokens, at most 16 are taken (teacher.max_image_tokens)"
    whole = extract_here(data, tmp_path / "whole", **PLAIN)
    assert record.num_samples == whole.commits[0].num_samples - 1
    manifest = TargetStore.open(tmp_path / "limited").manifest
    assert manifest.fingerprint.max_image_tokens == 16
    assert b"max_image_tokens" not in whole.manifest.to_bytes()


def test_a_store_of_maps_of_tokens_takes_no_maps_of_cells(samples: Path, tmp_path: Path) -> None:
    data = data_of("llava", samples, tmp_path)
    plain = extract_here(data, tmp_path / "plain", **PLAIN)
    pooled = extract_here(data, tmp_path / "pooled", **PLAIN, map_pooling=2)
    assert b"map_pooling" not in plain.manifest.to_bytes()
    assert Manifest.load(open_store(tmp_path / "pooled")).fingerprint.map_pooling == 2
    with pytest.raises(FingerprintMismatch, match="  map_pooling: stored 2, this run \\(absent\\)"):
        create_or_check(open_store(tmp_path / "pooled"), plain.manifest)
    assert not pooled.manifest.fingerprint.map_codec.causal


def test_cells_at_rims_are_smaller_and_ends_of_rows_are_apart() -> None:
    assert token_cells([TokenGrid(3, 3)], 2).tolist() == [0, 0, 1, 0, 0, 1, 2, 2, 3]
    assert token_cells([TokenGrid(2, 2, num_missing=1), TokenGrid(1, 2)], 2).tolist() == [0, 0, 0, 1, 1]
    with_ends = token_cells([TokenGrid(3, 2, ends_rows=True)], 2)
    assert with_ends.tolist() == [0, 0, 1, 0, 0, 1, 2, 2, 3]
