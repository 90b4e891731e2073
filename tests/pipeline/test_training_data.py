"""What a run trains on: several stores, subsets, budgets, damage, and another number of processes on resume."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipeline.training import train
from storage.errors import FingerprintMismatch, UserError
from storage.samples.sample_set import SampleSet
from tests.conftest import TinyWorld
from tests.pipeline.processes import run_here
from tests.pipeline.runs import SETTINGS, run_file


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def keys_of(samples: Path) -> list[str]:
    packed = SampleSet.open(samples)
    return [members.key for number in range(len(packed.index.shards)) for members in packed.members(number)]


def weights(output: Path, stage: str = "dpt") -> dict[str, torch.Tensor]:
    return load_file(output / stage / "student" / "model.safetensors")


def same(left: Path, right: Path, stage: str = "dpt") -> bool:
    ours, theirs = weights(left, stage), weights(right, stage)
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("damaged", ["tar", "shard"])
def test_damaged_data_ends_the_command_with_the_shard_and_the_command_to_use(
    damaged: str,
    tiny: TinyWorld,
    targets: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    samples, store = shutil.copytree(tiny.samples, tmp_path / "samples"), shutil.copytree(targets, tmp_path / "targets")
    if damaged == "tar":
        # Of all samples: whichever comes first, the run must not go on.
        for file in samples.glob("*.tar"):
            content = bytearray(file.read_bytes())
            content[520] ^= 1
            file.write_bytes(content)
    else:
        for file in store.glob("shards/*.zarr/logit_records/c/0/0"):
            content = bytearray(file.read_bytes())
            content[8] ^= 1
            file.write_bytes(content)
    places = ("--samples", samples, "--targets", store, "--student", tiny.student_lm, "--output", tmp_path / "run")
    settings = [*SETTINGS, "train.loader.num_workers=1", "train.dpt={batch_size: 24, max_steps: 1}"]
    words = (word for setting in settings for word in ("--set", setting))
    done = run_here("train-student", "--stage", "dpt", *places, *words, monkeypatch=monkeypatch, capsys=capsys)
    assert done.code == 2
    said = " ".join(done.err.split())
    assert re.search(r"samples-00000\d\.tar" if damaged == "tar" else r"shard \d of .*: logit_records", said)
    assert f"`cdp verify {store} --samples {samples}`" in said
    assert "Traceback" not in done.err
    assert not (tmp_path / "run/dpt/student").exists()


def test_one_source_is_the_same_run_as_its_places(tiny: TinyWorld, targets: Path, tmp_path: Path) -> None:
    train(run_file(tiny, targets, tmp_path / "places"), ["dpt"])
    source = json.dumps([{"samples": str(tiny.samples), "targets": str(targets)}])
    train(run_file(tiny, targets, tmp_path / "sources", f"train.dpt.sources={source}"), ["dpt"])
    assert same(tmp_path / "places", tmp_path / "sources")
    # The same data may lie elsewhere when the run goes on.
    moved = shutil.copytree(targets, tmp_path / "moved")
    train(run_file(tiny, moved, tmp_path / "places"), ["dpt"])


def test_a_mixture_has_exact_counts_and_is_part_of_what_a_run_was_begun_with(
    tiny: TinyWorld, targets: Path, tmp_path: Path
) -> None:
    keys = keys_of(tiny.samples)
    (tmp_path / "some.txt").write_text("\n".join(keys[:6]))
    place = {"samples": str(tiny.samples), "targets": str(targets)}

    def sources(weight: float) -> str:
        part = {**place, "weight": weight, "subset": str(tmp_path / "some.txt")}
        return f"train.dft.sources={json.dumps([place, part])}"

    steps = ("train.dft.max_steps=null", "train.dft.epochs=1")
    (report,) = train(run_file(tiny, targets, tmp_path / "run", *steps, sources(0.5)), ["dft"])
    assert report.samples == len(keys) + 3
    for setting, field in ((sources(2.0), "weight"), ("train.dft.max_samples=5", "dft.max_samples")):
        with pytest.raises(FingerprintMismatch, match=rf"differs in: .*{field}"):
            train(run_file(tiny, targets, tmp_path / "run", *steps, sources(0.5), setting), ["dft"])
    (tmp_path / "some.txt").write_text("\n".join(keys[1:7]))
    with pytest.raises(FingerprintMismatch, match=r"differs in: subset\)"):
        train(run_file(tiny, targets, tmp_path / "run", *steps, sources(0.5)), ["dft"])


def test_a_subset_and_a_budget_are_what_is_trained_on(tiny: TinyWorld, targets: Path, tmp_path: Path) -> None:
    listed = tmp_path / "keys.txt"
    listed.write_text("\n".join(keys_of(tiny.samples)[::3]))
    settings = ("train.dpt={batch_size: 4, epochs: 1}", f"train.data.subset={listed}")
    (report,) = train(run_file(tiny, targets, tmp_path / "subset", *settings), ["dpt"])
    assert (report.samples, report.steps) == (8, 2)
    (report,) = train(run_file(tiny, targets, tmp_path / "budget", *settings, "train.data.max_samples=5"), ["dpt"])
    assert (report.samples, report.steps) == (5, 2)
    source = json.dumps([{"samples": str(tiny.samples), "targets": str(targets)}])
    with pytest.raises(UserError, match="leave one of them out"):
        train(run_file(tiny, targets, tmp_path / "both", *settings, f"train.data.sources={source}"), ["dpt"])


@pytest.mark.slow
def test_the_cut_into_microbatches_and_bucketing_change_the_weights_by_rounding_only(
    tiny: TinyWorld, targets: Path, tmp_path: Path
) -> None:
    settings = ("train.lora.dropout=0.0", "train.dft={batch_size: 10, epochs: 1, learning_rate: 1.0e-3}")
    ways = {
        "bucketed": ("train.loader.microbatch_size=3",),
        "again": ("train.loader.microbatch_size=3",),
        "plain": ("train.loader.microbatch_size=3", "train.loader.bucket_by_length=false"),
        "whole": ("train.loader.microbatch_size=10",),
    }
    for name, way in ways.items():
        train(run_file(tiny, targets, tmp_path / name, *settings, *way), ["dft"])
    assert same(tmp_path / "bucketed", tmp_path / "again", "dft")
    for name in ("plain", "whole"):
        for weight, value in weights(tmp_path / "bucketed", "dft").items():
            torch.testing.assert_close(weights(tmp_path / name, "dft")[weight], value, rtol=1e-3, atol=2e-4)


SECOND_EPOCH = (
    "train.lora.dropout=0.0",
    "train.checkpoint.every=1",
    "train.checkpoint.keep=3",
    "train.loader.microbatch_size=2",
    # 24 samples: three steps an epoch, the last one shorter.
    "train.dft={batch_size: 10, epochs: 2, learning_rate: 1.0e-3}",
)
"""Six steps."""
PLACES = ("--samples", "--targets", "--student", "--output")


@pytest.fixture(scope="module")
def two_epochs(tiny: TinyWorld, targets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    output = tmp_path_factory.mktemp("two_epochs") / "run"
    (report,) = train(run_file(tiny, targets, output, *SECOND_EPOCH), ["dft"])
    assert report.steps == 6
    return output


def torchrun(processes: int, module: str, *arguments: object) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m", module]
    done = subprocess.run(
        [sys.executable, *launcher, *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def checkpoints(output: Path) -> list[str]:
    return sorted(path.name for path in (output / "dft/checkpoints").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "parallel", "after"), [(1, "ddp", 1), (1, "ddp", 2), (2, "ddp", 1), (2, "fsdp", 1), (1, "fsdp", 2)]
)
def test_resuming_in_the_second_epoch_on_another_number_of_processes_gives_the_same_weights(
    before: int, parallel: str, after: int, tiny: TinyWorld, targets: Path, two_epochs: Path, tmp_path: Path
) -> None:
    output, settings = tmp_path / "run", (*SECOND_EPOCH, f"train.parallel.strategy={parallel}")
    places = (tiny.samples, targets, tiny.student_lm, output)
    torchrun(before, "tests.pipeline.stopped_training", "dft", 5, *places, *settings)
    assert checkpoints(output) == ["step-00000002", "step-00000003", "step-00000004"]
    flags = (word for pair in zip(PLACES, places, strict=True) for word in pair)
    words = (word for setting in (*SETTINGS, *settings) for word in ("--set", setting))
    torchrun(after, "pipeline.cli", "train-student", "--stage", "dft", *flags, *words)
    assert checkpoints(output) == ["step-00000004", "step-00000005", "step-00000006"]
    lines = [json.loads(line) for line in (output / "dft/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert lines[-1]["samples"] == 48
    if before == after == 1:
        assert same(output, two_epochs, "dft")
    expected = weights(two_epochs, "dft")
    for name, value in weights(output, "dft").items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=2e-4)
