"""Small manifests, samples and targets that the storage tests share."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from webdataset import DataPipeline

from storage.codecs.answer_attention import num_answers
from storage.codecs.answer_logits import AnswerLogitsCodec
from storage.codecs.attention_maps import EncodedMaps, MapCodec
from storage.codecs.codec_settings import LogitCodecConfig, MapCodecConfig
from storage.codecs.tail_samples import row_addresses
from storage.samples.image_settings import ImageConfig
from storage.samples.members import StoredSample
from storage.samples.sample_set import SampleSet
from storage.samples.shard_writer import SampleShardWriter
from storage.stores import Store, owner
from storage.streaming.stream import Mixture, Source, StreamConfig, mixture_stream
from storage.targets.commits import CommitRecord, SkippedSample
from storage.targets.manifest import Fingerprint, Manifest, create_or_check
from storage.targets.sample_targets import SampleTargets
from storage.targets.shard_writer import write_shard
from storage.targets.store import TargetStore

VOCAB = 50
PNG = b"\x89PNG\r\n\x1a\n"
JPG = b"\xff\xd8\xff\xe0"


def fingerprint(**changes: Any) -> Fingerprint:
    fields: dict[str, Any] = {
        "teacher_weights": "w" * 64,
        "teacher_config": {"model_type": "llava", "text_config": {"num_hidden_layers": 6}},
        "processor": {"size": {"height": 48, "width": 48}},
        "chat_template": "{% for m in messages %}{{ m }}{% endfor %}",
        "tokenizer": "t" * 64,
        "layers": (2, 3, 4),
        "windows": ((2, 3), (3, 4)),
        "map_codec": MapCodecConfig(name="sqrt4"),
        "logit_codec": LogitCodecConfig(
            vocab_size=VOCAB, top_k=12, num_tail_samples=4, temperatures=(2.0,), num_tempered_samples=6
        ),
        "dtype": "float32",
        "max_length": 128,
        "cut": "whole_turns",
        "images": ImageConfig(),
        "image_backend": "pil",
        "samples": "s" * 64,
        "capture_version": 1,
    }
    return Fingerprint(**{**fields, **changes})


def manifest(num_shards: int = 1, num_layers: int = 6, **changes: Any) -> Manifest:
    made_from = fingerprint(**changes)
    return Manifest(
        format_version=made_from.format_version,
        fingerprint=made_from,
        num_layers=num_layers,
        hidden_size=16,
        num_shards=num_shards,
    )


def random_maps(num_layers: int, num_tokens: int, seed: int, causal: bool = True) -> torch.Tensor:
    """`[L, N, N]` float32 attention with a sink column and rows that sum to less than 1."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(num_layers, num_tokens, num_tokens + 3, generator=generator) * 2
    scores[:, :, 3] += 3
    if causal:
        future = torch.ones(num_tokens, num_tokens, dtype=torch.bool).triu(1)
        scores[:, :, 3:].masked_fill_(future, -torch.inf)
    return scores.softmax(-1)[:, :, 3:].contiguous()


def map_targets(made_for: Manifest, num_tokens: int, seed: int) -> EncodedMaps:
    made = made_for.fingerprint
    maps_LNN = random_maps(len(made.layers), num_tokens, seed, made.map_codec.causal)
    return MapCodec.of_layers(made.map_codec, made.layers, made.windows).encode(maps_LNN)


def sample_targets(
    made_for: Manifest, key: str, num_tokens: int, num_answers: int, map_row: int | None, seed: int
) -> SampleTargets:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(num_tokens, dtype=torch.bool)
    mask[num_tokens - num_answers :] = True
    logits_RV = torch.randn(num_answers, made_for.vocab_size, generator=generator) * 3
    token_ids = torch.randint(0, made_for.vocab_size, (num_tokens,), generator=generator, dtype=torch.int32)
    records = AnswerLogitsCodec(made_for.fingerprint.logit_codec).encode(logits_RV, row_addresses(key, num_answers))
    is_turned = map_row is not None and seed % 3 == 1
    return SampleTargets(key, token_ids, mask, map_row, records, is_turned=is_turned)


def shard_content(
    made_for: Manifest, keys: list[str], seed: int = 0, sizes: tuple[int, ...] = (9, 9, 6)
) -> tuple[list[SampleTargets], list[EncodedMaps]]:
    """One sample a key: two samples share each map, every fifth has no image, every fourth no answer."""
    samples: list[SampleTargets] = []
    maps: list[EncodedMaps] = []
    for row, key in enumerate(keys):
        map_row = None
        if row % 5 != 4:
            if row % 2 == 0 or not maps:
                maps.append(map_targets(made_for, sizes[len(maps) % len(sizes)], seed * 1000 + row))
            map_row = len(maps) - 1
        answers = 0 if row % 4 == 3 else 1 + row % 3
        samples.append(sample_targets(made_for, key, 5 + row % 7, answers, map_row, seed * 1000 + row))
    if made_for.fingerprint.answer_attention:
        samples = [with_answer_attention(made_for, sample, maps) for sample in samples]
    return samples, maps


def with_answer_attention(made_for: Manifest, sample: SampleTargets, maps: list[EncodedMaps]) -> SampleTargets:
    """With a vector for each answer of a sample that has an image; two answers where the mask has room for it."""
    mask = sample.answer_mask.clone()
    if int(mask.sum()) > 1 and int(mask.nonzero()[0]) > 2:
        mask[int(mask.nonzero()[0])], mask[1] = False, True
    sample = replace(sample, answer_mask=mask)
    if sample.map_row is None:
        return sample
    num_layers, num_tokens = len(made_for.fingerprint.layers), maps[sample.map_row].num_tokens
    generator = torch.Generator().manual_seed(len(sample.token_ids))
    scores = torch.randn(num_layers, num_answers(sample.answer_mask), num_tokens + 1, generator=generator)
    return replace(sample, answer_attention_LaN=scores.softmax(-1)[..., 1:].half())


def stored_samples(keys: list[str]) -> list[StoredSample]:
    images = [(PNG + key.encode() * 9,) if row % 5 != 4 else () for row, key in enumerate(keys)]
    return [
        StoredSample(key, {"id": f"id-{key}", "conversations": [{"from": "human", "value": "é?"}]}, image)
        for key, image in zip(keys, images, strict=True)
    ]


def pack(out: Path, shard_sizes: tuple[int, ...]) -> SampleSet:
    """A sample set with one shard of each size."""
    # Groups as large as the limit: each fills a shard of its own.
    with SampleShardWriter(out, max_samples=max(shard_sizes), max_bytes=10**9) as writer:
        for shard, size in enumerate(shard_sizes):
            writer.add_group(stored_samples([f"s{shard}-{row}" for row in range(size)]))
            writer._finish_shard()
    return SampleSet.open(out)


def write_table(folder: Path, data: bytes, **entry: Any) -> None:
    """Replace the first shard's member table, and let the index name it, with other fields of the entry as well."""
    (folder / "samples-000000.json").write_bytes(data)
    index = json.loads((folder / "index.json").read_bytes())
    index["shards"][0] |= {"table_bytes": len(data), "table_sha256": sha256(data).hexdigest(), **entry}
    (folder / "index.json").write_bytes(json.dumps(index, separators=(",", ":")).encode())


def extract(samples: SampleSet, store: Store, skip: tuple[str, ...] = (), **changes: Any) -> list[CommitRecord]:
    """Targets for a whole sample set, without a teacher."""
    index = samples.index
    made_for = manifest(len(index.shards), samples=index.digest, **changes)
    create_or_check(store, made_for)
    records = []
    for number, entry in enumerate(index.shards):
        keys = [members.key for members in samples.members(number)]
        used, maps = shard_content(made_for, [key for key in keys if key not in skip], seed=number)
        skipped = [SkippedSample(key, f"id-{key}", "too_long", "200 tokens") for key in keys if key in skip]
        records.append(write_shard(store, number, made_for, entry.name, used, maps, skipped))
    return records


def target_stream(
    samples: Path | str, targets: TargetStore | Path | str, config: StreamConfig, *, epoch: int = 0, **options: Any
) -> DataPipeline:
    """One epoch over one sample set with its targets, by default for a single rank."""
    opened = targets if isinstance(targets, TargetStore) else TargetStore.open(targets)
    mixture = Mixture([Source(SampleSet.open(samples), opened)], config)
    return mixture_stream(mixture, **{"rank": 0, "world_size": 1, "epochs": range(epoch, epoch + 1), **options})


@contextmanager
def as_a_dead_process() -> Iterator[None]:
    """What is begun inside the block was begun by a process that is dead afterwards."""
    with patch.object(owner, "_start_of", lambda pid: 1):
        yield


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
