"""How far a saved student is from the one trained in bfloat16, in a short run, and what the document says of it."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks.cached_against_online import Bench
from benchmarks.results import RESULTS
from benchmarks.saved_student import BEFORE, against, measure


def test_equal_logits_differ_by_nothing_and_others_as_the_textbook_says() -> None:
    saved_RV = torch.tensor([[0.0, 1.0], [2.0, 0.0]])
    assert against(saved_RV, saved_RV) == {"largest_difference": 0, "kl_nats": 0, "other_most_likely_token": 0}
    found = against(torch.tensor([[1.0, 0.0], [2.0, 0.5]]), saved_RV)
    p = saved_RV.softmax(-1)
    q = torch.tensor([[1.0, 0.0], [2.0, 0.5]]).softmax(-1)
    assert found["kl_nats"] == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-5)
    assert (found["largest_difference"], found["other_most_likely_token"]) == (1, 0.5)


@pytest.mark.slow
def test_the_saved_student_is_that_of_training_but_for_bfloat16(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    found = measure(Bench(tmp_path, images=12, stores=["4 bits"]), tmp_path / "run", steps=4, num_samples=16)
    for stage, before in BEFORE.items():
        trained = found[stage]["as trained"]
        assert 0 < trained["kl_nats"] < 1e-3
        if before is not None:
            # Something was trained, and it is in what was saved.
            assert found[stage][f"{before}, that it began from"]["kl_nats"] > 20 * trained["kl_nats"]


def test_the_saved_result_holds_what_the_document_claims() -> None:
    saved = json.loads((RESULTS / "saved_student.json").read_text())
    assert (saved["command"], saved["steps"]) == ("python -m benchmarks.saved_student", 50)
    stages = saved["stages"]
    trained = [stages[stage]["as trained"] for stage in BEFORE]
    document = " ".join((RESULTS.parents[1] / "docs/training.md").read_text().split())
    low, high = (f"{extreme(way['kl_nats'] for way in trained):.0e}".replace("e-0", "e-") for extreme in (min, max))
    assert f"by {low} to {high} nats" in document
    shares = [100 * way["other_most_likely_token"] for way in trained]
    assert f"another most likely token at {min(shares):.0f} to {max(shares):.0f} % of the answer tokens" in document
    # As far as it is from itself run in bfloat16.
    for stage in BEFORE:
        assert stages[stage]["as trained"]["kl_nats"] < 1.1 * stages[stage]["saved, in bfloat16"]["kl_nats"]
    moved = [stages["dft"]["dpt, that it began from"]["kl_nats"], stages["sft"]["dft, that it began from"]["kl_nats"]]
    assert f"moved them by {moved[0]:.0f} and {moved[1]:.1f}" in document
