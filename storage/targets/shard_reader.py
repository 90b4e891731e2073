"""Reading target shards: what was committed, or an error that names what is missing."""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from itertools import accumulate, pairwise
from typing import Any, TypeVar

import numpy as np
import torch

from storage.codecs.attention_maps import EncodedMaps
from storage.codecs.codec_settings import num_entries
from storage.codecs.windows import EncodedWindows
from storage.digests import file_sha256
from storage.errors import CorruptData, UserError
from storage.regular_files import read_regular
from storage.stores import Store
from storage.targets.array_reader import ArrayReader
from storage.targets.chunk_bounds import ArrayMetadata
from storage.targets.commits import CommitRecord
from storage.targets.layout import arrays
from storage.targets.manifest import Manifest, check_answer_attention
from storage.targets.row_checks import answers_fault, map_cells_fault
from storage.targets.sample_targets import SampleTargets

_Array = np.ndarray[Any, Any]
_Result = TypeVar("_Result")


class TargetShard:
    """One shard: keys, tokens, offsets and small arrays in memory; logits and maps are read by row."""

    def __init__(self, store: Store, manifest: Manifest, record: CommitRecord) -> None:
        self.record, self._manifest = record, manifest
        self._is_pooled = manifest.fingerprint.map_pooling > 1
        self._specs = arrays(answer_attention=manifest.fingerprint.answer_attention, pooled=self._is_pooled)
        self._where = f"shard {record.shard} of {store.url} ({record.path})"
        try:
            self._folder = store.local(record.path, record.files, self)
        except FileNotFoundError as error:
            raise self._corrupt("its folder", "nothing", "a committed shard") from error
        self._check_files()
        self._arrays = self._guarded("zarr.json", self._open_arrays)
        self._small = {spec.name: self._read(spec.name) for spec in self._specs if not spec.sharded}
        self._check_lengths()
        self._guarded("sample_keys", self._check_order)
        self._guarded("map_num_tokens", self._check_counts)

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """The samples' keys, in the tar's order."""
        data, ends = self._small["sample_keys"].tobytes(), self._small["sample_key_offsets"]
        return tuple(data[a:b].decode() for a, b in pairwise(ends.tolist()))

    def __len__(self) -> int:
        return self.record.num_samples

    @cached_property
    def map_num_tokens(self) -> tuple[int, ...]:
        """N of each stored map: image tokens, or cells of them."""
        return tuple(self._small["map_num_tokens"].tolist())

    @property
    def num_tokens(self) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """`[S]` int64: tokens of each sample, those of images included."""
        return np.diff(self._small["token_offsets"])

    def read(
        self,
        row: int,
        with_maps: bool = True,
        layers: Sequence[int] | None = None,
        with_answers: bool = False,
    ) -> tuple[SampleTargets, EncodedMaps | None]:
        """The targets of one sample, and its maps; None without an image.

        Args:
            row: Position in `keys`.
            with_maps: False leaves the attention maps unread (None is returned for them).
            layers: Teacher layers to read, in this order; only with None, all captured ones, have maps their windows.
            with_answers: True reads answer attention, always of all captured layers, where the sample has an image.

        Raises:
            IndexError: If there is no such row.
            UserError: If a layer was not captured, or answer attention is not stored.
            CorruptData: If stored bytes are missing or damaged.
        """
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {self._where}, which has {len(self)} samples")
        small = self._small
        tokens, rows = self._span("token_offsets", row), self._span("logit_offsets", row)
        map_row = int(small["map_rows"][row])
        sample = SampleTargets(
            key=self.keys[row],
            token_ids=torch.from_numpy(small["token_ids"][tokens].copy()),
            answer_mask=torch.from_numpy(small["answer_mask"][tokens].copy()),
            map_row=map_row if map_row >= 0 else None,
            logits_RQ=self._large("logit_records", rows),
            num_cut_answer_tokens=int(small["cut_answer_tokens"][row]),
            is_turned=bool(small["sample_turned"][row]),
            answer_attention_LaN=self._read_answers(row, map_row) if with_answers and map_row >= 0 else None,
            cells_X=self._cells(map_row) if map_row >= 0 else None,
        )
        return sample, self.read_map(map_row, layers) if with_maps and map_row >= 0 else None

    def read_map(self, map_row: int, layers: Sequence[int] | None = None) -> EncodedMaps:
        """The maps number `map_row`; arguments and errors as for `read`."""
        if not 0 <= map_row < self.record.num_maps:
            raise IndexError(f"map {map_row} of {self._where}, which has {self.record.num_maps} maps")
        rows = self._layer_rows(layers)
        return EncodedMaps(
            num_tokens=self.map_num_tokens[map_row],
            codes_LC=self._large("map_codes", rows, self._span("map_code_offsets", map_row)),
            caps_L=torch.from_numpy(self._small["map_caps"][rows, map_row].copy()),
            windows=self._read_windows(map_row) if layers is None else None,
            cells_X=self._cells(map_row),
        )

    def _cells(self, map_row: int) -> torch.Tensor | None:
        if not self._is_pooled:
            return None
        return torch.from_numpy(self._small["map_cells"][self._span("map_cell_offsets", map_row)].copy())

    def _read_answers(self, row: int, map_row: int) -> torch.Tensor:
        check_answer_attention(self._where, self._manifest.fingerprint)
        values_LH = self._large("answer_attention", slice(None), self._span("answer_attention_offsets", row))
        return values_LH.view(len(values_LH), -1, self.map_num_tokens[map_row])

    def _read_windows(self, map_row: int) -> EncodedWindows:
        tokens = slice(*self._token_ends[map_row : map_row + 2])
        thresholds_W, means_L, covariances_P = (
            torch.from_numpy(self._small[name][:, map_row].copy())
            for name in ("window_thresholds", "map_means", "map_covariances")
        )
        return EncodedWindows(
            thresholds_W=thresholds_W,
            shifts_WN=self._large("window_shifts", slice(None), tokens),
            flips_G=self._large("window_flips", self._span("window_flip_offsets", map_row)),
            means_L=means_L,
            covariances_P=covariances_P,
            tail_blocks_LY=self._large("map_corners", slice(None), self._span("map_corner_offsets", map_row)),
        )

    @cached_property
    def _token_ends(self) -> list[int]:
        return [0, *accumulate(self.map_num_tokens)]

    def _layer_rows(self, layers: Sequence[int] | None) -> slice | list[int]:
        captured = self._manifest.fingerprint.layers
        if layers is None:
            return slice(None)
        if missing := sorted(set(layers) - set(captured)):
            found = f"teacher layers {missing} were not captured, {self._where} has {list(captured)}"
            raise UserError(f"{found}; choose layers among these, or extract again")
        rows = [captured.index(layer) for layer in layers]
        end = rows[0] + len(rows) if rows else 0
        return slice(end - len(rows), end) if rows == list(range(end - len(rows), end)) else rows

    def _span(self, offsets: str, row: int) -> slice:
        return slice(*self._small[offsets][row : row + 2].tolist())

    def _large(self, name: str, *selection: slice | list[int]) -> torch.Tensor:
        return torch.from_numpy(self._read(name, *selection))

    def _read(self, name: str, *selection: slice | list[int]) -> _Array:
        return self._guarded(name, partial(self._arrays[name].read, *selection))

    def _open_arrays(self) -> dict[str, ArrayReader]:
        """All arrays, whose metadata agrees with the record."""
        known = self._committed_sizes
        file_bytes: Counter[str] = Counter()
        for path, (size, _) in self.record.files.items():
            file_bytes[path.partition("/c/")[0]] += size
        return {
            spec.name: ArrayReader(
                self._folder,
                spec.name,
                ArrayMetadata.parse(
                    read_regular(self._folder / spec.name / "zarr.json"),
                    f"{spec.name}/zarr.json",
                    spec.shape(known),
                    spec.dtype.split("|"),
                    file_bytes[spec.name],
                ),
            )
            for spec in self._specs
        }

    def _guarded(self, name: str, action: Callable[[], _Result]) -> _Result:
        """Run a read; whatever the decoders raise means that bytes are not what was committed."""
        try:
            return action()
        except (CorruptData, MemoryError):
            raise
        except Exception as error:
            raise self._corrupt(name, f"{type(error).__name__}: {error}", "readable chunks") from error

    def _check_files(self) -> None:
        """Presence and size of every file; the sha256 of metadata, which no checksum inside Zarr covers."""
        for name, (num_bytes, sha256) in self.record.files.items():
            file = self._folder / name
            found = file.stat().st_size if file.is_file() else None
            if found != num_bytes:
                raise self._corrupt(name, "no file" if found is None else f"{found} bytes", f"{num_bytes} bytes")
            if file.name == "zarr.json" and file_sha256(file) != sha256:
                raise self._corrupt(name, "other bytes", f"sha256 {sha256[:12]}")

    @property
    def _committed_sizes(self) -> dict[str, int]:
        """What the commit record says of the letters of `storage.targets.layout`."""
        record = self.record
        return {"S": record.num_samples, "T": record.num_tokens, "R": record.num_answer_rows, "M": record.num_maps}

    def _check_lengths(self) -> None:
        fingerprint, small = self._manifest.fingerprint, self._small
        sizes = self._committed_sizes | {
            "Q": fingerprint.logit_codec.row_bytes,
            "L": len(fingerprint.layers),
            "P": num_entries(len(fingerprint.layers), causal=True),
            "W": len(fingerprint.windows),
            "U": int(small["sample_key_offsets"][-1]),
            "C": int(small["map_code_offsets"][-1]),
            "Y": int(small["map_corner_offsets"][-1]),
            "N": int(small["map_num_tokens"].sum(dtype=np.int64)),
            "G": int(small["window_flip_offsets"][-1]),
            "H": int(small.get("answer_attention_offsets", np.zeros(1))[-1]),
            "X": int(small.get("map_cell_offsets", np.zeros(1))[-1]),
        }
        for spec in self._specs:
            found, expected = self._arrays[spec.name].metadata.shape, spec.shape(sizes)
            if found != expected:
                raise self._corrupt(spec.name, f"shape {found}", f"shape {expected}")
        for name, end in (("token_offsets", "T"), ("logit_offsets", "R")):
            if int(small[name][-1]) != sizes[end]:
                raise self._corrupt(name, f"end {int(small[name][-1])}", f"end {sizes[end]}")

    def _check_order(self) -> None:
        """Offsets start at 0 and never fall; every sample has its own key, and a map that exists or none."""
        record, rows = self.record, self._small["map_rows"]
        for name in [spec.name for spec in self._specs if spec.is_offsets]:
            offsets = self._small[name]
            if int(offsets[0]) != 0 or bool((np.diff(offsets) < 0).any()):
                raise self._corrupt(name, f"offsets that start at {offsets[0]} or fall", "rising ones from 0")
        with_map = int((rows >= 0).sum())
        if bool(((rows < -1) | (rows >= record.num_maps)).any()) or with_map != record.num_map_references:
            expected = f"{record.num_map_references} samples with one of {record.num_maps} maps"
            raise self._corrupt("map_rows", f"{with_map} samples with maps up to {rows.max(initial=-1)}", expected)
        keys = {*self.keys, *(sample.key for sample in record.skipped)}
        if len(keys) != (wanted := len(self) + len(record.skipped)):
            raise self._corrupt(
                "sample_keys", f"{len(keys)} different keys, with those of skipped samples", f"{wanted}"
            )

    def _check_counts(self) -> None:
        """What the record sums up is so, each map is some sample's, and no sample is longer than they may."""
        record, sizes = self.record, self.map_num_tokens
        used = [row for row in self._small["map_rows"].tolist() if row >= 0]
        found = {"num_maps": len(set(used)), **_sums("map", sizes), **_sums("referenced", [sizes[row] for row in used])}
        turned = int(self._small["sample_turned"].sum())
        if turned != record.num_turned:
            raise self._corrupt("sample_turned", f"{turned} samples", f"{record.num_turned}, as the record says")
        for name, count in found.items():
            if count != getattr(record, name):
                raise self._corrupt("map_num_tokens", f"{name} {count}", f"{getattr(record, name)}, as the record says")
        cuts = self._small["cut_answer_tokens"]
        found_cuts = int((cuts > 0).sum()), int(cuts.sum(dtype=np.int64))
        said_cuts = record.num_cut_samples, record.num_cut_answer_tokens
        if found_cuts != said_cuts or int(cuts.min(initial=0)) < 0:
            raise self._corrupt(
                "cut_answer_tokens",
                f"{found_cuts[0]} cut samples that lost {found_cuts[1]} answer tokens",
                f"{said_cuts[0]} that lost {said_cuts[1]}, as the record says, and no number below 0",
            )
        if self._manifest.fingerprint.answer_attention and (fault := answers_fault(self._small, sizes)):
            raise self._corrupt(*fault)
        if self._is_pooled and (fault := map_cells_fault(self._small, sizes)):
            raise self._corrupt(*fault)
        if min(sizes, default=1) < 1:
            raise self._corrupt("map_num_tokens", f"a map of {min(sizes)} tokens", "at least 1")
        if (longest := self.num_tokens.max(initial=0)) > (limit := self._manifest.fingerprint.max_length):
            raise self._corrupt("token_offsets", f"a sample of {longest} tokens", f"at most max_length, {limit}")

    def _corrupt(self, name: str, found: str, expected: str) -> CorruptData:
        return CorruptData(
            f"{self._where}: {name}: found {found}, expected {expected}; run `cdp verify` on the store, "
            "restore the file or extract this shard again"
        )


def _sums(of: str, sizes: Sequence[int]) -> dict[str, int]:
    """The record's two sums over maps of so many tokens."""
    return {f"num_{of}_tokens": sum(sizes), f"num_{of}_squares": sum(size * size for size in sizes)}
