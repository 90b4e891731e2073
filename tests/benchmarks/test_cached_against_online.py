"""The comparison of training from stored targets with the teacher in the loop, in a short run."""

import json

import pytest
import torch

from benchmarks.cached_against_online import LEARNING_RATE, STORES, Bench, Kept, Online
from benchmarks.results import RESULTS
from stages.student.stage_config import StageName
from storage.samples.index import SampleIndex
from storage.stores import open_store

TERMS: dict[StageName, list[str]] = {
    "dpt": ["loss", "lm", "kd"],
    "dft": ["loss", "lm", "kd", "attention"],
    "sft": ["loss", "lm"],
}
TARGETS = {
    "16 bits against online": "16 bits, whole vocabulary",
    "default against online": "default, 8-bit maps",
    "4 bits against online": "4-bit maps",
    "16 bits in microbatches of 4 against 16": "*roundings alone*",
}
"""What the file and the document call the same."""


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    torch.set_num_threads(1)
    return Bench(tmp_path_factory.mktemp("bench"), images=12, stores=["16 bits"])


@pytest.mark.slow
@pytest.mark.parametrize("stage", TERMS)
def test_training_from_16_bit_targets_follows_training_with_the_teacher_in_the_loop(
    stage: StageName, bench: Bench
) -> None:
    online, cached = (bench.train(stage, 10, "16 bits", objective) for objective in (Online, Kept))
    assert cached.terms == TERMS[stage]
    num_samples = SampleIndex.load(open_store(bench.folder / "samples")).num_samples
    assert cached.steps[-1]["samples"] > 2 * num_samples, "steps of several epochs"
    assert online.steps[-1]["loss"] < 0.9 * online.steps[0]["loss"], "something is learnt"
    found = cached.against(online)
    # Roundings of float32, but of the maps those of 16 bits.
    for name in cached.terms:
        assert found["terms"][name]["largest"] < (1e-4 if name == "attention" else 1e-5), name
    if "attention" not in cached.terms:
        assert found["weights_apart_of_way_moved"] < 2e-4
    # Maps of 16 bits round more, and AdamW divides a gradient by its own size: the first step of a weight whose first
    # gradient lies below the roundings (4e-9, give or take 2e-9, where the median is 4e-5) is left to rounding.
    apart = torch.cat([(cached.end[name] - online.end[name]).flatten() for name in online.end]).abs()
    moved = torch.cat([(online.end[name] - online.start[name]).flatten() for name in online.end])
    others, few = apart.sort().values.split([len(apart) - 10, 10])
    assert float(others.norm() / moved.norm()) < 2e-4
    assert float(few.max()) < LEARNING_RATE / 5, "a small part of one step"


def test_the_saved_result_holds_what_the_documents_claim() -> None:
    saved = json.loads((RESULTS / "cached_against_online.json").read_text())
    assert (saved["steps"], saved["stores"]) == (50, STORES)
    assert saved["stages"].keys() == TERMS.keys()
    document = (RESULTS.parents[1] / "docs/codecs.md").read_text().splitlines()
    for stage, terms in TERMS.items():
        found = saved["stages"][stage]
        assert found["online"]["last"]["loss"] < 0.7 * found["online"]["first"]["loss"], "something was learnt"
        for comparison, targets in TARGETS.items():
            assert list(found[comparison]["terms"]) == terms
            largest = {name: term["largest"] for name, term in found[comparison]["terms"].items()}
            apart = found[comparison]["weights_apart_of_way_moved"]
            coded = comparison in ("default against online", "4 bits against online") and stage == "dft"
            # Float noise; of attention that of 16-bit maps, or of 4-bit ones.
            assert max(largest["lm"], largest.get("kd", 0.0)) < (1e-4 if coded else 5e-6)
            assert max(largest.values()) < (5e-3 if coded else 5e-4)
            assert apart < (5e-3 if coded else 5e-5)
            assert _row(stage, targets, largest, apart) in document


def _row(stage: StageName, targets: str, largest: dict[str, float], apart: float) -> str:
    """Of the document's table."""
    cells = [_printed(largest.get(name)) for name in ("loss", "lm", "kd", "attention")]
    return f"| {' | '.join([stage.upper(), targets, *cells, _printed(apart)])} |"


def _printed(value: float | None) -> str:
    """As in the document's table: one digit."""
    return "" if value is None else f"{value:.0e}".replace("e-0", "e-")
