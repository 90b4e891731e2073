"""Mistakes are said before a large library is loaded, and before any work is done; results are not lost with a file."""

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from stages.samples.pack import PackConfig, pack_samples
from tests.checkpoints import make_foreign_lm
from tests.conftest import TinyWorld
from tests.gguf_files import make_gguf
from tests.pipeline.processes import run_here

PAIRS = "--suite sugarcrepe --data {pairs} --output {new}"
TRAIN = "train-student --samples {samples} --targets {targets} --student {lm} --output"
ASKED = f"{TRAIN} {{new}} --set"
STUDENT = "train-student --samples {samples} --targets {targets} --output {new} --student"
EXTRACT = "extract-teacher --teacher {teacher} --samples {samples} --targets {new}"
TEACHER = "extract-teacher --samples {samples} --targets {new} --teacher"
AGAIN = "extract-teacher --teacher {teacher} --samples {samples} --targets {targets} --set"
SWEEP = "train-student --samples {samples} --targets {targets} --output {new} --sweep"
PICTURE = "{pairs}/images/swap_obj-0.png what?"

SWAPPED = "are samples and targets swapped?"

MISTAKES = {
    f"{ASKED} lr=1": "lr: there is no such setting",
    f"{EXTRACT} --config {{data}}/data.json": "holds a list, expected sections",
    "config train.lr": "did you mean train.dpt.learning_rate or train.dft.lea",
    f"{EXTRACT} --set teacher.layers=[7,8]": "layers [7, 8] are not consecutive layers of a decoder with 8",
    f"{EXTRACT} --set teacher.num_matched=9": "9 matched layers need at least as many captured teacher layers",
    # What targets do not serve, or are not made of.
    f"{ASKED} train.dpt.kd_temperature=2": "kd_temperature of dpt is 2.0, but {targets} holds what a student needs at",
    f"{ASKED} train.dft.kd_temperature=3": "kd_temperature of dft is 3.0",
    f"{ASKED} train.matching.student_layers=[99]": "student layers [99] were asked for, but the decoder",
    f"{ASKED} train.matching.num_matched=9": "the student has 4 layers but 9 are to be matched",
    f"{ASKED} train.matching.span=early": "the early layers of the teacher are 0 to 2, but the targets hold",
    f"{STUDENT} {{odd}}/decoder.gguf --set train.matching.student_layers=[99]": "student layers [99] were asked for",
    f"{ASKED} train.data.subset={{odd}}/none": "subset {odd}/none cannot be read",
    "train-student --samples {samples} --targets {odd}/begun --student {lm} --output {new}": "6 of 7 shards committed",
    "train-student --samples {odd}/others --targets {targets} --student {lm} --output {new}": "differs in: samples",
    "compare-attention {teacher} --samples {odd}/others --targets {targets}": "differs in: samples",
    f"{AGAIN} teacher.max_length=99": "max_length: stored 1536, this run 99",
    f"{AGAIN} teacher.temperatures=[2]": "logit_codec.temperatures: stored [], this run [2.0]",
    f"{AGAIN} images.exif=apply": "images.exif: stored",
    f"{TRAIN} {{odd}}/run --no-resume": "holds dpt already; name a new --output",
    # Students of another kind.
    f"{STUDENT} {{odd}}/packed": "is quantized (gptq, 4 bits), and a student needs weights of 16 or 32 bits",
    f"{STUDENT} {{teacher}}": "is a whole multimodal model (llava); give --vision own",
    f"{STUDENT} {{lm}} --vision own": "is of type qwen2, which has no vision tower of its own",
    f"{STUDENT} {{odd}}/decoder.gguf --vision own": "is a GGUF file, which is read as a decoder alone; --vision own",
    f"{STUDENT} {{odd}}/blob --vision own": "blob is a GGUF file, which is read as a decoder alone",
    f"{STUDENT} {{odd}}/cut.gguf": "fewer than its tensors take",
    f"{STUDENT} {{odd}}/mmproj.gguf": "holds a vision tower (mmproj)",
    f"{STUDENT} {{odd}}/encoder": "is of type bert, which is no causal language model",
    f"{STUDENT} {{odd}}/wordless": "has no tokenizer.json",
    f"{STUDENT} {{odd}}/foreign": "foreign is not the teacher's; it differs in:",
    f"{STUDENT} {{odd}}/weightless": "has neither model.safetensors nor",
    f"{STUDENT} {{odd}}/broken": "config.json is not JSON",
    # Teachers of another kind, or that lack a file.
    f"{TEACHER} {{lm}}": "model type 'qwen2' is not a known teacher family",
    f"{TEACHER} {{odd}}/mute": "has no chat template; save one with it (chat_template.jinja), or set",
    f"{TEACHER} {{odd}}/blind": "has no processor: neither processor_config.json nor preprocessor_config.json is there",
    f"{TEACHER} {{odd}}/unread": "has no tokenizer: tokenizer.json is absent",
    f"{TEACHER} {{odd}}/short": "model.safetensors (5000 bytes) is not whole",
    f"{EXTRACT} --set teacher.chat_template=nosuch": "chat template nosuch cannot be read",
    "estimate --samples {samples} --teacher {odd}/mute": "has no chat template",
    "estimate --samples {samples} --teacher {lm}": "model type 'qwen2' is not a known teacher family",
    # Models without images or templates, for commands that put questions to them.
    "export {lm} {new}": "is of type qwen2, which takes no images",
    "evaluate {lm} " + PAIRS: "is of type qwen2, which takes no images",
    f"chat {{lm}} {PICTURE}": "is of type qwen2, which takes no images",
    "compare-attention {lm} --samples {samples} --targets {targets}": "is of type qwen2, which takes no images",
    "export {odd}/blind {new}": "has no processor",
    "evaluate {odd}/mute " + PAIRS: "has no chat template",
    f"chat {{odd}}/mute {PICTURE}": "has no chat template",
    "export {odd}/short {new}": "is not whole",
    "convert-checkpoint {teacher} {new}": "has model type 'llava'; the layouts known to convert are compodistill, tiny",
    "convert-checkpoint {odd}/broken {new}": "config.json is not JSON",
    # Clusters that are not there.
    f"{EXTRACT} --ray-address 127.0.0.1:1": "no Ray cluster at 127.0.0.1:1: [Errno 111] Connection refused",
    f"{EXTRACT} --ray-address ray://127.0.0.1:1": "no Ray cluster at ray://127.0.0.1:1: [Errno 111]",
    f"{EXTRACT} --ray-address http://127.0.0.1:8265": "this is no address of one; expected auto, HOST:6379",
    f"{TRAIN} {{new}} --ray-address 127.0.0.1:1": "no Ray cluster at 127.0.0.1:1",
    # Sweeps none of whose students can be trained.
    f"{SWEEP} {{odd}}/sweep.yaml --student {{teacher}}": "student a: {teacher} is a whole multimodal model",
    f"{SWEEP} {{odd}}/sweep.yaml": "student a: --student is missing",
    f"{SWEEP} {{odd}}/sweep.yaml --student {{lm}} --output {{samples}}": "is a sample set, expected a new folder",
    # Samples and targets swapped, in every command that takes both.
    "train-student --samples {targets} --targets {samples} --student {lm} --output {new}": SWAPPED,
    "extract-teacher --teacher {teacher} --samples {targets} --targets {new}": SWAPPED,
    "extract-teacher --teacher {teacher} --samples {samples} --targets {samples}": SWAPPED,
    "compare-attention {teacher} --samples {targets} --targets {samples}": SWAPPED,
    "estimate --teacher {teacher} --samples {targets}": SWAPPED,
    "estimate --teacher {teacher} --config-only": "give --samples, or --set estimate.samples=NUMBER",
    "estimate --teacher {teacher} --config-only --show 1 --set estimate.samples=8": "--samples is missing",
    "inspect {samples}": SWAPPED,
    "inspect {samples} --sample 0": SWAPPED,
    "verify {samples} --samples {targets}": SWAPPED,
    "verify {targets} --samples {targets}": SWAPPED,
    # What can be said of a repair before anything is moved.
    "verify {targets} --samples {new}": "nothing is there; check the path, or run `cdp pack-samples`",
    "verify {targets} --sample 500%": "expected a percentage above 0 and at most 100",
    "verify {targets} --teacher {teacher}": "which takes --repair; add it",
    "verify {targets} --repair --teacher {teacher}": "--samples is missing",
    "verify {targets} --repair --samples {samples} --teacher {lm}": "is not a known teacher family",
    # Something else than what is asked for.
    "train-student --samples {teacher} --targets {targets} --student {lm} --output {new}": "but a model's che",
    "train-student --samples {samples} --targets {new} --student {lm} --output {new}": "nothing is there; check",
    "train-student --samples {samples} --targets {targets} --student {samples} --output {new}": "found a sample set",
    "extract-teacher --teacher {teacher} --samples {data}/data.json --targets {new}": "but a file; name",
    "extract-teacher --teacher {data}/data.json --samples {samples} --targets {new}": "is a file, expected the folder",
    "extract-teacher --teacher {teacher} --samples {samples} --targets {lm}": "is a model's checkpoint, expected",
    "extract-teacher --teacher {teacher} --samples {samples} --targets {data}/data.json": "is a file; name a folder",
    f"{TRAIN} {{targets}}": "is a target store, expected a training run or a new folder",
    "export {samples} {new}": "found a sample set",
    "export {lm} {lm}": "holds something already",
    "export {teacher} {new} --evaluation {data}/data.json": "is no result of `cdp evaluate`",
    "convert-checkpoint {targets} {new}": "found a target store",
    "evaluate {teacher} --suite pope --output {new}": "--suite pope needs --data, its folder; fetch coco_pope_",
    "evaluate {teacher} --suite popes --data {pairs} --output {new}": "no suite 'popes'; there are sugarcrepe",
    "evaluate {teacher} --suite sugarcrepe --data {data}/data.json --output {new}": "is not a folder",
    "chat {teacher} {new}/none.png question": "no image at",
    "demo --output {data}/data.json": "is a file; name a folder",
    "demo --output {targets}": "is a target store, expected a new folder",
    # Where nothing can be written, or what lies on another machine.
    f"{TRAIN} /proc/none": "nothing can be written in /proc",
    f"{TRAIN} s3://bucket/run": "s3://bucket/run is a URL, expected a path of this machine",
    "estimate --teacher {teacher} --samples {samples} --report /proc/none/x.json": "nothing can be written in /proc",
    "evaluate {teacher} " + PAIRS + " --report /proc/x.json": "nothing can be written in /proc",
    "compare-attention {lm} --samples s --targets t --html {data}/data.json/x.html": "which is a file",
    "compare-attention --samples s --targets t --from question": "--from is 'question'; give --from answer",
    "compare-attention --samples s --targets t --from answer --word a": "--from answer takes all words, --word 'a' one",
    "compare-attention --samples s --targets t --word=": "--word is empty; give a word",
    "compare-attention --samples s --targets t --html x.html": "name a student",
    "compare-attention --samples s --targets t --objects {odd}/none": "no data file at {odd}/none",
    "compare-attention --samples s --targets t --objects {odd}/sweep.yaml --objects-suite pope": "give one",
    "compare-attention --samples s --targets t --objects-suite r-bench-boxes": "needs --data",
    "compare-attention --samples s --targets t --data {data}": "are of --objects-suite; name the suite",
    "compare-attention {lm} --samples s --targets t --answers {odd}/none": "holds no answers of `cdp evaluate`",
    "compare-attention {lm} --samples s --targets t --answers a=b": "NAME of: ",
    "compare-attention --samples s": "--targets is missing; give it, or --teacher to look at a teacher itself",
    "compare-attention a b --samples s": "--targets is missing",
    "compare-attention {lm} --samples s --targets t --report /proc/none/x.json": "nothing can be written in /proc",
    "report {samples} --html {new}": "samples holds no training run: a sample set is there; name the --output",
    "report {new} --html {new}": "holds no training run",
    "report {lm} --html {data}/data.json/x.html": "which is a file",
    "export {lm} /proc/none": "nothing can be written in /proc",
    "pack-samples https://host/data.json {data} {new}": "https://host/data.json is a URL",
    "pack-samples {data}/data.json {data}/images /proc/none": "nothing can be written in /proc",
    "demo --output /proc/none": "nothing can be written in /proc",
}

VISION_TOWER = struct.pack("<4sIQQQ20sIQ4s", b"GGUF", 3, 0, 1, 20, b"general.architecture", 8, 4, b"clip")
"""The head of a GGUF file with nothing but its architecture."""

ALL = """
import json, sys
from pipeline.cli.app import main
for line in sys.stdin.read().splitlines():
    sys.argv = ["cdp", *line.split()]
    print(f"# {line}", file=sys.stderr)
    try:
        main()
    except SystemExit as ended:
        print(ended.code, sorted({"ray", "torch", "transformers", "zarr"} & set(sys.modules)))
"""


@pytest.fixture(scope="module")
def odd(tiny: TinyWorld, targets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints and stores each of which lacks something, or is of another kind than commands expect."""
    folder = tmp_path_factory.mktemp("odd")

    def copied(source: Path, name: str, *without: str, **changes: object) -> Path:
        copy = Path(shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns(*without)))
        if changes:
            config = json.loads((copy / "config.json").read_text())
            (copy / "config.json").write_text(json.dumps(config | changes))
        return copy

    copied(tiny.student_lm, "packed", quantization_config={"quant_method": "gptq", "bits": 4})
    copied(tiny.student_lm, "encoder", model_type="bert", architectures=["BertForMaskedLM"])
    copied(tiny.student_lm, "wordless", "tokenizer.json")
    copied(tiny.student_lm, "weightless", "*.safetensors")
    (copied(tiny.student_lm, "broken") / "config.json").write_text("{")
    make_foreign_lm(folder / "foreign")
    copied(tiny.teacher, "mute", "chat_template.jinja")
    copied(tiny.teacher, "blind", "processor_config.json")
    copied(tiny.teacher, "unread", "tokenizer.json")
    os.truncate(copied(tiny.teacher, "short") / "model.safetensors", 5000)
    copied(targets, "begun", "000006.json")
    pack_samples(tiny.data, tiny.images, folder / "others", PackConfig(max_samples_per_shard=5))
    (folder / "run/dpt").mkdir(parents=True)
    (folder / "sweep.yaml").write_text("students: {a: {train.seed: 1}, b: {train.seed: 2}}")
    file = make_gguf(folder / "decoder.gguf", tiny.student_lm)
    (folder / "blob").symlink_to(file)
    (folder / "cut.gguf").write_bytes(file.read_bytes()[:-1000])
    (folder / "mmproj.gguf").write_bytes(VISION_TOWER)
    return folder


def test_mistakes_are_said_before_a_large_library_is_loaded(
    tiny: TinyWorld, targets: Path, odd: Path, tmp_path: Path
) -> None:
    places = {"targets": targets, "odd": odd, "new": tmp_path / "new"}
    names = {**vars(tiny), "lm": tiny.student_lm, "data": tiny.data.parent, **places}
    commands = [command.format(**names) for command in MISTAKES]
    done = subprocess.run(
        [sys.executable, "-c", ALL], input="\n".join(commands), capture_output=True, text=True, check=True
    )
    said = dict(zip(commands, done.stderr.split("# ")[1:], strict=True))
    for command, message in zip(commands, MISTAKES.values(), strict=True):
        assert message.format(**names) in said[command], said[command]
        assert said[command].count("error: ") == 1
    # All in one process: what one command loads, the next ones would show as well.
    assert dict(zip(commands, done.stdout.splitlines(), strict=True)) == dict.fromkeys(commands, "2 []")
    assert list(tmp_path.iterdir()) == []


def test_a_hub_that_does_not_answer_is_called_that(tmp_path: Path) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
    command = [sys.executable, "-m", "pipeline.cli", "export", "somebody/model", str(tmp_path / "new")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 2
    assert (
        "no checkpoint at somebody/model: there is no such folder here, and the model hub at http://127" in done.stderr
    )
    assert "does not answer" in done.stderr
    here = subprocess.run([*command[:-2], "no/such/folder", command[-1]], capture_output=True, text=True, check=False)
    assert "there is no such folder here, and it is no model id either; check the path" in here.stderr


@pytest.mark.parametrize("folder", ["", "new/"])
def test_a_place_that_can_be_written_is_left_as_it_was(folder: str, tmp_path: Path) -> None:
    from storage.writable import check_writable

    check_writable(tmp_path / folder)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("command", "table"),
    [
        ("estimate --teacher {teacher} --config-only --set estimate.samples=665000", "computed from configs alone"),
        ("evaluate {teacher} --suite sugarcrepe --data {pairs} --limit 1 --output {new}", "on sugarcrepe"),
        ("compare-attention {teacher} --samples {samples} --targets {targets} --limit 2", "attention similarity over"),
    ],
)
def test_the_table_is_printed_before_the_report_is_saved(
    command: str,
    table: str,
    tiny: TinyWorld,
    targets: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [word.format(**vars(tiny), targets=targets, new=tmp_path / "new") for word in command.split()]
    ended = run_here(*words, "--report", "/dev/full", monkeypatch=monkeypatch, capsys=capsys)
    assert ended.code == 2
    assert table in " ".join(ended.out.split())
    assert "error: /dev/full: No space left on device" in ended.err
