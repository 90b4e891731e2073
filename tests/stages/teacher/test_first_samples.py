"""A template or processor that takes no sample is refused on the driver, before a cluster is started."""

from pathlib import Path

import pytest

from pipeline.cluster import connection
from pipeline.extraction.config import ExtractConfig
from pipeline.extraction.extract import extract
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


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, CHATML], ids=["parts", "strings"])
def test_a_template_of_parts_or_strings_is_taken(template: str, data: TinyData, tmp_path: Path) -> None:
    check_first_samples(settings(data, tmp_path, template), SampleSet.open(data.samples))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages[0] + 'x' }}", r"cannot render a question and its answer: TypeError"),
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
