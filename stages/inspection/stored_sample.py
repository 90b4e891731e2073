"""What a target store holds of one sample, decoded."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from stages.checkpoints.configs import load_config
from stages.checkpoints.processors import load_processor
from stages.conversations.token_runs import TokenRun, token_runs, token_texts
from storage.codecs.answer_logits import AnswerLogitsCodec
from storage.codecs.attention_maps import MapCodec
from storage.codecs.codec_settings import LogitCodecConfig, num_entries
from storage.codecs.token_cells import attended_cells
from storage.targets.sample_targets import SampleTargets
from storage.targets.store import TargetStore

NUM_LIKELIEST = 5


@dataclass(frozen=True)
class Prediction:
    """What the teacher says of one answer token before it has read it."""

    position: int
    """Of the token, from 0."""
    text: str
    probability: float
    """Of this token; where it is not among the kept ones, an upper bound."""
    is_kept: bool
    likeliest: tuple[tuple[str, float], ...]
    """The likeliest tokens with their probabilities, by falling probability."""


@dataclass(frozen=True)
class WindowMap:
    """The mean map of one window of layers."""

    layers: tuple[int, ...]
    map_NN: Tensor
    """float32, query by key."""
    sink_share: float
    """Part of the entries a query can see that the sink mask leaves out."""


@dataclass(frozen=True)
class StoredSampleView:
    """One sample of a target store."""

    key: str
    shard: int
    row: int
    runs: tuple[TokenRun, ...]
    num_cut_answer_tokens: int
    windows: tuple[WindowMap, ...]
    """The stored windows; none without an image."""
    predictions: tuple[Prediction, ...]
    """One for each answer token."""


def view_sample(targets: TargetStore, name: str) -> StoredSampleView:
    """Finds a sample by its key or number, and decodes all that is stored of it.

    Raises:
        UserError: If there is no such sample, or the store has no `teacher/` yet.
        CorruptData: If stored bytes are missing or damaged.
    """
    number, row = targets.find(name)
    sample, maps = targets.shard(number).read(row)
    folder = targets.teacher_folder()
    tokenizer, fingerprint = load_processor(folder).tokenizer, targets.manifest.fingerprint
    windows: tuple[WindowMap, ...] = ()
    if maps is not None:
        codec = MapCodec.of_layers(fingerprint.map_codec, fingerprint.layers, fingerprint.windows)
        maps_WNN, keep_WNN = codec.decode_windows(maps)
        seen = num_entries(maps.num_tokens, fingerprint.map_codec.causal)
        if maps.cells_X is not None:
            seen = int(attended_cells(maps.cells_X).sum())
        windows = tuple(
            WindowMap(layers, map_NN, 1 - int(keep_NN.sum()) / seen)
            for layers, map_NN, keep_NN in zip(fingerprint.windows, maps_WNN, keep_WNN, strict=True)
        )
    image_token_id = load_config(folder).image_token_id
    return StoredSampleView(
        key=sample.key,
        shard=number,
        row=row,
        runs=tuple(token_runs(tokenizer, sample.token_ids, sample.answer_mask, image_token_id)),
        num_cut_answer_tokens=sample.num_cut_answer_tokens,
        windows=windows,
        predictions=tuple(_predictions(fingerprint.logit_codec, tokenizer, sample)),
    )


def _predictions(codec: LogitCodecConfig, tokenizer: Any, sample: SampleTargets) -> Iterator[Prediction]:
    decoded = AnswerLogitsCodec(codec).decode(sample.logits_RQ)
    probs_RK, _, _ = decoded.probabilities()
    ids, positions = sample.token_ids.tolist(), sample.answer_mask.nonzero()[:, 0].tolist()
    rows = zip(positions, decoded.ids_RK.tolist(), probs_RK.tolist(), strict=True)
    for position, kept_ids, probs in rows:

        def text(token: int, before: int = ids[position - 1]) -> str:
            return token_texts(tokenizer, [before, token])[1]

        token, by_id = ids[position], dict(zip(kept_ids, probs, strict=True))
        likeliest = tuple((text(one), by_id[one]) for one in kept_ids[:NUM_LIKELIEST])
        yield Prediction(position, text(token), by_id.get(token, probs[-1]), token in by_id, likeliest)
