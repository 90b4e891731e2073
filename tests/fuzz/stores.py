"""Target stores and sample sets of a stranger: documents, arrays, tars; with and without digests that fit."""

import json
import zlib
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from hypothesis import strategies as st

from storage.codecs.answer_logits import AnswerLogitsCodec
from storage.codecs.attention_maps import MapCodec
from storage.errors import UserError
from storage.integrity.verify import verify
from storage.samples.sample_set import SampleSet
from storage.stores import open_store
from storage.streaming.join import JoinedShard
from storage.targets.layout import ARRAYS
from storage.targets.manifest import Manifest
from storage.targets.store import TargetStore
from storage.targets.summary import summarize
from storage.targets.teacher_assets import save_teacher
from tests.fuzz.attempt import Mutant, Target
from tests.fuzz.mutants import spoiled, spoiled_bytes, spoiled_json, spoiled_values
from tests.storage.builders import extract, files_of, pack
from tests.storage.integrity.forging import documents, forge_document
from tests.storage.targets.test_reading import recommit

TEACHER_CONFIG = {"text_config": {"num_hidden_layers": 6, "hidden_size": 16, "vocab_size": 50}}
EXTREMES = [0, 1, -1, 2**31 - 1, -(2**31), 2**32 - 1, 2**63 - 1, -(2**63), 2**64 - 1]

UNTOLD = {"num_levels": 128, "temperatures": (2.0,)}
"""Settings of which verify cannot tell whether records were made with others, see `test_forged_numbers.UNTOLD`."""


def make(root: Path) -> None:
    """One shard of five samples, with maps of two sizes and a skipped sample; a teacher of two files."""
    samples, store = pack(root / "samples", (6,)), open_store(root / "targets")
    extract(samples, store, skip=("s0-5",), teacher_config=TEACHER_CONFIG)
    staged = store.staging("teacher")
    (staged / "config.json").write_text('{"a":1}')
    (staged / "b.json").write_text("[]")
    save_teacher(store, Manifest.load(store), staged)
    (root / "targets/reports").mkdir()
    (root / "targets/reports/extraction.json").write_text('{"shards": 1}')


def decoded(root: Path) -> str:
    """Digest of all values that a reader of both stores gets."""
    digest = sha256()
    targets, samples = TargetStore.open(root / "targets"), SampleSet.open(root / "samples")
    summarize(root / "targets")
    made = targets.manifest.fingerprint
    maps_of = MapCodec.of_layers(made.map_codec, made.layers, made.windows)
    for number in targets.commits:
        shard = JoinedShard(samples, targets, number)
        try:
            for row in range(len(shard.num_tokens)):
                sample = shard.read(row, None, with_maps=True)
                digest.update(json.dumps([sample.key, sample.record]).encode() + b"".join(sample.images))
                rows = AnswerLogitsCodec(made.logit_codec).decode(sample.targets.logits_RQ)
                tensors = [sample.targets.token_ids, sample.targets.answer_mask, rows.ids_RK, rows.logprobs_RK]
                tensors += [rows.tails_RX] + ([maps_of.decode(sample.maps)] if sample.maps else [])
                for tensor in tensors:
                    digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
                    digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
        finally:
            shard.close()
    digest.update(json.dumps({name: len(data) for name, data in files_of(targets.teacher_folder()).items()}).encode())
    return digest.hexdigest()


def read(root: Path) -> str | None:
    """As `decoded`; None if verify does not say that all is whole."""
    error, whole = None, False
    try:
        whole = verify(root / "targets", root / "samples").ok
    except UserError as found:
        error = found
    values = decoded(root)
    if error is not None:
        raise error
    codec = Manifest.load(open_store(root / "targets")).fingerprint.logit_codec
    return values if whole and {name: getattr(codec, name) for name in UNTOLD} == UNTOLD else None


def read_values(root: Path) -> None:
    """Both, when what they give may differ: whoever makes all digests right may store any values."""
    read(root)


def any_file(root: Path) -> st.SearchStrategy[Mutant]:
    """One file is spoiled, and no digest made right."""
    return st.one_of([_replaced(root, path) for path in _files(root)])


def _files(root: Path) -> list[Path]:
    return sorted(path.relative_to(root) for path in root.rglob("*") if path.is_file())


def _replaced(root: Path, path: Path) -> st.SearchStrategy[Mutant]:
    return spoiled(path.name, (root / path).read_bytes()).map(lambda data: lambda copy: _write(copy / path, data))


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def forged_documents(root: Path) -> st.SearchStrategy[Mutant]:
    """Values of one document are changed, and every digest is made right."""

    def forged(name: str, path: Path) -> st.SearchStrategy[Mutant]:
        def change(document: Any) -> Mutant:
            def mutant(copy: Path) -> None:
                try:
                    forge_document(copy, name, document)
                except (KeyError, TypeError, IndexError, AttributeError, ValueError, OSError, RecursionError):
                    # What should hold a digest is not there any more.
                    documents(copy)[name].write_text(json.dumps(document))

            return mutant

        return spoiled_values(json.loads(path.read_bytes())).map(change)

    return st.one_of([forged(name, path) for name, path in documents(root).items()])


def forged_arrays(root: Path) -> st.SearchStrategy[Mutant]:
    """A shard's files are spoiled, or values of its arrays changed, and every digest is made right."""
    (folder,) = (root / "targets/shards").iterdir()
    names = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    files = [
        spoiled(name.name, (folder / name).read_bytes()).map(
            lambda data, name=name: _recommitted(lambda f: _write(f / name, data))
        )
        for name in names
    ]
    values = st.tuples(
        st.sampled_from([spec.name for spec in ARRAYS]), st.integers(0, 10**6), st.sampled_from(EXTREMES)
    ).map(lambda drawn: _recommitted(lambda folder: _set(folder, *drawn)))
    return st.one_of(*files, *([values] * len(files)))


def _recommitted(spoil: Any) -> Mutant:
    def mutant(copy: Path) -> None:
        (folder,) = (copy / "targets/shards").iterdir()
        spoil(folder)
        recommit(copy, folder)

    return mutant


def _set(folder: Path, name: str, place: int, value: int) -> None:
    """One value of an array becomes another, in chunks with right checksums."""
    array = zarr.open_array(folder / name, mode="r+")
    if values := array[...].size:
        held = np.asarray(array[...])
        kind = held.dtype
        new = value % 2 if kind.kind == "b" else np.array(value % 2**64, np.uint64).astype(kind)
        if kind.kind == "f":
            new = np.array([np.nan, np.inf, -np.inf, -1, 0, 1e30, 6e4, 1, 2])[EXTREMES.index(value)].astype(kind)
        held.flat[place % values] = new
        array[...] = held


def forged_tars(root: Path) -> st.SearchStrategy[Mutant]:
    """The tar or its table is spoiled, and their digests, sizes and sums in the index are made right."""
    tar = (root / "samples/samples-000000.tar").read_bytes()
    table = (root / "samples/samples-000000.json").read_bytes()
    return st.tuples(
        st.one_of(st.just(tar), spoiled_bytes(tar)),
        st.one_of(st.just(table), spoiled_json(table), spoiled_bytes(table)),
    ).map(lambda drawn: lambda copy: _repack(copy / "samples", *drawn))


def _repack(folder: Path, tar: bytes, table: bytes) -> None:
    with suppress(ValueError, KeyError, TypeError, IndexError, RecursionError, AttributeError):
        fields = json.loads(table)
        for row in fields["members"]:
            row[2] = zlib.crc32(b"".join(tar[start : start + size] for start, size in row[1]))
        table = json.dumps(fields, separators=(",", ":")).encode()
    _write(folder / "samples-000000.tar", tar)
    _write(folder / "samples-000000.json", table)
    index = json.loads((folder / "index.json").read_bytes())
    index["shards"][0] |= {
        "bytes": len(tar),
        "sha256": sha256(tar).hexdigest(),
        "table_bytes": len(table),
        "table_sha256": sha256(table).hexdigest(),
    }
    _write(folder / "index.json", json.dumps(index, separators=(",", ":")).encode())


def read_samples(root: Path) -> None:
    """Every sample of the set."""
    samples = SampleSet.open(root / "samples")
    with samples.shard(0) as shard:
        for row in range(len(shard)):
            shard.read(row)


TARGETS = [
    Target("store files", make, read, any_file),
    Target("store documents", make, read, forged_documents),
    Target("store arrays", make, read_values, forged_arrays),
    Target("tars", make, read_samples, forged_tars),
]
