"""Extraction on a cluster whose nodes come and go."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from pipeline.extraction.report import ExtractionReport
from storage.integrity.verify import verify
from tests.conftest import TinyWorld
from tests.pipeline.cluster.ray_nodes import Nodes, nodes
from tests.pipeline.processes import start_cdp, tree
from tests.processes import PATIENCE_S, kill, runs_until


def num_commits(store: Path) -> int:
    return len(list((store / "commits").glob("0*.json")))


def stop_in_the_middle(driver: "subprocess.Popen[bytes]", cluster: Nodes, store: Path) -> int:
    """Lets the worker run until it has committed a shard, then stand still with others in hand; returns its number."""
    assert runs_until(driver, lambda: bool(cluster.workers()) and any(store.glob("teacher*")))
    (worker,) = cluster.workers()
    # For moments only: on a busy machine it would be done before this process has seen its first shard.
    while num_commits(store) == 0:
        os.kill(worker, signal.SIGCONT)
        time.sleep(0.02)
        os.kill(worker, signal.SIGSTOP)
        assert driver.poll() is None
    return worker


@pytest.mark.slow
def test_a_lost_node_loses_no_shard_and_one_that_joins_is_used(tiny: TinyWorld, targets: Path, tmp_path: Path) -> None:
    store, err = tmp_path / "store", tmp_path / "err.txt"
    places = ("--teacher", tiny.teacher, "--samples", tiny.samples, "--targets", store)
    settings = ("--set", "teacher.batch_size=4")
    with nodes("one") as cluster:
        driver = start_cdp("extract-teacher", *places, *settings, "--ray-address", cluster.address, err=err)
        stop_in_the_middle(driver, cluster, store)
        # It holds shards that are not committed yet.
        cluster.kill("one")
        cluster.add("two")
        assert driver.wait(PATIENCE_S) == 0, err.read_text()
    lasting = ("manifest.json", "teacher/", "shards/", "commits/")
    assert tree(store, *lasting) == tree(targets, *lasting)
    assert verify(store, tiny.samples).ok
    report = ExtractionReport.model_validate_json((store / "reports/extraction.json").read_text())
    lost, joined = report.per_worker
    assert "its worker process died" in lost.ended
    assert lost.shards + joined.shards == report.shards_made_now == report.shards
    assert lost.samples + joined.samples == report.samples
    assert report.failed_tries
    assert all(failed.pid == lost.pid for tries in report.failed_tries.values() for failed in tries)


@pytest.mark.slow
def test_a_node_that_dies_in_the_middle_of_shards_while_another_has_joined_and_works_loses_none(
    tiny: TinyWorld, targets: Path, tmp_path: Path
) -> None:
    store, err = tmp_path / "store", tmp_path / "err.txt"
    places = ("--teacher", tiny.teacher, "--samples", tiny.samples, "--targets", store)
    settings = ("--set", "teacher.batch_size=4")
    with nodes("one") as cluster:
        driver = start_cdp("extract-teacher", *places, *settings, "--ray-address", cluster.address, err=err)
        worker = stop_in_the_middle(driver, cluster, store)
        num_before = num_commits(store)
        cluster.add("two")
        assert runs_until(driver, lambda: num_commits(store) > num_before), err.read_text()
        cluster.kill("one")
        assert driver.wait(PATIENCE_S) == 0, err.read_text()
    lasting = ("manifest.json", "teacher/", "shards/", "commits/")
    assert tree(store, *lasting) == tree(targets, *lasting)
    report = ExtractionReport.model_validate_json((store / "reports/extraction.json").read_text())
    lost, *others = report.per_worker
    assert lost.pid == worker
    assert "its worker process died" in lost.ended
    assert report.failed_tries
    assert lost.shards + sum(other.shards for other in others) == report.shards_made_now == report.shards


@pytest.mark.slow
def test_an_extraction_without_an_address_uses_none_of_another_cluster_on_the_machine(
    tiny: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with nodes("one") as cluster:
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        places = ("--teacher", tiny.teacher, "--samples", tiny.samples, "--targets", tmp_path / "store")
        process = start_cdp("extract-teacher", *places)
        try:
            assert runs_until(process, lambda: any((tmp_path / "store").glob("teacher*")))
            assert cluster.workers() == []
            assert process.wait(PATIENCE_S) == 0
        finally:
            kill(process)


@pytest.mark.slow
def test_a_worker_of_two_gpus_is_refused_where_no_node_has_two_and_else_put_on_one_that_has(
    tiny: TinyWorld, tmp_path: Path
) -> None:
    err = tmp_path / "err.txt"
    places = ("--teacher", tiny.teacher, "--samples", tiny.samples, "--targets", tmp_path / "store")
    with nodes() as cluster:
        asked = (*places, "--set", "extract.gpus_per_worker=2", "--ray-address", cluster.address)
        cluster.add("one", gpus=1)
        cluster.add("two", gpus=1)
        assert start_cdp("extract-teacher", *asked, err=err).wait(PATIENCE_S) == 2
        assert "fits on no node of the cluster: it has 2 GPUs, at most 1 on a node" in " ".join(err.read_text().split())
        assert not (tmp_path / "store").exists()
        cluster.add("three", gpus=2)
        assert start_cdp("extract-teacher", *asked, err=err).wait(PATIENCE_S) == 2
        # Of the GPUs that Ray gave it, none is there.
        assert "this process sees 0 GPUs that torch can use" in " ".join(err.read_text().split())
