"""Run files, sweeps, and what a training run, a sweep or a demo left in its folder."""

import gzip
import json
import logging
from collections.abc import Callable
from pathlib import Path

import pyarrow
from hypothesis import strategies as st
from pyarrow import parquet

from pipeline import sweep
from pipeline.demo import run as demo
from pipeline.demo.report import DemoConfig
from pipeline.run_file import load_run_file
from pipeline.sweep_file import load_sweep
from stages.evaluation.config import SuiteConfig
from stages.evaluation.loaded_suite import load_suite
from stages.evaluation.result import Metric, SuiteResult, read_result
from stages.export import model_card
from stages.samples.llava_record import parse_record
from stages.samples.sources.data_file import open_source
from stages.settings import lasting
from stages.student.run_folder import RunFolder, StageDescription, StageReport
from stages.student.training.checkpoint import OPTIMIZER, STATE, TRAINED, Checkpoints, Position
from stages.student.training.metrics import metrics_log
from stages.student.training.train_config import TrainConfig
from stages.unusable_sample import UnusableSample
from storage.digests import digest_of, file_sha256
from storage.errors import UserError
from storage.stores import open_store
from storage.streaming.source_checks import read_keys
from tests.fuzz.attempt import Mutant, Target
from tests.fuzz.mutants import HOSTILE, spoiled, spoiled_bytes, spoiled_json
from tests.fuzz.safetensors_files import spoiled_safetensors
from tests.stages.samples.saved_rows import save_rows
from tests.stages.student.training.test_checkpoint import trainer
from tests.suite_runs import suite_run

YAML = {
    "an anchor that holds itself": "&a [*a]",
    "a mapping that holds itself": "&a {b: *a}",
    "merged with itself": "&a {<<: *a, b: 1}",
    "a tag of Python": "!!python/object/apply:os.system ['true']",
    "no date": "2001-99-99",
    "a time": "2001-12-14t21:59:43.10-05:00",
    "a time zone of 99 hours": "2001-12-14t21:59:43-99:00",
    "base 60": "1:2:3:4",
    "base 60 without digits": "!!int ':'",
    "an integer of nothing": "!!int ''",
    "a float of nothing": "!!float ''",
    "a truth value of nothing": "!!bool maybe",
    "no base 64": "!!binary '*'",
    "bytes": "!!binary aGFybQ==",
    "a set": "!!set {a, b}",
    "an ordered mapping": "!!omap [a: 1]",
    "no ordered mapping": "!!omap [1]",
    "pairs": "!!pairs [1]",
    "a key that is a list": "{[a, b]: 1}",
    "a key that is no string": "{1: 2, null: 3, 2001-01-01: 4}",
    "an unknown alias": "*nobody",
    "a merge of a value": "{<<: 1}",
    "infinity": ".inf",
    "not a number": ".nan",
    "digits with underlines": "1_000",
    "octal": "0o9",
    "a binary number of nothing": "0b_",
    "hexadecimal of nothing": "0x_",
    "control characters": '"\\x00\\x1b[31m\\u202e"',
    "half a surrogate pair": '"\\ud800"',
    "the largest code point and one": '"\\UFFFFFFFF"',
    "another document": "1\n--- 2",
    "a directive": "\n%YAML 9.9\n---\n1",
}
RUN = {
    "samples": "samples",
    "targets": "targets",
    "student": "lm",
    "output": "out",
    "teacher": {"checkpoint": "teacher", "layers": [1, 2], "temperatures": [2.0]},
    "train": {"seed": 1, "stages": ["dpt", "dft"], "dft": {"epochs": 1, "learning_rate": 1e-3}, "lora": {"rank": 4}},
    "evaluate": {"batch_size": 2},
}
SWEEP = {"train": {"seed": 2}, "output": "out", "compare": {}, "students": {"a": {}, "b": {"train.dft.epochs": 2}}}


def make_run_files(root: Path) -> None:
    """A run file, a sweep and one `--set`, in JSON, which is YAML."""
    for name, document in (("run.yaml", RUN), ("sweep.yaml", SWEEP)):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(json.dumps(document))
    (root / "set").write_text("train.seed=3")


def read_run_files(root: Path) -> None:
    """All three."""
    load_run_file(root / "run.yaml", [], {})
    load_sweep(root / "sweep.yaml", None, [], {})
    text = (root / "set").read_text(errors="surrogateescape")
    try:
        load_run_file(root / "run.yaml", [text], {})
    except UserError as error:
        raise UserError(f"{root / 'set'}: {error}") from error


def spoiled_run_files(root: Path) -> st.SearchStrategy[Mutant]:
    """A value becomes one of YAML's own, or the text is spoiled."""
    options: list[st.SearchStrategy[Mutant]] = []
    for name in ("run.yaml", "sweep.yaml"):
        data = (root / name).read_bytes()
        yaml = spoiled_json(data, [*HOSTILE.values(), *YAML.values()])
        options += [written(name, text) for text in (yaml, yaml, yaml, spoiled_bytes(data))]
    names = st.sampled_from(
        ["train.seed", "train", "", ".", "train.seed.x", "a" * 10_000, "x." * 3000, "students", "\ud800"]
    )
    values = st.sampled_from([*HOSTILE.values(), *YAML.values()])
    settings = st.builds("{}={}".format, names, values).map(lambda text: text.encode(errors="surrogatepass"))
    return st.one_of(*options, written("set", settings))


def written(name: str, contents: st.SearchStrategy[bytes]) -> st.SearchStrategy[Mutant]:
    """Mutants that put these contents into a file."""

    def mutant(data: bytes) -> Mutant:
        def write(copy: Path) -> None:
            (copy / name).write_bytes(data)

        return write

    return contents.map(mutant)


def any_of_its_files(root: Path) -> st.SearchStrategy[Mutant]:
    """One of the folder's files is spoiled."""
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
    # Of JSON lines one is a JSON document.
    return st.one_of(
        [written(name, spoiled(name.replace(".jsonl", ".json"), (root / name).read_bytes())) for name in names]
    )


def make_run_folder(root: Path) -> None:
    """One finished stage, a report of an evaluation, a demo's settings, figures of a sweep's student, metrics."""
    stage = RunFolder(root).stage("dpt")
    stage.path.mkdir(parents=True)
    data = {"stage": "dpt", "decoder": "d" * 64, "starts_from": "decoder", "start_weights": None, "targets": ["t"]}
    stage.begin(StageDescription(data, lasting(TrainConfig())))
    report = StageReport(
        stage="dpt",
        steps=1,
        samples=2,
        trained_parameters=3,
        seconds=1.0,
        samples_per_s=2.0,
        wait_share=0.1,
        losses={"lm": 1.0},
    )
    stage.finish(report)
    evaluation = SuiteResult(
        run=suite_run(),
        metrics={"a": {"accuracy": Metric(value=1.0, interval_95=(0.0, 2.0), chance=None)}},
        num_items={"a": 1},
        num_missing=0,
        seconds=1.0,
        items_per_s=1.0,
    )
    (root / "evaluation.json").write_text(evaluation.to_json())
    (root / "demo.json").write_text(DemoConfig().model_dump_json())
    measured = {
        "compare": {},
        "evaluate": {},
        "stage": "dpt",
        "weights": "w",
        "suites": {},
        "targets": {"fingerprint": "f", "shards": None},
    }
    (root / "compared.json").write_text(json.dumps({"measured": measured, "suites": {}, "similarity": None}))
    (root / "metrics.jsonl").write_text('{"step": 1, "loss": 1.5}\n')


def read_run_folder(root: Path) -> None:
    """All that commands read of it."""
    run = RunFolder(root)
    stage = run.stage("dpt")
    stage.begun_with()
    stage.matching()
    stage.report()
    run.write_summary()
    history = model_card.read_history(stage.student)
    for section in (model_card._losses, model_card._digests, model_card._settings):
        section(history)
    sweep._read(open_store(root))
    read_result(root / "evaluation.json")
    demo._check_settings(root, DemoConfig())
    with metrics_log(root, (), 1, {}, enabled=True):
        pass


def make_checkpoint(root: Path) -> None:
    """A checkpoint of a layer."""
    Checkpoints(root, 1).save(Position(1, samples=2, loss_sums={"lm": 1.0}), trainer())


def read_checkpoint(root: Path) -> None:
    """As at resume; without its warning of a damaged one."""
    logging.disable(logging.WARNING)
    try:
        Checkpoints(root, 1).restore(trainer())
    finally:
        logging.disable(logging.NOTSET)


def spoiled_checkpoint(root: Path) -> st.SearchStrategy[Mutant]:
    """One of its files is spoiled, with the digests made right or not."""
    (folder,) = root.iterdir()

    def forged(name: str) -> Callable[[bytes], Mutant]:
        def mutant(data: bytes) -> Mutant:
            def write(copy: Path) -> None:
                (copy / folder.name / name).write_bytes(data)
                _redigest(copy / folder.name)

            return write

        return mutant

    names = (STATE, TRAINED, OPTIMIZER)
    options = {
        name: spoiled(name, (folder / name).read_bytes())
        if name == STATE
        else spoiled_safetensors((folder / name).read_bytes())
        for name in names
    }
    return st.one_of(
        *(contents.map(forged(name)) for name, contents in options.items()),
        *(written(f"{folder.name}/{name}", contents) for name, contents in options.items()),
    )


def _redigest(folder: Path) -> None:
    """Makes the digests of `state.json` right, where it has a place for them."""
    try:
        state = json.loads((folder / STATE).read_bytes())
        state.pop("digest", None)
        if isinstance(state.get("sha256"), dict):
            state["sha256"] = {name: file_sha256(folder / name) for name in (TRAINED, OPTIMIZER)}
        (folder / STATE).write_text(json.dumps({**state, "digest": digest_of(state)}))
    except (ValueError, TypeError, AttributeError, RecursionError):
        return


def make_data(root: Path) -> None:
    """Conversations in both layouts, pairs, a subset."""
    record = {"id": "a", "image": "a.png", "conversations": [{"from": "human", "value": "<image>\né?"}]}
    record["conversations"].append({"from": "gpt", "value": "b"})  # type: ignore[attr-defined]
    (root / "pairs/images").mkdir(parents=True)
    (root / "data.json").write_text(json.dumps([record]))
    (root / "data.jsonl").write_text(json.dumps(record))
    (root / "data.jsonl.gz").write_bytes(gzip.compress(json.dumps(record).encode(), mtime=0))
    table = pyarrow.Table.from_pylist([{**record, "image": {"bytes": b"123", "path": None}}] * 3)
    parquet.write_table(table, root / "data.parquet", row_group_size=2)
    kinds = pyarrow.array(["é", "b", "é"]).dictionary_encode()
    save_rows(table.append_column("kind", kinds), root / "saved")
    pair = {"filename": "a.png", "caption": "a", "negative_caption": "b"}
    (root / "pairs/kind.json").write_text(json.dumps({"0": pair}))
    (root / "pairs/images/a.png").write_bytes(b"")
    (root / "keys.txt").write_text("a\nb\n")


def read_data(root: Path) -> None:
    """All of it; a record that cannot be used is named, as packing does."""
    load_suite("sugarcrepe", SuiteConfig(data=root / "pairs"))
    read_keys(root / "keys.txt")
    for name in ("data.json", "data.jsonl", "data.jsonl.gz", "data.parquet", "saved"):
        with open_source(root / name) as source:
            for ordinal, record in enumerate(source.scan()):
                try:
                    parse_record(record, ordinal, root)
                except UnusableSample as error:
                    str(error).encode(errors="surrogatepass")


TARGETS = [
    Target("run files", make_run_files, read_run_files, spoiled_run_files),
    Target("run folder", make_run_folder, read_run_folder, any_of_its_files),
    Target("training checkpoint", make_checkpoint, read_checkpoint, spoiled_checkpoint),
    Target("data files", make_data, read_data, any_of_its_files),
]
