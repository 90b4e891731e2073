"""A forger's tools: one value of a store is changed, and all that vouches for it is made right again."""

import json
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

from storage.digests import canonical_json, digest_of

Leaf = tuple[str | int, ...]
"""The way to a value through objects and lists."""


def number_leaves(value: Any) -> Iterator[Leaf]:
    """The ways to all numbers in a JSON value, truth values left out."""
    for leaf in ways(value):
        if isinstance(number := value_at(value, leaf), int | float) and not isinstance(number, bool):
            yield leaf


def ways(value: Any, way: Leaf = ()) -> Iterator[Leaf]:
    """The ways to all values inside a JSON value."""
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield (*way, key)
            yield from ways(inner, (*way, key))


def value_at(document: Any, leaf: Leaf) -> Any:
    for key in leaf:
        document = document[key]
    return document


def documents(root: Path) -> dict[str, Path]:
    """The JSON files of `samples/` and `targets/` of one shard that hold numbers, by what they are."""
    targets, samples = root / "targets", root / "samples"
    (group,) = targets.glob("shards/*/zarr.json")
    return {
        "manifest": targets / "manifest.json",
        "record": targets / "commits/000000.json",
        "teacher": targets / "commits/teacher.json",
        "group": group,
        "index": samples / "index.json",
        "table": samples / "samples-000000.json",
    }


def forge(root: Path, name: str, leaf: Leaf, value: object) -> None:
    """Changes one value, then every digest, size and name that follows from the document."""
    document = json.loads(documents(root)[name].read_bytes())
    value_at(document, leaf[:-1])[leaf[-1]] = value
    forge_document(root, name, document)


def forge_document(root: Path, name: str, document: Any) -> None:
    """Puts another document in place of one, then makes right every digest, size and name that follows from it."""
    paths = documents(root)
    fields = {other: json.loads(path.read_bytes()) for other, path in paths.items()} | {name: document}
    table = json.dumps(fields["table"], separators=(",", ":")).encode()
    entry = fields["index"]["shards"][0]
    if name == "table":
        entry |= {"table_bytes": len(table), "table_sha256": sha256(table).hexdigest()}
    digest = digest_of([[shard["name"], shard["num_samples"], shard["sha256"]] for shard in fields["index"]["shards"]])
    manifest = fields["manifest"]
    manifest["fingerprint"]["samples"] = digest
    manifest["digest"] = digest_of({key: value for key, value in manifest.items() if key != "digest"})
    group = json.dumps(fields["group"]).encode()
    if name == "group":
        fields["record"]["files"]["zarr.json"] = [len(group), sha256(group).hexdigest()]
        paths["group"].write_bytes(group)
    for record, folder in (("record", "shards/000000-{}.zarr"), ("teacher", "teacher/{}")):
        content = fields[record]
        content["manifest"] = manifest["digest"]
        digest = digest_of({key: value for key, value in content.items() if key not in ("digest", "path")})
        (root / "targets" / content["path"]).rename(root / "targets" / folder.format(digest[:16]))
        content |= {"digest": digest, "path": folder.format(digest[:16])}
    for document in ("manifest", "record", "teacher"):
        paths[document].write_bytes(canonical_json(fields[document]))
    paths["index"].write_bytes(json.dumps(fields["index"], separators=(",", ":")).encode())
    paths["table"].write_bytes(table)
