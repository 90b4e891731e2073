"""FORMAT.md is true: its dumps are of a store made now, and tensorstore decodes a shard by its text."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from storage.codecs import MapCodecConfig, decode_maps, unpack_mask
from storage.manifest import create_or_check
from storage.stores import open_store
from storage.targets import write_shard
from tests.storage.builders import extract, manifest, pack, shard_content

DOCUMENT = Path(__file__).parents[2] / "storage" / "FORMAT.md"


def dumps() -> list[dict[str, Any]]:
    blocks = DOCUMENT.read_text().split("```json\n")[1:]
    return [json.loads(block.partition("```")[0]) for block in blocks]


def test_the_documents_dumps_are_of_a_real_store(tmp_path):
    (record,) = extract(pack(tmp_path / "samples", (3,)), open_store(tmp_path / "targets"), skip=("s0-2",))
    index, head, commit, group, codes, tokens = dumps()
    folder = tmp_path / "targets" / record.path

    def stored(path: Path) -> Any:
        return json.loads(path.read_bytes())

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


@pytest.mark.parametrize("codec", ["sqrt8", "float16"])
def test_tensorstore_reads_a_shard_by_the_document_alone(tmp_path, codec):
    tensorstore = pytest.importorskip("tensorstore")
    made_for = manifest(map_codec=MapCodecConfig(name=codec))
    store = open_store(tmp_path)
    create_or_check(store, made_for)
    keys = [f"k{number}" for number in range(7)]
    samples, maps = shard_content(made_for, keys, sizes=(9, 6))
    write_shard(store, 0, made_for, "samples-000000.tar", samples, maps, [])

    commit = json.loads((tmp_path / "commits/000000.json").read_bytes())
    head = json.loads((tmp_path / "manifest.json").read_bytes())

    def array(name: str) -> np.ndarray:
        where = {"driver": "file", "path": f"{tmp_path}/{commit['path']}/{name}/"}
        return tensorstore.open({"driver": "zarr3", "kvstore": where}, open=True).result().read().result()

    names = ["sample_keys", "sample_key_offsets", "token_ids", "answer_mask", "token_offsets", "map_rows"]
    names += ["logit_ids", "logit_logprobs", "logit_tail_logmass", "logit_log_partition", "logit_offsets"]
    names += ["map_num_tokens", "map_caps", "map_codes", "map_code_offsets", "keep_masks", "keep_mask_offsets"]
    data = {name: array(name) for name in names}
    assert {file.partition("/")[0] for file in commit["files"]} == {*names, "zarr.json"}
    for row, sample in enumerate(samples):
        a, b = data["sample_key_offsets"][row : row + 2]
        assert data["sample_keys"][a:b].tobytes().decode() == sample.key
        a, b = data["token_offsets"][row : row + 2]
        assert data["token_ids"][a:b].tolist() == sample.token_ids.tolist()
        assert data["answer_mask"][a:b].tolist() == sample.answer_mask.tolist()
        a, b = data["logit_offsets"][row : row + 2]
        assert data["logit_ids"][a:b].tolist() == sample.logits.ids_RK.tolist()
        assert data["logit_logprobs"][a:b].tolist() == sample.logits.logprobs_RK.tolist()
        assert data["logit_tail_logmass"][a:b].tolist() == sample.logits.tail_logmass_R.tolist()
        assert data["logit_log_partition"][a:b].tolist() == sample.logits.log_partition_R.tolist()
        m = data["map_rows"][row]
        if sample.map_row is None:
            assert m == -1
            continue
        n = int(data["map_num_tokens"][m])
        entry = maps[sample.map_row]
        decoded = decode_maps(made_for.fingerprint.map_codec, entry.codes_LE, entry.caps_L, n)
        kept = unpack_mask(entry.keep_masks, n, causal=True)
        first, mask_first = data["map_code_offsets"][m], data["keep_mask_offsets"][m]
        assert data["map_code_offsets"][m + 1] - first == n * (n + 1) // 2
        assert data["keep_mask_offsets"][m + 1] - mask_first == math.ceil(n * (n + 1) / 2 / 8)
        for i in range(n):
            for j in range(i + 1):
                e = i * (i + 1) // 2 + j
                for layer in range(len(head["fingerprint"]["layers"])):
                    code, cap = float(data["map_codes"][layer, first + e]), float(data["map_caps"][layer, m])
                    value = (code / 255) ** 2 * cap if codec == "sqrt8" else code
                    assert value == pytest.approx(float(decoded[layer, i, j]), rel=1e-6, abs=1e-9)
                for window in range(len(head["fingerprint"]["windows"])):
                    byte = int(data["keep_masks"][window, mask_first + e // 8])
                    assert bool(byte >> (e % 8) & 1) == bool(kept[window, i, j])
    assert torch.count_nonzero(decoded.triu(1)) == 0
