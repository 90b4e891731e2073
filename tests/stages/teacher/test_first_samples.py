"""A template or processor that takes no sample is refused on the driver, before a cluster is started."""

import json
from pathlib import Path

import pytest

from pipeline.cluster import connection
from pipeline.extraction.config import ExtractConfig
from pipeline.extraction.extract import extract
from stages.samples.pack import PackConfig, pack_samples
from stages.teacher.config import TeacherConfig
from stages.teacher.first_samples import check_first_samples
from storage.errors import UserError
from storage.samples.sample_set import SampleSet
from tests.checkpoints import CHAT_TEMPLATE, CHATML
from tests.stages.distilled import TinyData, make_tiny_data

REFUSING = "{% if 'of the' in messages[0]['content'][-1]['text'] %}{{ raise_exception('no shapes') }}{% endif %}"
WITHOUT_IMAGES = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] + ' ' }}{% endif %}{% endfor %}{% endfor %}"
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TinyData:
    return make_tiny_data(tmp_path_factory.mktemp("data"), num_samples=10)


def settings(data: TinyData, tmp_path: Path, template: str) -> TeacherConfig:
    (tmp_path / "t.jinja").write_text(template)
    return TeacherConfig(checkpoint=str(data.teacher), num_matched=1, chat_template=str(tmp_path / "t.jinja"))


def records(data: TinyData, *, with_image: bool) -> list[dict[str, object]]:
    packed = json.loads((data.samples.parent / "data/data.json").read_text())
    return [record for record in packed if ("image" in record) == with_image]


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, CHATML], ids=["parts", "strings"])
def test_a_template_of_parts_or_strings_is_taken(template: str, data: TinyData, tmp_path: Path) -> None:
    check_first_samples(settings(data, tmp_path, template), SampleSet.open(data.samples))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{{ messages[0] + 'x' }}",
            r"the chat template \(.*t\.jinja\) cannot render a question and its answer: TypeError",
        ),
        (
            WITHOUT_IMAGES,
            r"not take a question about a grey picture: image_count_mismatch: .* 0 times for 1",
        ),
        (
            REFUSING + CHAT_TEMPLATE,
            r"any of the first 6 samples; of 0+: refused_by_template: .*no shapes\. Set ",
        ),
    ],
    ids=["nothing", "no images", "none of the samples"],
)
def test_one_that_takes_none_is_refused_before_a_cluster_is_started(
    template: str, message: str, data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def connect(_: object) -> None:
        raise AssertionError("a cluster was started")

    monkeypatch.setattr(connection, "connect", connect)
    targets = tmp_path / "targets"
    with pytest.raises(UserError, match=message):
        extract(settings(data, tmp_path, template), str(data.samples), str(targets), ExtractConfig())
    assert not targets.exists()


def test_images_are_asked_of_a_template_only_where_samples_have_some(data: TinyData, tmp_path: Path) -> None:
    (tmp_path / "text.json").write_text(json.dumps(records(data, with_image=False)))
    pack_samples(tmp_path / "text.json", None, tmp_path / "text", PackConfig())
    check_first_samples(settings(data, tmp_path, WITHOUT_IMAGES), SampleSet.open(tmp_path / "text"))


def test_an_image_of_a_later_shard_is_an_image(data: TinyData, tmp_path: Path) -> None:
    (text, *_), (image, *_) = (records(data, with_image=has) for has in (False, True))
    (tmp_path / "mixed.json").write_text(json.dumps([text, image]))
    images = data.samples.parent / "data/images"
    pack_samples(tmp_path / "mixed.json", images, tmp_path / "mixed", PackConfig(max_samples_per_shard=1))
    samples = SampleSet.open(tmp_path / "mixed")
    assert [len(samples.members(number)[0].spans) for number in (0, 1)] == [1, 2]
    with pytest.raises(UserError, match="a question about a grey picture"):
        check_first_samples(settings(data, tmp_path, WITHOUT_IMAGES), samples)


def test_one_that_takes_some_is_left_to_the_ledger(data: TinyData, tmp_path: Path) -> None:
    some = REFUSING.replace("of the", "of the square") + CHAT_TEMPLATE
    check_first_samples(settings(data, tmp_path, some), SampleSet.open(data.samples))


def test_a_damaged_shard_is_left_to_those_who_read_it_whole(data: TinyData, tmp_path: Path) -> None:
    samples = SampleSet.open(data.samples)
    tar = next(data.samples.glob("*.tar"))
    content = tar.read_bytes()
    try:
        tar.write_bytes(content[:-512])
        check_first_samples(settings(data, tmp_path, CHAT_TEMPLATE), samples)
    finally:
        tar.write_bytes(content)
