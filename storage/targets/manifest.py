"""What a target store was made from, and the refusal to mix it with anything else."""

import operator
from itertools import pairwise
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from storage.codecs.codec_settings import LogitCodecConfig, MapCodecConfig
from storage.digests import canonical_json, digest_of, parse_record
from storage.errors import CorruptData, FingerprintMismatch, UserError
from storage.regular_files import MAX_BYTES
from storage.samples.image_settings import ImageConfig
from storage.stores import Store
from storage.stores.recognize import TARGET_STORE, read_sign
from storage.strict_model import StrictModel

MANIFEST_PATH = "manifest.json"
FORMAT_VERSION, ANSWER_FORMAT_VERSION, POOLED_FORMAT_VERSION = 3, 4, 5
FORMAT_VERSIONS = (FORMAT_VERSION, ANSWER_FORMAT_VERSION, POOLED_FORMAT_VERSION)
"""Versions of the target store's layout: without and with answer attention, and with maps of cells. A store that has
neither is the bytes it always was."""
MAX_POOLING = 4
"""Image tokens along a side of a cell."""
MAX_LAYERS = 2**12
MAX_SHARDS = 2**22
"""No teacher has so many layers, and no index of samples lists more shards; memory goes by both."""
OTHER_SAMPLES = (
    "Samples differ also where the same data was packed again into shards of another size (--samples-per-shard, "
    "--shard-bytes): targets belong to the shards that they were made from"
)
_SHOWN_CHARS = 60
_ABSENT = "(absent)"

Cut = Literal["whole_turns", "tokens"]
"""Where a too long conversation ends: with the last answer that fits whole, or with the last token that fits."""

_Layers = tuple[Annotated[int, Field(ge=0, lt=MAX_LAYERS)], ...]


class Fingerprint(StrictModel):
    """All that decides which bytes an extraction writes; no default in what every store has, so nothing is unknown."""

    teacher_weights: str
    """Digest of the teacher's weights."""
    teacher_config: dict[str, Any]
    processor: dict[str, Any]
    """The image processor's and processor's settings."""
    chat_template: str
    tokenizer: str
    """Digest of the tokenizer's files."""
    layers: _Layers
    """Captured teacher layers, counted from 0, in stored order."""
    windows: tuple[_Layers, ...]
    """Teacher layers of each standard window, in stored order."""
    map_codec: MapCodecConfig
    logit_codec: LogitCodecConfig
    dtype: str
    """The teacher's compute type, such as `bfloat16`."""
    max_length: int = Field(ge=1, le=1_000_000)
    """Tokens that a sample has at most."""
    cut: Cut
    """Where a longer one ends."""
    images: ImageConfig
    """How pictures are read and placed."""
    image_backend: str
    """What made the pixels: PIL and torchvision differ, and the processor's settings do not say which ran."""
    samples: str
    """Digest of the sample index."""
    capture_version: int = Field(ge=1, lt=2**31)
    """Raised when the capture code changes what it computes."""
    answer_attention: bool = Field(default=False, exclude_if=operator.not_)
    """Whether answer attention is stored. Only versions 4 and 5 of the format have the field, and always true."""
    prefix_reuse: bool = Field(default=False, exclude_if=operator.not_)
    """Whether what comes up to a sample's last image was computed once for all samples that share it. The field is
    there only where it is true; without it each sample was computed as a whole."""
    tensor_ranks: int = Field(default=1, ge=1, lt=MAX_LAYERS, exclude_if=lambda number: number == 1)
    """Processes over which each layer of the teacher was split, which changes the order of sums. The field is there
    only where it is above 1."""
    map_pooling: int = Field(default=1, ge=1, le=MAX_POOLING, exclude_if=lambda side: side == 1)
    """Image tokens along a side of the cells that maps are of. Only version 5 of the format has the field, above 1."""
    max_image_tokens: int | None = Field(default=None, ge=1, le=1_000_000, exclude_if=lambda limit: limit is None)
    """Samples with more image tokens were left out. The field is there only where there was a limit."""

    @model_validator(mode="after")
    def _check_layers(self) -> Self:
        if any(low >= high for low, high in pairwise(self.layers)):
            raise ValueError(f"layers {self.layers} do not rise")
        for window in self.windows:
            first = self.layers.index(window[0]) if window and window[0] in self.layers else 0
            if not window or window != self.layers[first : first + len(window)]:
                raise ValueError(f"window {window} is not of neighbours among the captured layers {self.layers}")
        if self.map_pooling > 1 and self.map_codec.causal:
            raise ValueError("maps of cells are no triangles, but map_codec says so")
        return self

    @property
    def format_version(self) -> int:
        """The layout that a store of these targets has."""
        if self.map_pooling > 1:
            return POOLED_FORMAT_VERSION
        return ANSWER_FORMAT_VERSION if self.answer_attention else FORMAT_VERSION

    @property
    def digest(self) -> str:
        """Sha256 of all fields."""
        return digest_of(self.model_dump(mode="json"))

    def differences(self, other: Self) -> list[str]:
        """Names of the fields that differ, sorted; entries of dicts as `teacher_config.num_hidden_layers`."""
        return sorted(_differences(self.model_dump(mode="json"), other.model_dump(mode="json")))


class Manifest(StrictModel):
    """The head of a target store: its format, fingerprint and sizes."""

    format_version: int
    """Layout of the store, see FORMAT.md."""
    fingerprint: Fingerprint
    """What the targets were made from."""
    num_layers: int = Field(ge=1, le=MAX_LAYERS)
    """Decoder layers of the teacher, captured or not."""
    hidden_size: int = Field(ge=1, le=2**24)
    """Width of the teacher's decoder. Nothing reads it; without it this would be another format."""
    num_shards: int = Field(ge=0, le=MAX_SHARDS)
    """Sample shards, and so target shards when extraction is complete."""

    @model_validator(mode="after")
    def _check_sizes(self) -> Self:
        if any(layer >= self.num_layers for layer in self.fingerprint.layers):
            raise ValueError(f"layers {self.fingerprint.layers} are not those of {self.num_layers}")
        if self.format_version != self.fingerprint.format_version:
            raise ValueError(f"format version {self.format_version}, the fingerprint has that of another")
        return self

    @property
    def sizes(self) -> dict[str, int]:
        """Sizes that the teacher's config has as well, by their names there."""
        return {"num_hidden_layers": self.num_layers, "hidden_size": self.hidden_size, "vocab_size": self.vocab_size}

    @property
    def vocab_size(self) -> int:
        """Width of the teacher's logits."""
        return self.fingerprint.logit_codec.vocab_size

    @property
    def digest(self) -> str:
        """Sha256 of all fields; commit records name it, so none of them can be changed later."""
        return digest_of(self.model_dump(mode="json"))

    def to_bytes(self) -> bytes:
        """The file's bytes: canonical JSON with a digest of all else."""
        return canonical_json({**self.model_dump(mode="json"), "digest": self.digest})

    @classmethod
    def load(cls, store: Store) -> Self:
        """Read `manifest.json`.

        Raises:
            UserError: When there is none, or it has a format this version does not read.
            CorruptData: When its bytes are not what was written.
        """
        where = f"{store.url}/{MANIFEST_PATH}"
        data = read_sign(store, MANIFEST_PATH, MAX_BYTES, TARGET_STORE)
        fields = parse_record(data, where, *FORMAT_VERSIONS)
        digest = fields.pop("digest", None)
        try:
            manifest = cls.model_validate(fields)
        except ValidationError as error:
            raise CorruptData(f"{where} is no manifest: {error}; restore it or extract again") from error
        if manifest.to_bytes() != data:
            found, said = digest_of(fields)[:12], str(digest)[:12]
            raise CorruptData(f"{where} has digest {found}, it says {said}; restore it or extract again")
        return manifest


def create_or_check(store: Store, manifest: Manifest) -> None:
    """Write the manifest of a new store, or make sure that an existing one is the same.

    Raises:
        FingerprintMismatch: Naming each differing field with both values; the store is left as it is.
    """
    if store.create(MANIFEST_PATH, manifest.to_bytes()):
        return
    check_same(store.url, Manifest.load(store), manifest)


def check_same(url: str, stored: Manifest, manifest: Manifest) -> None:
    """Make sure that the store at `url`, which has the manifest `stored`, is what `manifest` says.

    Raises:
        FingerprintMismatch: Naming each differing field with both values.
    """
    differing = _differences(stored.model_dump(mode="json"), manifest.model_dump(mode="json"))
    if not differing:
        return
    lines = [
        f"  {name.removeprefix('fingerprint.')}: stored {_shown(theirs)}, this run {_shown(ours)}"
        for name, (theirs, ours) in sorted(differing.items())
    ]
    hint = f"\n{OTHER_SAMPLES}" if "fingerprint.samples" in differing else ""
    raise FingerprintMismatch(
        f"targets at {url} were made from something else than this run names; it differs in:\n"
        + "\n".join(lines)
        + hint
        + "\nUse the settings they were made with, or extract into a new folder; nothing was changed"
    )


def check_answer_attention(where: str, fingerprint: Fingerprint) -> None:
    """Refuses targets that hold no answer attention, for what needs it.

    Raises:
        UserError: If they hold none; names them as `where`.
    """
    if not fingerprint.answer_attention:
        raise UserError(
            f"{where} holds no answer attention; extract into a new folder with teacher.answer_attention=true, or set "
            "answer_attention_weight to 0"
        )


def _differences(left: dict[str, Any], right: dict[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Both values of each field that differs, by its dotted name."""
    differing: dict[str, tuple[Any, Any]] = {}
    for key in left.keys() | right.keys():
        pair = one, other = left.get(key, _ABSENT), right.get(key, _ABSENT)
        if isinstance(one, dict) and isinstance(other, dict):
            differing |= _differences(one, other, f"{prefix}{key}.")
        elif canonical_json(one) != canonical_json(other):
            differing[f"{prefix}{key}"] = pair
    return differing


def _shown(value: Any) -> str:
    text = value if value is _ABSENT else canonical_json(value).decode()
    return text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}... ({len(text)} characters)"
