"""A store is never mixed: each difference is named and nothing is changed."""

import json
from pathlib import Path

import pytest

from storage.codecs.codec_settings import LogitCodecConfig, MapCodecConfig
from storage.digests import canonical_json, digest_of
from storage.errors import CorruptData, FingerprintMismatch, UserError
from storage.stores import open_store
from storage.targets.manifest import FORMAT_VERSIONS, Fingerprint, Manifest, create_or_check
from storage.targets.store import TargetStore
from tests.storage.builders import VOCAB, files_of, fingerprint, manifest


def test_a_manifest_round_trips_and_is_accepted_again(tmp_path):
    store = open_store(tmp_path)
    create_or_check(store, manifest())
    create_or_check(store, manifest())
    assert Manifest.load(store) == manifest()


OTHER_DEPTH = {"model_type": "llava", "text_config": {"num_hidden_layers": 7}}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"chat_template": "other " * 50}, "chat_template: stored"),
        ({"teacher_config": OTHER_DEPTH}, "teacher_config.text_config.num_hidden_layers: stored 6, this run 7"),
        ({"processor": {}}, "processor.size: stored"),
        ({"map_codec": MapCodecConfig(name="float16")}, 'map_codec.name: stored "sqrt4", this run "float16"'),
        ({"layers": (2, 3), "windows": ((2, 3),)}, r"layers: stored \[2,3,4\], this run \[2,3\]"),
        (
            {"tokenizer": "x", "logit_codec": LogitCodecConfig(vocab_size=VOCAB, top_k=9)},
            r"logit_codec.top_k: stored 12, this run 9\n.*tokenizer: ",
        ),
    ],
)
def test_another_fingerprint_is_refused_by_naming_the_fields(tmp_path, changes, named):
    store = open_store(tmp_path)
    create_or_check(store, manifest())
    before = files_of(tmp_path)
    with pytest.raises(FingerprintMismatch, match=named) as caught:
        create_or_check(store, manifest(**changes))
    assert files_of(tmp_path) == before
    assert len(str(caught.value)) < 900


def test_another_number_of_shards_is_refused(tmp_path):
    store = open_store(tmp_path)
    create_or_check(store, manifest(num_shards=1))
    with pytest.raises(FingerprintMismatch, match="num_shards: stored 1, this run 2"):
        create_or_check(store, manifest(num_shards=2))


def test_differences_are_names_of_fields():
    assert fingerprint().differences(fingerprint()) == []
    other = fingerprint(dtype="float16", processor={"size": {"height": 1, "width": 48}, "a.b": 1})
    assert fingerprint().differences(other) == ["dtype", "processor.a.b", "processor.size.height"]
    assert fingerprint().digest == fingerprint().digest != other.digest


SOMETIMES = {"answer_attention", "prefix_reuse", "tensor_ranks", "map_pooling", "max_image_tokens"}
"""Fields that are there only where they are not at their default."""


@pytest.mark.parametrize("field", [name for name in Fingerprint.model_fields if name not in SOMETIMES])
def test_no_field_of_every_fingerprint_has_a_default(field):
    fields = fingerprint().model_dump()
    del fields[field]
    with pytest.raises(ValueError, match=field):
        Fingerprint.model_validate(fields)


@pytest.mark.parametrize("answer_attention", [False, True])
def test_prefix_reuse_is_a_field_where_it_is_true_and_changes_no_version(tmp_path, answer_attention):
    apart, shared = (manifest(answer_attention=answer_attention, prefix_reuse=way) for way in (False, True))
    assert b"prefix_reuse" not in apart.to_bytes()
    assert apart.format_version == shared.format_version
    create_or_check(open_store(tmp_path), shared)
    assert Manifest.load(open_store(tmp_path)) == shared
    with_field = json.loads(shared.to_bytes())
    assert with_field["fingerprint"].pop("prefix_reuse") is True
    assert {**with_field, "digest": apart.digest} == json.loads(apart.to_bytes())


def test_an_unknown_format_version_says_what_to_do(tmp_path):
    store = open_store(tmp_path)
    create_or_check(store, manifest())
    fields = json.loads(store.read("manifest.json"))
    for version, todo in ((FORMAT_VERSIONS[-1] + 1, "upgrade compodistill"), (0, "make it again")):
        other = {name: value for name, value in fields.items() if name != "digest"} | {"format_version": version}
        store.write("manifest.json", canonical_json({**other, "digest": digest_of(other)}))
        with pytest.raises(UserError, match=todo):
            Manifest.load(store)


@pytest.mark.parametrize("version", [1, 2])
def test_a_store_of_an_earlier_version_is_neither_read_nor_extended(tmp_path, version):
    store = open_store(tmp_path)
    fields = {**manifest().model_dump(mode="json"), "format_version": version}
    fields["fingerprint"]["map_codec"]["name"] = "sqrt8"
    store.write("manifest.json", canonical_json({**fields, "digest": digest_of(fields)}))
    before = files_of(tmp_path)
    for action in (lambda: TargetStore.open(tmp_path), lambda: create_or_check(store, manifest())):
        with pytest.raises(
            UserError, match=f"has format version {version}, this version reads 3, 4 and 5; make it again"
        ):
            action()
    assert files_of(tmp_path) == before


def test_answer_attention_is_a_field_of_version_4_alone_and_no_other_byte_differs(tmp_path):
    plain, answers = manifest(), manifest(answer_attention=True)
    assert (plain.format_version, answers.format_version) == (3, 4)
    assert b"answer_attention" not in plain.to_bytes()
    with_field = json.loads(answers.to_bytes())
    assert with_field["fingerprint"].pop("answer_attention") is True
    assert {**with_field, "format_version": 3, "digest": plain.digest} == json.loads(plain.to_bytes())
    for made, said in ((plain, 4), (answers, 3)):
        with pytest.raises(ValueError, match=f"format version {said}"):
            Manifest(**{**dict(made), "format_version": said})


@pytest.mark.parametrize(("version", "field"), [(3, False), (3, True), (4, False), (4, None)])
def test_a_manifest_that_says_both_versions_is_damaged(tmp_path, version, field):
    fields = {**manifest().model_dump(mode="json"), "format_version": version}
    if field is not None:
        fields["fingerprint"]["answer_attention"] = field
    store = open_store(tmp_path)
    store.write("manifest.json", canonical_json({**fields, "digest": digest_of(fields)}))
    with pytest.raises(CorruptData):
        Manifest.load(store)


def test_a_store_without_answer_attention_refuses_an_extraction_with_it_and_names_the_field(tmp_path):
    store = open_store(tmp_path)
    create_or_check(store, manifest())
    before = files_of(tmp_path)
    with pytest.raises(FingerprintMismatch, match="  answer_attention: stored \\(absent\\), this run true"):
        create_or_check(store, manifest(answer_attention=True))
    assert files_of(tmp_path) == before


def test_every_flipped_byte_of_a_manifest_is_seen(tmp_path):
    store = open_store(tmp_path)
    create_or_check(store, manifest())
    clean = store.read("manifest.json")
    for position in range(0, len(clean), 11):
        store.write("manifest.json", clean[:position] + bytes([clean[position] ^ 1]) + clean[position + 1 :])
        with pytest.raises(UserError):
            Manifest.load(store)
    store.write("manifest.json", b"\xff")
    with pytest.raises(CorruptData, match="not JSON"):
        Manifest.load(store)


def test_a_folder_without_a_manifest_is_no_target_store(tmp_path):
    with pytest.raises(UserError, match="is no target store"):
        Manifest.load(open_store(tmp_path))


def test_samples_that_were_packed_again_are_named_as_a_cause(tmp_path: Path) -> None:
    store, made_for = open_store(tmp_path), manifest()
    create_or_check(store, made_for)
    other = made_for.fingerprint.model_copy(update={"samples": "f" * 64})
    with pytest.raises(FingerprintMismatch, match="Samples differ also where the same data was packed"):
        create_or_check(store, made_for.model_copy(update={"fingerprint": other}))
