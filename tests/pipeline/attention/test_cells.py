"""What reads maps reads maps of cells too: the comparison, the view of a sample, the estimate."""

import pytest
import torch

from pipeline.attention.teacher_side import open_teacher
from pipeline.attention_comparison import first_samples
from stages.estimate.analytic import estimate_from_configs
from stages.estimate.measured import estimate_by_measurement
from stages.estimate.report import EstimateConfig
from stages.evaluation.attention.observe import stored_answer_rows
from stages.evaluation.attention.token_boxes import cell_boxes
from stages.inspection.stored_sample import view_sample
from stages.student.data.collator import Collator
from stages.teacher.config import TeacherConfig
from storage.progress import SILENT
from storage.samples.sample_set import SampleSet
from storage.targets.store import TargetStore
from storage.targets.summary import summarize
from tests.stages.distilled import TinyData, extract_here, make_tiny_data


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TinyData:
    return make_tiny_data(tmp_path_factory.mktemp("cells"), num_samples=12)


@pytest.fixture(scope="module")
def store(data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> TargetStore:
    folder = tmp_path_factory.mktemp("store")
    return extract_here(data, folder, map_codec="float16", map_pooling=2, answer_attention=True)


def test_a_live_teacher_and_its_store_agree_on_cells(data: TinyData, store: TargetStore) -> None:
    stored, live = open_teacher(store, None), open_teacher(store, str(data.teacher))
    compared = 0
    for samples in first_samples(str(data.samples), store, 12, with_answers=True):
        batch = Collator(stored.reader)(samples)
        rows = [mask.nonzero()[:, 0] - 1 for mask in (sample.targets.answer_mask for sample in samples)]
        for sample, ours, theirs in zip(samples, stored.observe(batch, None), live.observe(batch, rows), strict=True):
            assert (ours is None) == (theirs is None)
            if ours is None or theirs is None:
                continue
            compared += 1
            assert ours.maps_WNN.shape[-1] in (4, 8)
            torch.testing.assert_close(ours.maps_WNN, theirs.maps_WNN, rtol=2**-9, atol=1e-6)
            answers = stored_answer_rows(sample.targets)
            assert answers is not None
            assert theirs.text_WN is not None
            torch.testing.assert_close(answers, theirs.text_WN, rtol=2**-9, atol=1e-5)
    assert compared > 4


def test_a_samples_view_and_the_summary_show_cells(store: TargetStore) -> None:
    view = next(view for view in (view_sample(store, str(number)) for number in range(12)) if view.windows)
    assert view.windows[0].map_NN.shape[-1] in (4, 8)
    assert all(0 <= window.sink_share < 1 for window in view.windows)
    assert summarize(store.store.url).num_maps > 0


def test_the_box_of_a_cell_is_around_those_of_its_tokens_that_show_something() -> None:
    boxes = torch.tensor([[0.0, 0, 0.5, 0.5], [0.5, 0, 1, 0.5], [0, 0, 0, 0], [0, 0.5, 0.5, 1]])
    found = cell_boxes(boxes, torch.tensor([0, 0, 1, 2]))
    assert found.tolist() == [[0, 0, 1, 0.5], [0, 0, 0, 0], [0, 0.5, 0.5, 1]]
    assert cell_boxes(boxes, None) is boxes


def test_estimates_count_the_bytes_of_cells(data: TinyData) -> None:
    samples, config = SampleSet.open(data.samples), EstimateConfig(num_sampled=12, num_measured=12)
    found = []
    for pooling in (1, 2):
        settings = TeacherConfig(checkpoint=str(data.teacher), map_codec="float16", map_pooling=pooling)
        measured = estimate_by_measurement(settings, samples, config, workers=1, threads=1, progress=SILENT)
        analytic = estimate_from_configs(settings, samples, config, workers=1)
        sizes = measured.settings["float16"].bytes_by_array
        assert ("map_cells" in sizes) == (pooling == 2)
        found.append((measured.per_sample["image_tokens"], analytic.per_sample["image_tokens"]))
    assert found[0][0] == found[0][1] == 4 * found[1][0] == 4 * found[1][1]
