"""FORMAT.md is true: its dumps are of a store made now, and tensorstore decodes a shard by its text."""

import hashlib
import json
import math
import struct
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from storage.codecs.answer_logits import AnswerLogitsCodec
from storage.codecs.attention_maps import EncodedMaps, MapCodec
from storage.codecs.codec_settings import LogitCodecConfig, MapCodecConfig
from storage.codecs.moments import window_thresholds
from storage.codecs.tail_samples import row_addresses
from storage.codecs.windows import window_rows
from storage.stores import open_store
from storage.targets.manifest import create_or_check
from storage.targets.shard_writer import write_shard
from tests.storage.builders import extract, fingerprint, manifest, pack, shard_content

DOCUMENT = Path(__file__).parents[2] / "storage" / "FORMAT.md"


def dumps() -> list[dict[str, Any]]:
    blocks = DOCUMENT.read_text().split("```json\n")[1:]
    return [json.loads(block.partition("```")[0]) for block in blocks]


def test_the_documents_dumps_are_of_a_real_store(tmp_path):
    (record,) = extract(pack(tmp_path / "samples", (3,)), open_store(tmp_path / "targets"), skip=("s0-2",))
    table, index, head, commit, group, codes, tokens = dumps()
    folder = tmp_path / "targets" / record.path

    def stored(path: Path) -> Any:
        return json.loads(path.read_bytes())

    assert table == stored(tmp_path / "samples/samples-000000.json")
    assert index == stored(tmp_path / "samples/index.json")
    assert head == stored(tmp_path / "targets/manifest.json")
    assert group == stored(folder / "zarr.json")
    assert codes == stored(folder / "map_codes/zarr.json")
    assert tokens == stored(folder / "token_ids/zarr.json")
    # Digests of chunks follow the random numbers of the torch at hand.
    real = stored(tmp_path / "targets/commits/000000.json")
    volatile = ("digest", "path", "files")
    assert {k: v for k, v in commit.items() if k not in volatile} == {
        k: v for k, v in real.items() if k not in volatile
    }
    assert commit.keys() == real.keys()
    assert commit["files"].keys() < real["files"].keys()
    assert f"its {len(real['files'])} entries" in DOCUMENT.read_text()


def decode_record(codec: dict[str, Any], record: bytes) -> dict[str, list[float]]:
    """One answer row by the document's section on them, with nothing but Python's numbers."""
    v = codec["vocab_size"]
    k = min(codec["top_k"], v)
    w = next(w for w in range(1, 99) if 2**w >= v)
    d, tempered = (0, 0) if k == v else (codec["num_draws"], codec["num_tempered_samples"])
    h = k if codec["name"] == "float16" else min(k, codec["num_exact"] + 1)
    c = k - h
    temperatures = [1.0, *codec["temperatures"]]
    sizes = [
        math.ceil(k * w / 8),
        2 * h,
        math.ceil((c + codec["num_levels"] - 1) / 8) if c else 0,
        4 * len(temperatures),
        math.ceil(d * w / 8),
        math.ceil(len(codec["temperatures"]) * tempered * w / 8),
    ]
    assert sum(sizes) == len(record)
    starts = [sum(sizes[:n]) for n in range(7)]
    ids, values, levels, tails, draw_ids, tempered_ids = (record[a:b] for a, b in pairwise(starts))

    def integers(part: bytes, count: int) -> list[int]:
        return [(int.from_bytes(part, "little") >> (n * w)) % 2**w for n in range(count)]

    exact = list(struct.unpack(f"<{h}e", values))
    coded = []
    if c:
        ones = [n for n in range(8 * len(levels)) if levels[n // 8] >> (n % 8) & 1]
        a, b = exact[-2:]
        coded = [a - (a - b) * ((n - i) / (codec["num_levels"] - 1)) ** 2 for i, n in enumerate(ones)]
        assert len(coded) == c
    return {
        "ids_RK": integers(ids, k),
        "logprobs_RK": [*exact[:-1], *coded, exact[-1]],
        "tails_RX": list(struct.unpack(f"<{len(temperatures)}f", tails)),
        "tail_ids": [*integers(draw_ids, d), *integers(tempered_ids, len(codec["temperatures"]) * tempered)],
    }


def test_the_documents_example_of_an_answer_row_is_what_is_stored():
    codec = LogitCodecConfig(
        vocab_size=10,
        top_k=4,
        num_exact=1,
        num_levels=64,
        num_tail_samples=2,
        temperatures=(2.0,),
        num_tempered_samples=3,
    )
    record = AnswerLogitsCodec(codec).encode(torch.arange(10.0)[None], torch.tensor([0.5]))[0].numpy().tobytes()
    assert f"`{record.hex(' ')}`" in DOCUMENT.read_text()
    found = decode_record(codec.model_dump(), record)
    logprobs = torch.arange(10.0).double().log_softmax(-1)
    assert found["ids_RK"] == [9, 8, 7, 6]
    assert found["logprobs_RK"] == pytest.approx(logprobs[[9, 8, 7, 6]].tolist(), abs=0.04)  # 3 nats, 64 levels
    tails = [float((logprobs[:6] / t).logsumexp(-1)) for t in (1.0, 2.0)]
    assert found["tails_RX"] == pytest.approx(tails, rel=1e-6)
    # Running sums of ids 0 to 5 pass a quarter and three quarters of the whole at 4 and 5; at temperature 2 others.
    for temperature, places, ids in ((1, (0.25, 0.75), slice(0, 2)), (2, (1 / 6, 0.5, 5 / 6), slice(2, 5))):
        running = (logprobs[:6] / temperature).softmax(-1).cumsum(-1)
        assert found["tail_ids"][ids] == [int((running <= place).sum()) for place in places]
    assert found["tail_ids"] == [4, 5, 2, 4, 5]


def test_the_address_of_a_row_is_the_documents():
    number = int.from_bytes(hashlib.sha256("clé:2".encode()).digest()[:8], "little") >> 11
    assert row_addresses("clé", 4)[2].item() == number * 2.0**-53


@pytest.mark.parametrize("codec", ["sqrt4", "sqrt2", "sqrt8", "float16", "auto"])
def test_tensorstore_reads_a_shard_by_the_document_alone(tmp_path, codec):
    tensorstore = pytest.importorskip("tensorstore")
    logit_codec = fingerprint().logit_codec.model_copy(update={"name": "float16" if codec == "float16" else "levels"})
    made_for = manifest(map_codec=MapCodecConfig(name=codec, sqrt8_below=20), logit_codec=logit_codec)
    store = open_store(tmp_path)
    create_or_check(store, made_for)
    keys = [f"k{number}" for number in range(7)]
    samples, maps = shard_content(made_for, keys, sizes=(9, 34))
    samples[1] = replace(samples[1], num_cut_answer_tokens=7)
    write_shard(store, 0, made_for, "samples-000000.tar", samples, maps, [])

    commit = json.loads((tmp_path / "commits/000000.json").read_bytes())
    head = json.loads((tmp_path / "manifest.json").read_bytes())

    def array(name: str) -> np.ndarray:
        where = {"driver": "file", "path": f"{tmp_path}/{commit['path']}/{name}/"}
        return tensorstore.open({"driver": "zarr3", "kvstore": where}, open=True).result().read().result()

    names = [
        "sample_keys",
        "sample_key_offsets",
        "token_ids",
        "answer_mask",
        "token_offsets",
        "cut_answer_tokens",
        "map_rows",
        "sample_turned",
    ]
    names += ["logit_records", "logit_offsets"]
    names += ["map_num_tokens", "map_caps", "map_means", "map_covariances", "map_codes", "map_code_offsets"]
    names += ["map_corners", "map_corner_offsets"]
    names += ["window_thresholds", "window_shifts", "window_flips", "window_flip_offsets"]
    data = {name: array(name) for name in names}
    assert {file.partition("/")[0] for file in commit["files"]} == {*names, "zarr.json"}
    for row, sample in enumerate(samples):
        a, b = data["sample_key_offsets"][row : row + 2]
        assert data["sample_keys"][a:b].tobytes().decode() == sample.key
        a, b = data["token_offsets"][row : row + 2]
        assert data["token_ids"][a:b].tolist() == sample.token_ids.tolist()
        assert data["answer_mask"][a:b].tolist() == sample.answer_mask.tolist()
        assert data["cut_answer_tokens"][row] == sample.num_cut_answer_tokens == 7 * (row == 1)
        a, b = data["logit_offsets"][row : row + 2]
        assert b - a == int(sample.answer_mask.sum())
        decoded = AnswerLogitsCodec(made_for.fingerprint.logit_codec).decode(sample.logits_RQ)
        for number, record in enumerate(data["logit_records"][a:b]):
            found = decode_record(head["fingerprint"]["logit_codec"], record.tobytes())
            assert found.pop("tail_ids") == torch.cat(decoded.tail_ids, dim=1)[number].tolist()
            for name, values in found.items():
                assert values == pytest.approx(getattr(decoded, name)[number].tolist(), rel=1e-6), name
        assert data["sample_turned"][row] == sample.is_turned
        m = data["map_rows"][row]
        if sample.map_row is None:
            assert m == -1
            continue
        check_map(data, int(m), head["fingerprint"], maps[sample.map_row])


def test_tensorstore_reads_answer_attention_by_the_document_alone(tmp_path):
    tensorstore = pytest.importorskip("tensorstore")
    made_for, store = manifest(answer_attention=True), open_store(tmp_path)
    create_or_check(store, made_for)
    samples, maps = shard_content(made_for, [f"k{number}" for number in range(9)], sizes=(9, 34))
    write_shard(store, 0, made_for, "samples-000000.tar", samples, maps, [])
    commit = json.loads((tmp_path / "commits/000000.json").read_bytes())
    head = json.loads((tmp_path / "manifest.json").read_bytes())
    assert (head["format_version"], commit["format_version"]) == (4, 4)
    assert head["fingerprint"]["answer_attention"] is True
    assert "H" not in commit

    def array(name: str) -> np.ndarray:
        where = {"driver": "file", "path": f"{tmp_path}/{commit['path']}/{name}/"}
        return tensorstore.open({"driver": "zarr3", "kvstore": where}, open=True).result().read().result()

    values, offsets = array("answer_attention"), array("answer_attention_offsets")
    mask, tokens, map_rows, sizes = (array(n) for n in ("answer_mask", "token_offsets", "map_rows", "map_num_tokens"))
    assert (values.dtype, values.shape) == (np.float16, (3, offsets[-1]))
    metadata = json.loads((tmp_path / commit["path"] / "answer_attention/zarr.json").read_bytes())
    (sharding,) = metadata["codecs"]
    assert (sharding["name"], sharding["configuration"]["chunk_shape"]) == ("sharding_indexed", [3, 34])
    for row, sample in enumerate(samples):
        of_sample = "".join("1" if is_answer else "0" for is_answer in mask[tokens[row] : tokens[row + 1]])
        num_answers = len([run for run in of_sample.split("0") if run])
        num_tokens = int(sizes[map_rows[row]]) if map_rows[row] >= 0 else 0
        first, last = offsets[row : row + 2]
        assert last - first == num_answers * num_tokens
        if num_tokens and num_answers:
            found = values[:, first:last].reshape(3, num_answers, num_tokens)
            assert np.array_equal(found, sample.answer_attention_LaN.numpy())


def check_map(data: dict[str, np.ndarray], m: int, made_from: dict[str, Any], entry: EncodedMaps) -> None:
    """Map `m` decoded by the document, in plain numbers, is what this project decodes."""
    n, layers, windows = int(data["map_num_tokens"][m]), made_from["layers"], made_from["windows"]
    config = MapCodecConfig.model_validate(made_from["map_codec"])
    num_entries = n * (n + 1) // 2
    name, cap_factor = config.name, config.cap_factor
    if name == "auto":
        name, cap_factor = ("sqrt8", 2 * cap_factor) if n < config.sqrt8_below else ("sqrt4", cap_factor)
    bits, highest = {"sqrt8": (8, 255), "sqrt4": (4, 15), "sqrt2": (2, 3), "float16": (16, 1)}[name]
    first, last = data["map_code_offsets"][m : m + 2]
    assert last - first == math.ceil(num_entries * bits / 8) if bits < 16 else num_entries

    def code_square(layer: int, e: int) -> float:
        stored = data["map_codes"][layer]
        if bits == 16:
            return float(stored[first + e])
        in_byte = 8 // bits
        return float((int(stored[first + e // in_byte]) >> (e % in_byte * bits)) % 2**bits) ** 2

    flipped, place = set(), 0
    for byte in data["window_flips"][slice(*data["window_flip_offsets"][m : m + 2])].tolist():
        place += byte
        if byte < 255:
            flipped.add(place)
            place += 1
    assert max(flipped, default=0) < len(windows) * num_entries
    begin = int(data["map_num_tokens"][:m].sum())
    rows = window_rows(layers, windows)
    assert entry.windows is not None
    coder = MapCodec(config, rows)
    own_maps = coder.decode(entry)
    own_windows, own_masks = coder.decode_windows(entry)
    size = math.ceil(n / 32)
    first_corner, last_corner = data["map_corner_offsets"][m : m + 2]
    assert last_corner - first_corner == size * (size + 1) // 2

    def corner(i: int, j: int) -> list[float]:
        row, column = i - (n - size), j - (n - size)
        return list(map(float, data["map_corners"][:, first_corner + row * (row + 1) // 2 + column]))

    for i in range(n):
        for j in range(i + 1):
            e = i * (i + 1) // 2 + j
            values = [code_square(layer, e) * float(data["map_caps"][layer, m]) for layer in range(len(layers))]
            assert [value / highest**2 for value in values] == pytest.approx(own_maps[:, i, j].tolist(), rel=1e-6)
            for w, members in enumerate(rows):
                total, units = sum(values[layer] for layer in members), highest**2 * len(members)
                keep = total <= units * float(data["window_thresholds"][w, m])
                keep ^= w * num_entries + e in flipped
                assert keep == bool(own_masks[w, i, j])
                mean = total / units if j < n - size else sum(corner(i, j)[layer] for layer in members) / len(members)
                value = mean + (float(data["window_shifts"][w, begin + j]) if keep else 0)
                assert value == pytest.approx(float(own_windows[w, i, j]), rel=1e-6, abs=1e-9)
    assert torch.count_nonzero(own_windows.triu(1)) == 0
    # A window that is not stored: all layers.
    means, covariances = data["map_means"][:, m].tolist(), data["map_covariances"][:, m].tolist()
    g = len(layers)
    total_covariance = sum(
        covariances[max(a, b) * (max(a, b) + 1) // 2 + min(a, b)] for a in range(g) for b in range(g)
    )
    threshold = sum(means) / g + math.sqrt(total_covariance) / g
    found = window_thresholds((range(g),), entry.windows.means_L, entry.windows.covariances_P)
    assert found.tolist() == pytest.approx([threshold], rel=1e-6)
    other_maps, other_masks = coder.estimate_windows(entry, (range(g),))
    for i in range(n):
        for j in range(i + 1):
            in_tail = i >= n - size <= j
            value = sum(corner(i, j)) / g if in_tail else float(own_maps[:, i, j].double().mean())
            assert value == pytest.approx(float(other_maps[0, i, j]), rel=1e-6, abs=1e-9)
            if abs(value - threshold) > 1e-5 * threshold:
                assert bool(other_masks[0, i, j]) == (value < threshold)
    # Those of a single layer are the cap's: mean + std of the layer.
    if bits < 16:
        for layer in range(g):
            of_layer = means[layer] + math.sqrt(covariances[layer * (layer + 3) // 2])
            assert float(data["map_caps"][layer, m]) <= cap_factor * of_layer * (1 + 1e-6) + 2**-24
