import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.run_file import load_run_file
from stages.student.model.loading import load_student
from stages.student.stage_config import STAGES
from tests.conftest import NUM_SAMPLES, TinyWorld
from tests.pipeline.processes import cdp, run_here, tree

COMMANDS = (
    "demo",
    "pack-samples",
    "estimate",
    "extract-teacher",
    "train-student",
    "convert-checkpoint",
    "evaluate",
    "compare",
    "export",
    "chat",
    "compare-attention",
    "report",
    "inspect",
    "verify",
    "config",
)

TRAINING = (
    "train.loader.microbatch_size=4",
    "train.loader.num_workers=0",
    "train.logging.every=1",
    "train.lora={rank: 4, alpha: 8}",
    "train.dpt={batch_size: 8, max_steps: 2}",
    "train.dft={batch_size: 8, max_steps: 2}",
    "train.sft={batch_size: 8, max_steps: 1}",
)

LOGITS = """
import sys
import torch
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText
from stages.student.model.student import register_students
torch.set_num_threads(1)
register_students()
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1]).eval()
image = model.config.image_token_id
ids = torch.tensor([[5, 6, *[image] * 16, 7, 8, 9]])
pixels = torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)
with torch.inference_mode():
    save_file({"logits": model(input_ids=ids, pixel_values=pixels).logits.contiguous()}, sys.argv[2])
"""


def settings(names: tuple[str, ...]) -> list[str]:
    return [word for name in names for word in ("--set", name)]


def test_help_lists_every_command() -> None:
    result = CliRunner().invoke(app.app, ["--help"])
    assert all(f" {command} " in result.output for command in COMMANDS)
    assert "..." not in result.output.replace("[ARGS]...", ""), "each first sentence fits a line"


def test_version_is_that_of_the_package() -> None:
    result = CliRunner().invoke(app.app, ["--version"])
    assert (result.exit_code, result.output) == (0, f"cdp {metadata.version('compodistill')}\n")


def test_a_shell_is_told_how_to_complete_the_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    # Otherwise the shell is looked for among the processes that started this one.
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    shown = CliRunner().invoke(app.app, ["--show-completion", "bash"], prog_name="cdp")
    assert shown.exit_code == 0
    assert "complete -o default -F" in shown.output
    words = {"_CDP_COMPLETE": "complete_bash", "COMP_WORDS": "cdp ex", "COMP_CWORD": "1"}
    assert CliRunner().invoke(app.app, env=words, prog_name="cdp").output.split() == ["extract-teacher", "export"]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_a_help(command: str) -> None:
    result = CliRunner().invoke(app.app, [command, "--help"])
    assert result.exit_code == 0
    assert "Usage:" in result.output


@pytest.mark.slow
def test_the_whole_pipeline_runs_by_commands_and_trains_without_the_teacher(
    tiny: TinyWorld, ray_address: str, tmp_path: Path
) -> None:
    teacher, samples, targets, student = (tmp_path / name for name in ("teacher", "samples", "targets", "student"))
    shutil.copytree(tiny.teacher, teacher)

    def run(*arguments: object) -> str:
        done = cdp(*arguments)
        assert done.code == 0, done.err
        assert "Traceback" not in done.err
        # What transformers says of a type it does not know.
        assert "instantiate a model of type" not in done.err
        return done.out

    assert f"{NUM_SAMPLES}" in run("pack-samples", tiny.data, tiny.images, samples, "--samples-per-shard", 4)
    assert tree(samples, "samples-", "index.json") == tree(tiny.samples, "samples-", "index.json")
    places = ("--samples", samples, "--targets", targets)
    shown = run("extract-teacher", "--teacher", teacher, *places, "--ray-address", ray_address, "--workers", 2)
    assert f"samples │ {NUM_SAMPLES}" in " ".join(shown.split())
    assert json.loads((targets / "reports/extraction.json").read_text())["samples"] == NUM_SAMPLES
    extracted = load_run_file(targets / "reports/run.yaml", [], {})
    assert extracted.teacher is not None
    assert (extracted.teacher.checkpoint, extracted.targets, extracted.extract.workers) == (
        str(teacher),
        str(targets),
        2,
    )
    shutil.rmtree(teacher)

    inspected = run("inspect", targets)
    assert "ratio to raw" in inspected
    assert "once per (image, tokens before it)" in inspected
    assert "window_flips" in inspected
    assert "whole" in run("verify", targets, "--samples", samples)
    train = ("train-student", *places, "--student", tiny.student_lm, "--output", student, *settings(TRAINING))
    assert all(stage in run(*train) for stage in STAGES)
    assert json.loads((student / "summary.json").read_text()).keys() == set(STAGES)

    suite = ("--suite", "sugarcrepe", "--data", tiny.pairs)
    for protocol in ("likelihood", "compodistill"):
        run("evaluate", student, *suite, "--protocol", protocol, "--output", tmp_path / protocol)
        result = json.loads((tmp_path / protocol / "sugarcrepe/result.json").read_text())
        assert result["num_items"] == {"replace_att": 4, "swap_obj": 4}
    similarity = tmp_path / "similarity.json"
    run("compare-attention", student, *places, "--limit", 6, "--report", similarity)
    found = json.loads(similarity.read_text())
    (compared,) = (one["similarity"] for one in found["students"].values())
    assert len(compared["similarity"]) == len(compared["student_layers"]) > 0
    assert all(-1 <= value <= 1 for value in compared["similarity"])


@pytest.mark.slow
def test_a_saved_student_loads_in_a_fresh_process_with_the_same_logits(undisturbed: Path, tmp_path: Path) -> None:
    folder = undisturbed / "sft" / "student"
    command = [sys.executable, "-c", LOGITS, folder, tmp_path / "fresh"]
    subprocess.run(command, check=True, capture_output=True)
    torch.set_num_threads(1)
    student = load_student(folder).eval()
    ids = torch.tensor([[5, 6, *[student.config.image_token_id] * 16, 7, 8, 9]])
    pixels = torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)
    with torch.inference_mode():
        logits = student(input_ids=ids, pixel_values=pixels).logits
    assert torch.equal(load_file(tmp_path / "fresh")["logits"], logits)


def test_estimate_prints_every_codec_and_saves_the_report_before_anything_is_written(
    tiny: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "reports" / "estimate.json"
    few = settings(("estimate.num_sampled=8", "estimate.num_measured=4", "estimate.num_blocks=2"))
    places = ("--teacher", tiny.teacher, "--samples", tiny.samples, "--report", report)
    done = run_here("estimate", *places, "--workers", 2, *few, monkeypatch=monkeypatch, capsys=capsys)
    assert done.code == 0, done.err
    saved = json.loads(report.read_text())
    assert (saved["num_samples"], saved["workers"], saved["basis"]) == (NUM_SAMPLES, 2, "measured")
    assert all(codec in done.out for codec in saved["settings"])
    assert "unusable among them" in done.out
    assert all(f"\n{step}: " in f"\n{done.err}" for step in ("load teacher", "run teacher", "code and write"))
    assert [path.name for path in tmp_path.iterdir()] == ["reports"]
    alone = ("--teacher", tiny.teacher, "--config-only", "--set", "estimate.samples=665000")
    coarse = run_here("estimate", *alone, monkeypatch=monkeypatch, capsys=capsys)
    assert coarse.code == 0, coarse.err
    assert "computed from configs alone" in coarse.out
    missing = run_here("estimate", "--teacher", tiny.teacher, monkeypatch=monkeypatch, capsys=capsys)
    assert (missing.code, "--samples is missing" in missing.err) == (2, True)


def test_verify_ends_with_1_and_names_the_flipped_byte(
    targets: Path, tiny: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "store"
    shutil.copytree(targets, store)
    chunk = next(path for path in sorted(store.glob("shards/000000-*/map_codes/c/**/*")) if path.is_file())
    data = bytearray(chunk.read_bytes())
    data[len(data) // 2] ^= 1
    chunk.write_bytes(data)
    ended = run_here("verify", store, "--samples", tiny.samples, monkeypatch=monkeypatch, capsys=capsys)
    assert ended.code == 1
    assert "map_codes" in ended.out.replace("\n", "")


@pytest.mark.usefixtures("shards_made_here")
def test_verify_with_repair_and_the_teacher_makes_the_broken_shard_again(
    targets: Path, tiny: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "store"
    shutil.copytree(targets, store)
    chunk = next(path for path in sorted(store.glob("shards/000001-*/map_codes/c/**/*")) if path.is_file())
    chunk.unlink()
    config = tmp_path / "run.yaml"
    config.write_text(f"teacher: {{checkpoint: {tiny.teacher}, batch_size: 4}}\n")
    places = (store, "--samples", tiny.samples, "--repair", "--config", config)
    ended = run_here("verify", *places, monkeypatch=monkeypatch, capsys=capsys)
    assert ended.code == 0, ended.err
    assert tree(store, "shards", "commits", "teacher") == tree(targets, "shards", "commits", "teacher")
    assert json.loads((store / "reports/extraction.json").read_text())["shards_made_now"] == 1
    assert re.findall(r"^(\w+): \d+ of", ended.err, re.M) == ["verify", "extract", "verify"]
    assert (store / "quarantine/0000/findings.json").exists()


PAIRS = "--suite sugarcrepe --data {pairs} --output {new}"
TRAIN = "train-student --samples {samples} --targets {targets} --student {lm} --output {new}"

MISTAKES = {
    "pack: fraction above 1": (
        "pack-samples {data} {images} {new} --max-skipped-fraction 2",
        "less than or equal to 1",
    ),
    "pack: no samples in a shard": (
        "pack-samples {data} {images} {new} --samples-per-shard 0",
        "max_samples_per_shard",
    ),
    "pack: no such file": ("pack-samples {new}/none.json {images} {new}", "none.json"),
    "pack: output is something else": ("pack-samples {data} {images} {teacher}", "{teacher}"),
    "extract: no teacher": ("extract-teacher --samples {samples} --targets {new}", "--teacher is missing"),
    "extract: no samples": ("extract-teacher --teacher {teacher} --targets {new}", "--samples is missing"),
    "extract: no targets": ("extract-teacher --teacher {teacher} --samples {samples}", "--targets is missing"),
    "extract: teacher is no checkpoint": (
        "extract-teacher --teacher {images} --samples {samples} --targets {new}",
        "{images}",
    ),
    "extract: samples are no samples": (
        "extract-teacher --teacher {teacher} --samples {images} --targets {new}",
        "{images}",
    ),
    "extract: zero workers": (
        "extract-teacher --teacher {teacher} --samples {samples} --targets {new} --workers 0",
        "extract.workers",
    ),
    "extract: layers past the end": (
        "extract-teacher --teacher {teacher} --samples {samples} --targets {new} --set teacher.layers=[7,8]",
        "layers [7, 8]",
    ),
    "extract: layers without end": (
        "extract-teacher --teacher {teacher} --samples {samples} --targets {new} --set teacher.layers=[0,10000000000]",
        "layers [0, 10000000000]",
    ),
    "extract: a temperature that cannot be stored": (
        "extract-teacher --teacher {teacher} --samples {samples} --targets {new} --set teacher.temperatures=[-1]",
        "teacher.temperatures",
    ),
    "extract: too many matched layers": (
        "extract-teacher --teacher {teacher} --samples {samples} --targets {new} --set teacher.num_matched=9",
        "9 matched layers need at least as many captured teacher layers",
    ),
    "set: unknown key": ("train-student --set train.steps=3", "train.steps: there is no such setting"),
    "set: no value": ("train-student --set train.seed", "expected section.field=value"),
    "config: no such file": ("train-student --config {new}/run.yaml", "run.yaml cannot be read"),
    "config: bad YAML": ("train-student --config {bad_yaml}", "is not YAML"),
    "config: unknown key": ("train-student --config {unknown_key}", "trian.seed: there is no such setting"),
    "train: no output": ("train-student --samples {samples} --targets {targets} --student {lm}", "--output is missing"),
    "train: no student": (
        "train-student --samples {samples} --targets {targets} --output {new}",
        "--student is missing",
    ),
    "train: no samples": ("train-student --targets {targets} --student {lm} --output {new}", "--samples is missing"),
    "train: no targets": ("train-student --samples {samples} --student {lm} --output {new}", "--targets is missing"),
    "train: targets are no targets": (
        "train-student --samples {samples} --targets {images} --student {lm} --output {new}",
        "is no target store",
    ),
    "train: samples are no samples": (
        "train-student --samples {images} --targets {targets} --student {lm} --output {new}",
        "{images}",
    ),
    "train: samples of another data set": (
        "train-student --samples {other_samples} --targets {targets} --student {lm} --output {new}",
        "differs in: samples",
    ),
    "train: targets incomplete": (
        "train-student --samples {samples} --targets {incomplete} --student {lm} --output {new}",
        "run `cdp extract-teacher` to finish it",
    ),
    "train: student is no checkpoint": (
        "train-student --samples {samples} --targets {targets} --student {images} --output {new}",
        "{images}",
    ),
    "train: a subset of unknown samples": (
        TRAIN + " --set train.data.subset={pairs}/replace_att.json",
        "has no targets for",
    ),
    "train: sources and places": (
        TRAIN + ' --set train.data.sources=[{{"samples":"a","targets":"b"}}]',
        "leave one of them out",
    ),
    "train: layers the student lacks": (
        TRAIN + " --set train.matching.student_layers=[9]",
        "layer",
    ),
    "train: negative seed": ("train-student --set train.seed=-1", "train.seed"),
    "train: unknown stage": ("train-student --stage xyz", "xyz"),
    "evaluate: no such model": ("evaluate {new}/model " + PAIRS, "{new}/model"),
    "evaluate: no checkpoint": ("evaluate {images} " + PAIRS, "{images}"),
    "evaluate: model is a bare decoder": (
        "evaluate {lm} " + PAIRS,
        "of type qwen2, which takes no images",
    ),
    "evaluate: training without a finished stage": (
        "evaluate {begun} " + PAIRS,
        "holds no finished stage",
    ),
    "evaluate: no pairs": (
        "evaluate {teacher} --suite sugarcrepe --data {new}/pairs --output {new}",
        "is not a folder",
    ),
    "evaluate: no pair at all": (
        "evaluate {teacher} " + PAIRS + " --limit 0",
        "--limit",
    ),
    "compare: no result": ("compare {images} {images}", "holds no result of `cdp evaluate`"),
    "compare-attention: model is a bare decoder": (
        "compare-attention {lm} --samples {samples} --targets {targets}",
        "takes no images",
    ),
    "compare-attention: no such model": ("compare-attention {new} --samples {samples} --targets {targets}", "{new}"),
    "compare-attention: no samples": ("compare-attention {new} --targets {targets}", "--samples is missing"),
    "compare-attention: nothing to compare": (
        "compare-attention {new} --samples {samples} --targets {targets} --limit 0",
        "--limit",
    ),
    "inspect: no store": ("inspect {images}", "is no target store"),
    "inspect: nothing there": ("inspect {new}", "is no target store"),
    "verify: no store": ("verify {images}", "is no target store"),
    "no such command": ("frobnicate", "frobnicate"),
    "the old name of --vision": ("train-student --adapter own", "--adapter is called --vision now"),
    "evaluate: no such suite": (
        "evaluate {teacher} --suite sugar --data {pairs} --output {new}",
        "there are sugarcrepe",
    ),
    "evaluate: no folder named": ("evaluate {teacher} --suite sugarcrepe --output {new}", "data"),
    "evaluate: no suites named": ("evaluate {teacher} --suite all --output {new}", "set evaluate.suites"),
    "an option's old name": ("compare-attention x --page=y", "--page is called --html now"),
}


@pytest.fixture(scope="session")
def places(tiny: TinyWorld, targets: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    from stages.samples.pack import PackConfig, pack_samples
    from tests.checkpoints import make_llava_data

    folder = tmp_path_factory.mktemp("mistakes")
    pack_samples(*make_llava_data(folder / "other", 5, seed=3), folder / "other_samples", PackConfig())
    shutil.copytree(targets, folder / "incomplete")
    (folder / "incomplete/commits/000001.json").unlink()
    (folder / "begun/dpt").mkdir(parents=True)
    (folder / "begun/dpt/stage.json").write_text("{}")
    (folder / "bad.yaml").write_text("train: [unclosed")
    (folder / "unknown.yaml").write_text("trian:\n  seed: 3\n")
    return {
        "teacher": tiny.teacher,
        "lm": tiny.student_lm,
        "data": tiny.data,
        "images": tiny.images,
        "samples": tiny.samples,
        "pairs": tiny.pairs,
        "targets": targets,
        "other_samples": folder / "other_samples",
        "begun": folder / "begun",
        "incomplete": folder / "incomplete",
        "bad_yaml": folder / "bad.yaml",
        "unknown_key": folder / "unknown.yaml",
    }


@pytest.mark.usefixtures("shards_made_here")
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_message_and_exit_code_2(
    mistake: str,
    places: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    names = {name: str(place) for name, place in places.items()} | {"new": str(tmp_path / "new")}
    command, message = MISTAKES[mistake]
    arguments = [word.format(**names) for word in command.split()]
    ended = run_here(*arguments, monkeypatch=monkeypatch, capsys=capsys)
    assert ended.code == 2, ended
    said = " ".join(ended.err.replace("│", " ").split())
    assert message.format(**names) in said or message.format(**names) in ended.err
    assert ended.err.count("error:") + ended.err.count("Usage:") == 1


def test_a_mistake_in_a_process_of_its_own_has_no_traceback(tmp_path: Path) -> None:
    ended = cdp("inspect", tmp_path)
    assert ended.code == 2
    assert ended.out == ""
    assert ended.err.startswith("error: ")
    assert "Traceback" not in ended.err


LOADED = """
import sys
from pipeline.cli.app import main
try:
    main()
finally:
    print(sorted({"ray", "torch", "transformers", "zarr"} & set(sys.modules)), file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("command", "needed"),
    [
        ("pack-samples {data} {images} {new}", []),
        ("inspect {targets}", []),
        ("verify {targets} --samples {samples}", ["torch"]),
    ],
)
def test_a_command_without_a_model_loads_no_library_that_it_does_not_need(
    command: str, needed: list[str], tiny: TinyWorld, targets: Path, tmp_path: Path
) -> None:
    names = {**vars(tiny), "targets": targets, "new": tmp_path / "new"}
    words = [word.format(**names) for word in command.split()]
    done = subprocess.run([sys.executable, "-c", LOADED, *words], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == str(needed)


@pytest.mark.parametrize(("package", "extra"), [("pyarrow", "ray-train"), ("sklearn", "digits")])
def test_a_missing_optional_package_is_named_with_its_extra(
    package: str, extra: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def without_package() -> None:
        raise ModuleNotFoundError(f"No module named '{package}'", name=package)

    monkeypatch.setattr(app, "app", without_package)
    with pytest.raises(SystemExit) as exit_code:
        app.main()
    assert exit_code.value.code == 2
    assert f"compodistill[{extra}]" in capsys.readouterr().err


@pytest.mark.parametrize(
    "take_all",
    [
        lambda: bytearray(2**62),
        lambda: torch.empty(2**60),
        lambda: _raise(torch.OutOfMemoryError("CUDA out of memory")),
    ],
)
def test_the_end_of_memory_is_one_message(
    take_all: Callable[[], object], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(app, "app", take_all)
    ended = run_here(monkeypatch=monkeypatch, capsys=capsys)
    assert ended.code == 2
    assert re.fullmatch(
        r"error: no memory is left on this machine or its GPU \(.+\); free some, or lower .*\n", ended.err
    )


def _raise(error: Exception) -> None:
    raise error
