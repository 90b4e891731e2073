"""The product reads the miniature, and a store of it holds what students of the miniature's own loop learn from."""

from pathlib import Path

import pytest
import torch

from benchmarks.reproduction.llava import save_llava, write_questions
from benchmarks.reproduction.model import Answerer, DecoderSize, LocalTower
from benchmarks.reproduction.scenes import draw_scenes
from benchmarks.reproduction.tower import features
from benchmarks.reproduction.training import Pictures
from pipeline.extraction.config import ExtractConfig
from pipeline.extraction.extract import extract
from stages.samples.pack import PackConfig, pack_samples
from stages.teacher.config import TeacherConfig
from storage.codecs.answer_logits import AnswerLogitsCodec
from storage.codecs.attention_maps import MapCodec
from storage.targets.store import TargetStore
from tests.pipeline.in_process import without_ray

PICTURES, LAYERS = 2, (0, 1)


@pytest.mark.slow
def test_a_store_holds_the_maps_answers_and_logits_of_the_miniatures_own_loop(tmp_path: Path) -> None:
    scenes, tower = draw_scenes("train", 0, PICTURES), LocalTower(0)
    teacher = Answerer(DecoderSize(layers=2, width=128), num_questions=14, seed=0).eval()
    pictures = Pictures.of(features(tower, scenes, 0), scenes)
    with torch.no_grad():
        asked_BR3 = torch.from_numpy(pictures.questions.asked_BR3)
        expected = teacher(pictures.features_BNd.float(), asked_BR3, LAYERS, from_answers=True)

    save_llava(tmp_path / "teacher", tower, teacher)
    questions = write_questions(tmp_path / "pictures", scenes, 0)
    pack_samples(questions, tmp_path / "pictures", tmp_path / "samples", PackConfig())
    settings = TeacherConfig(
        checkpoint=str(tmp_path / "teacher"), layers=LAYERS, num_matched=2, map_codec="float16", answer_attention=True
    )
    with without_ray():
        extract(settings, str(tmp_path / "samples"), str(tmp_path / "targets"), ExtractConfig())
    store = TargetStore.open(tmp_path / "targets")
    shard, fingerprint = store.shard(0), store.manifest.fingerprint
    assert len(shard) == 14 * PICTURES
    logits = AnswerLogitsCodec(fingerprint.logit_codec)
    for row, key in enumerate(shard.keys):
        picture, number = divmod(int(key), 14)
        sample, maps = shard.read(row, with_answers=True)
        assert maps is not None
        assert sample.answer_attention_LaN is not None
        decoded_LNN = MapCodec(fingerprint.map_codec).decode(maps)
        for layer in LAYERS:
            assert torch.allclose(decoded_LNN[layer], expected.maps[layer][picture], atol=5e-4)
            answer_N = sample.answer_attention_LaN[layer, 0].float()
            assert torch.allclose(answer_N, expected.answer_maps[layer][picture, number], atol=5e-4)
        best = int(logits.decode(sample.logits_RQ).ids_RK[0, 0])
        assert best == int(expected.logits_BRV[picture, number].argmax())
