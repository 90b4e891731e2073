"""Users are told how noisy a temperature is, by the rows at hand."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from stages.student.stage_config import DistilledFinetuning
from stages.student.training.setup import notes_of_noise
from stages.teacher.config import TeacherConfig
from stages.teacher.identity import TeacherIdentity
from stages.tempered_noise import noise_notes
from storage.codecs.answer_logits import AnswerLogitsCodec
from storage.codecs.codec_settings import LogitCodecConfig
from storage.codecs.tail_samples import row_addresses
from storage.stores import open_store
from storage.targets.store import TargetStore
from tests.storage.builders import extract, pack

CODEC = LogitCodecConfig(vocab_size=500, top_k=40, temperatures=(0.5, 2.0), num_tempered_samples=50)


def records(codec: LogitCodecConfig, num_rows: int = 8) -> Tensor:
    logits_RV = torch.randn(num_rows, codec.vocab_size, generator=torch.Generator().manual_seed(0)) * 3
    return AnswerLogitsCodec(codec).encode(logits_RV, row_addresses("key", num_rows))


def test_a_temperature_noisier_than_1_is_named_with_both_numbers() -> None:
    parts = [records(CODEC), records(CODEC, 0), records(CODEC, 3)]
    (note,) = noise_notes(CODEC, parts, CODEC.temperatures)
    said = re.search(r"at temperature 2 .* add ([\d.]+) times .* \(at temperature 1 ([\d.]+) times\)", note)
    assert said
    stored = AnswerLogitsCodec(CODEC).decode(torch.cat(parts))
    expected = [10 * stored.gradient_noise(temperature) for temperature in (2.0, 1.0)]
    assert [float(number) for number in said.groups()] == pytest.approx(expected, rel=0.05)
    assert expected[0] > 2 * expected[1]


@pytest.mark.parametrize(
    ("temperature", "setting"), [(1.02, "tempered_samples"), (2.0, "top_k")], ids=["more samples", "all tokens"]
)
def test_the_setting_that_is_named_makes_it_no_noisier_than_temperature_1(temperature: float, setting: str) -> None:
    codec = CODEC.model_copy(update={"temperatures": (temperature,), "num_tempered_samples": 10})
    (note,) = noise_notes(codec, [records(codec)], codec.temperatures)
    said = re.search(r"extract with teacher\.(\w+)=(\d+) \(([\d,]+) bytes a row, now ([\d,]+)\)", note)
    assert said
    name, value, *sizes = said.groups()
    assert name == setting
    identity: Any = SimpleNamespace(
        settings=TeacherConfig(checkpoint="", temperatures=codec.temperatures, **{"top_k": 40, name: int(value)}),
        config=SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=codec.vocab_size)),
    )
    again = TeacherIdentity.logit_codec.fget(identity)
    assert [int(size.replace(",", "")) for size in sizes] == [again.row_bytes, codec.row_bytes]
    assert noise_notes(again, [records(again)], again.temperatures) == ()


def test_nothing_is_said_of_whole_vocabularies_and_of_no_rows() -> None:
    whole = CODEC.model_copy(update={"top_k": 500})
    assert noise_notes(whole, [records(whole)], (2.0,)) == ()
    assert noise_notes(CODEC, [], (2.0,)) == ()
    assert noise_notes(CODEC, [records(CODEC, 0)], (2.0,)) == ()


@pytest.mark.parametrize(
    ("settings", "num_notes"),
    [
        ({"kd_temperature": 2.0}, 1),
        ({}, 0),
        ({"kd_temperature": 2.0, "kd_weight": 0.0}, 0),
        ({"kd_temperature": 2.0, "kd_divergence": "reverse"}, 0),
    ],
)
def test_a_stage_says_so_where_its_loss_uses_tail_samples_of_another_temperature(
    settings: dict[str, Any], num_notes: int, tmp_path: Path
) -> None:
    extract(pack(tmp_path / "samples", (3,)), open_store(tmp_path / "targets"))
    run: Any = SimpleNamespace(stage=DistilledFinetuning(**settings), targets=TargetStore.open(tmp_path / "targets"))
    notes = notes_of_noise(run)
    assert len(notes) == num_notes
    assert all("at temperature 2 the logit loss is noisy: with top_k 12 and tempered_samples 6" in n for n in notes)
