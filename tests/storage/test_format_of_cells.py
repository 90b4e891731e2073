"""FORMAT.md is true of maps of cells (version 5): tensorstore and plain numbers decode a shard by its text."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from storage.codecs.attention_maps import EncodedMaps, MapCodec
from storage.codecs.codec_settings import MapCodecConfig
from storage.codecs.token_cells import TokenCells
from storage.stores import open_store
from storage.targets.manifest import create_or_check
from storage.targets.shard_writer import write_shard
from tests.storage.builders import manifest, random_maps, sample_targets

GRIDS = ((4, 4), (3, 5))
"""Rows and columns of image tokens; the second has a rim of smaller cells."""


def cells_of(height: int, width: int) -> list[int]:
    """The cell of each token of a grid, two by two."""
    return [row // 2 * math.ceil(width / 2) + column // 2 for row in range(height) for column in range(width)]


def pooled(tokens: np.ndarray, cells: list[int]) -> np.ndarray:
    """The document's map of cells, in float64."""
    found = np.zeros((max(cells) + 1,) * 2)
    for i, of_query in enumerate(cells):
        for j, of_key in enumerate(cells):
            found[of_query, of_key] += tokens[i, j] / cells.count(of_query)
    return found


@pytest.mark.parametrize("codec", ["float16", "sqrt8", "sqrt4"])
def test_tensorstore_reads_maps_of_cells_by_the_document_alone(tmp_path: Path, codec: str) -> None:
    tensorstore = pytest.importorskip("tensorstore")
    made_for = manifest(map_codec=MapCodecConfig(name=codec, causal=False), map_pooling=2)
    made = made_for.fingerprint
    store = open_store(tmp_path)
    create_or_check(store, made_for)
    coder = MapCodec.of_layers(made.map_codec, made.layers, made.windows)
    of_tokens = [
        random_maps(len(made.layers), height * width, seed, causal=True) for seed, (height, width) in enumerate(GRIDS)
    ]
    maps = []
    for tokens_LXX, grid in zip(of_tokens, GRIDS, strict=True):
        cells_X = torch.tensor(cells_of(*grid), dtype=torch.int32)
        maps.append(coder.encode(torch.stack([TokenCells.of(cells_X).pooled(one) for one in tokens_LXX]), cells_X))
    samples = [sample_targets(made_for, f"k{row}", 20, 1, row, row) for row in range(2)]
    write_shard(store, 0, made_for, "samples-000000.tar", samples, maps, [])
    commit = json.loads((tmp_path / "commits/000000.json").read_bytes())
    head = json.loads((tmp_path / "manifest.json").read_bytes())
    assert (head["format_version"], commit["format_version"]) == (5, 5)
    assert (head["fingerprint"]["map_pooling"], head["fingerprint"]["map_codec"]["causal"]) == (2, False)

    def array(name: str) -> np.ndarray:
        where = {"driver": "file", "path": f"{tmp_path}/{commit['path']}/{name}/"}
        return tensorstore.open({"driver": "zarr3", "kvstore": where}, open=True).result().read().result()

    names = ["codes", "code_offsets", "caps", "cells", "cell_offsets", "num_tokens", "corner_offsets"]
    data = {name: array(f"map_{name}") for name in names}
    data |= {name: array(f"window_{name}") for name in ("thresholds", "shifts", "flips", "flip_offsets")}
    for row, tokens_LXX in enumerate(of_tokens):
        cells = data["cells"][slice(*data["cell_offsets"][row : row + 2])].tolist()
        assert cells == cells_of(*GRIDS[row])
        exact_LNN = np.stack([pooled(one, cells) for one in tokens_LXX.double().numpy()])
        check_map(data, row, cells, head["fingerprint"], maps[row], coder, exact_LNN)


def check_map(
    data: dict[str, np.ndarray],
    m: int,
    cells: list[int],
    made_from: dict[str, Any],
    entry: EncodedMaps,
    coder: MapCodec,
    exact_LNN: np.ndarray,
) -> None:
    """Map `m` decoded by the document, in plain numbers, is what this project decodes, and near the exact one."""
    n, layers = int(data["num_tokens"][m]), made_from["layers"]
    assert n == max(cells) + 1
    bits, highest = {"sqrt8": (8, 255), "sqrt4": (4, 15), "float16": (16, 1)}[made_from["map_codec"]["name"]]
    first, last = data["code_offsets"][m : m + 2]
    assert last - first == (n * n if bits == 16 else math.ceil(n * n * bits / 8))
    assert len(set(data["corner_offsets"].tolist())) == 1

    def left_side(layer: int, e: int) -> float:
        """Value * highest^2."""
        stored = data["codes"][layer, first:last]
        if bits == 16:
            return float(stored[e])
        code = int(stored[e * bits // 8]) >> (e * bits % 8) & highest
        return float(code**2) * float(data["caps"][layer, m])

    flipped, place = set(), 0
    for byte in data["flips"][slice(*data["flip_offsets"][m : m + 2])].tolist():
        place += byte
        if byte < 255:
            flipped.add(place)
            place += 1
    begin = int(data["num_tokens"][:m].sum())
    own_maps, (own_windows, own_masks) = coder.decode(entry), coder.decode_windows(entry)
    scale = 4 * float(exact_LNN.max()) / highest if bits < 16 else 1e-3
    last_of = [max(x for x, cell in enumerate(cells) if cell == one) for one in range(n)]
    for e in range(n * n):
        i, j = divmod(e, n)
        is_seen = last_of[i] >= cells.index(j)
        values = [left_side(layer, e) for layer in range(len(layers))]
        for layer, value in enumerate(values):
            assert value / highest**2 == pytest.approx(float(own_maps[layer, i, j]), rel=1e-6)
            assert value / highest**2 == pytest.approx(exact_LNN[layer, i, j], abs=scale)
        for w, window in enumerate(made_from["windows"]):
            members = [layers.index(layer) for layer in window]
            total = sum(values[layer] for layer in members)
            keep = is_seen and total <= highest**2 * len(members) * float(data["thresholds"][w, m])
            keep ^= w * n * n + e in flipped
            assert keep == bool(own_masks[w, i, j])
            exact = exact_LNN[members].mean(0)
            if abs(exact[i, j] - (threshold := exact.mean() + exact.std(ddof=1))) > 1e-5:
                assert keep == (0 < exact[i, j] <= threshold)
            shift = float(data["shifts"][w, begin + j]) if keep else 0.0
            value = total / highest**2 / len(members) + shift
            assert value == pytest.approx(float(own_windows[w, i, j]), rel=1e-6, abs=1e-9)
