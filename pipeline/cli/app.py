"""The `cdp` command line: parse, load the settings, call one function, print its report.

The only file that imports typer. Heavy libraries are imported inside the commands, so that `cdp --help` is instant.
"""

import signal
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from pipeline.cli.commands import extract_targets, say, say_which_student, train_stages, train_sweep, verify_targets
from pipeline.cli.options import need, percent
from pipeline.interruption import Interrupted, raised_on
from pipeline.recipes import recipe_names
from storage.errors import UserError, disk_errors_named


class Commands(TyperGroup):
    """All commands; Ctrl-C leaves them as `Interrupted`."""

    def invoke(self, ctx: Any) -> Any:
        """Runs the command that was named."""
        with raised_on(signal.SIGINT):
            return super().invoke(ctx)


app = typer.Typer(
    cls=Commands,
    help="Offline distillation of multimodal LLMs: run the teacher once, then train any number of students.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", help=f"Run file (YAML) with any setting, or a recipe: {', '.join(recipe_names())}."),
]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="section.field=value; wins over the run file.")]
SamplesOption = Annotated[str | None, typer.Option("--samples", help="Sample shards: folder or object-store URL.")]
TargetsOption = Annotated[str | None, typer.Option("--targets", help="Target store: folder or object-store URL.")]


class Stages(StrEnum):
    """What `--stage` takes."""

    ALL = "all"
    DPT = "dpt"
    DFT = "dft"
    SFT = "sft"


class Adapter(StrEnum):
    """What `--adapter` takes."""

    TEACHER = "teacher"
    OWN = "own"


class Dtype(StrEnum):
    """What `--dtype` takes."""

    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT32 = "float32"


class Scoring(StrEnum):
    """What `--scoring` takes."""

    LIKELIHOOD = "likelihood"
    LETTERS = "letters"


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for all that the demo makes.")] = Path("demo"),
    images: Annotated[int, typer.Option(help="Training images; fewer is faster and teaches less.")] = 1500,
    steps: Annotated[int | None, typer.Option(help="Steps of each student's longest stage.")] = None,
    variant: Annotated[str, typer.Option(help="shapes, or digits: handwritten digits instead.")] = "shapes",
) -> None:
    """The whole pipeline on the bundled example: pack, extract, train, evaluate, compare."""
    from pipeline.demo.demo import DemoConfig, run_demo

    run_demo(output, DemoConfig(num_images=images, steps=steps, variant=variant))


@app.command("pack-samples")
def pack_samples(
    source: Annotated[Path, typer.Argument(help="LLaVA JSON or JSONL.", metavar="JSON")],
    images: Annotated[Path, typer.Argument(help="Folder that the records' image paths start from.")],
    output: Annotated[Path, typer.Argument(help="New folder of sample shards.", metavar="OUT")],
    samples_per_shard: Annotated[int, typer.Option(help="Most samples of a shard.")] = 512,
    shard_bytes: Annotated[int, typer.Option(help="Most bytes of a shard.")] = 256 * 2**20,
    max_skipped_fraction: Annotated[float, typer.Option(help="Samples that may be unusable.")] = 0.0,
) -> None:
    """LLaVA JSON and images -> sample shards; same-image conversations side by side."""
    from pipeline.cli.tables import print_pack_report
    from pipeline.run_file import validated
    from pipeline.ui.progress import Bars, bars
    from stages.samples.pack import PackConfig
    from stages.samples.pack import pack_samples as pack

    flags = {
        "max_samples_per_shard": samples_per_shard,
        "max_shard_bytes": shard_bytes,
        "max_skipped_fraction": max_skipped_fraction,
    }
    config = validated(PackConfig, flags, "the flags of pack-samples")
    with bars() as progress:
        report = pack(source, images, output, config, Bars(progress))
    print_pack_report(report, output)


@app.command()
def estimate(
    teacher: Annotated[str | None, typer.Option(help="Teacher checkpoint: folder or hub id.")] = None,
    samples: SamplesOption = None,
    workers: Annotated[int | None, typer.Option(help="Teachers side by side; none is one a GPU or core.")] = None,
    config_only: Annotated[bool, typer.Option("--config-only", help="Without the weights: coarse.")] = False,
    report: Annotated[Path | None, typer.Option("--json", help="Where to save the report as JSON.")] = None,
    config: ConfigOption = None,
    settings: SetOption = None,
) -> None:
    """Bytes and GPU-hours of an extraction with each setting, from a few samples, before anything is written."""
    from pipeline.cli.tables import print_estimate
    from pipeline.estimation import make_estimate
    from pipeline.run_file import load_run_file
    from pipeline.ui.progress import Bars, bars

    flags = {"teacher.checkpoint": teacher, "samples": samples, "extract.workers": workers}
    run = load_run_file(config, settings or [], flags)
    if run.teacher is None:
        raise UserError("--teacher is missing; give the flag or set teacher.checkpoint in the run file")
    place = run.samples if config_only else need(run.samples, "--samples")
    with bars() as progress:
        result = make_estimate(
            run.teacher, place, run.extract, run.estimate, config_only=config_only, progress=Bars(progress)
        )
    if report is not None:
        report.parent.mkdir(parents=True, exist_ok=True)
        report.write_text(result.model_dump_json(indent=1))
    print_estimate(result)


@app.command("extract-teacher")
def extract_teacher(
    teacher: Annotated[str | None, typer.Option(help="Teacher checkpoint: folder or hub id.")] = None,
    samples: SamplesOption = None,
    targets: TargetsOption = None,
    config: ConfigOption = None,
    settings: SetOption = None,
    ray_address: Annotated[str | None, typer.Option(help="Ray cluster; none starts one on this machine.")] = None,
    workers: Annotated[int | None, typer.Option(help="Teachers side by side; none is one a GPU or core.")] = None,
) -> None:
    """Teacher over sample shards -> targets, as a Ray job; run again, it makes what is missing."""
    flags = {
        "teacher.checkpoint": teacher,
        "samples": samples,
        "targets": targets,
        "extract.ray_address": ray_address,
        "extract.workers": workers,
    }
    extract_targets(config, settings or [], flags)


@app.command("train-student")
def train_student(
    samples: SamplesOption = None,
    targets: TargetsOption = None,
    student: Annotated[
        str | None, typer.Option(help="The student's decoder, or with --adapter own a whole model: folder or hub id.")
    ] = None,
    adapter: Annotated[Adapter | None, typer.Option(help="The teacher's tower and adapter, or the student's.")] = None,
    output: Annotated[str | None, typer.Option(help="Folder of the run.")] = None,
    stage: Annotated[
        Stages | None, typer.Option(help="One stage, or all three in a row; none is train.stages of the run file.")
    ] = None,
    resume: Annotated[bool, typer.Option(help="Go on from the newest whole checkpoint; else begin a new run.")] = True,
    ray_address: Annotated[str | None, typer.Option(help="Train on this Ray cluster, with Ray Train.")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes of Ray Train; none is one a GPU.")] = None,
    sweep: Annotated[Path | None, typer.Option(help="YAML of several students: all in turn, side by side.")] = None,
    config: ConfigOption = None,
    settings: SetOption = None,
) -> None:
    """Student from cached targets, one stage or several in a row; resumes. Never loads the teacher."""
    from pipeline.cli.tables import TrainingBars, print_training_reports
    from pipeline.run_file import load_run_file
    from pipeline.ui.progress import bars
    from stages.student.config import STAGES

    flags = {
        "samples": samples,
        "targets": targets,
        "student": student,
        "output": output,
        "train.stages": [name for name in STAGES if stage in (Stages.ALL, name)] or None,
        "train.adapter": adapter.value if adapter is not None else None,
        "train.ray_address": ray_address,
        "train.workers": workers,
    }
    if sweep is not None:
        if not train_sweep(sweep, config, settings or [], flags, resume=resume):
            raise typer.Exit(1)
        return
    run = load_run_file(config, settings or [], flags)
    with bars() as progress:
        reports = train_stages(run, TrainingBars(progress), resume=resume)
    print_training_reports(reports, Path(need(run.output, "--output")))


@app.command("convert-checkpoint")
def convert_checkpoint(
    source: Annotated[str, typer.Argument(help="Released checkpoint: folder or hub id.", metavar="SRC")],
    output: Annotated[Path, typer.Argument(help="New folder.", metavar="OUT")],
    tokenizer: Annotated[str | None, typer.Option(help="Tokenizer, if SRC has none: folder or hub id.")] = None,
    image_processor: Annotated[str | None, typer.Option(help="Image processor, likewise.")] = None,
) -> None:
    """Released CompoDistill or TinyLLaVA checkpoint -> Hugging Face Llava with processor and chat template."""
    from pipeline.cli.tables import print_conversion_report
    from pipeline.ui.progress import Bars, bars
    from stages.convert.checkpoint import convert_checkpoint as convert

    with bars() as progress:
        report = convert(source, output, tokenizer=tokenizer, image_processor=image_processor, progress=Bars(progress))
    print_conversion_report(report, output)


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="Checkpoint: a folder, a training run, or a hub id.")],
    pairs: Annotated[Path, typer.Option(help="Folder of KIND.json files in SugarCrepe's layout.")],
    images: Annotated[Path | None, typer.Option(help="Folder of the pairs' images; none is PAIRS/images.")] = None,
    scoring: Annotated[Scoring | None, typer.Option(help="By likelihood, or by the letter answered.")] = None,
    limit: Annotated[int | None, typer.Option(help="Pairs of each kind.", min=1)] = None,
    report: Annotated[Path | None, typer.Option(help="Where to save the report as JSON.")] = None,
    config: ConfigOption = None,
    settings: SetOption = None,
) -> None:
    """Compositional suites on a checkpoint: accuracy of each kind with its 95 % interval."""
    from pipeline.cli.tables import print_evaluation
    from pipeline.evaluation import evaluate_checkpoint
    from pipeline.run_file import load_run_file
    from pipeline.ui.progress import bars

    run = load_run_file(config, settings or [], {"evaluate.scoring": scoring.value if scoring else None})
    say_which_student(model)
    with bars() as progress:
        result = evaluate_checkpoint(model, pairs, images, run.evaluate, limit, progress)
    if report is not None:
        report.parent.mkdir(parents=True, exist_ok=True)
        report.write_text(result.to_json())
    print_evaluation({Path(model).name: result})


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="Training run or checkpoint.", metavar="RUN_OR_CHECKPOINT")],
    output: Annotated[Path, typer.Argument(help="New folder.", metavar="OUT")],
    fold: Annotated[bool, typer.Option(help="Post-connector into the adapter, where exact.")] = True,
    dtype: Annotated[Dtype | None, typer.Option(help="Of the weights; none is as trained, float32 of a run.")] = None,
    teacher: Annotated[str | None, typer.Option(help="How the model card names the teacher.")] = None,
    evaluation: Annotated[Path | None, typer.Option(help="Report of `cdp evaluate`, for the card.")] = None,
) -> None:
    """Student -> self-contained Hugging Face folder that needs transformers only, with a model card."""
    from pipeline.cli.tables import print_export_report
    from pipeline.export import export as export_folder

    say_which_student(model)
    settings: dict[str, Any] = {"fold": fold, "dtype": None if dtype is None else dtype.value}
    print_export_report(export_folder(model, output, **settings, teacher=teacher, evaluation=evaluation), output)


@app.command()
def chat(
    model: Annotated[str, typer.Argument(help="Export, training run, checkpoint folder or hub id.")],
    image: Annotated[Path, typer.Argument(help="JPEG, PNG or WebP file.")],
    question: Annotated[str | None, typer.Argument(help="None reads questions until an empty line.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens after which an answer is cut.", min=1)] = 256,
) -> None:
    """Asks a model about an image; the answer comes word by word, always the most likely next token."""
    from pipeline.chat import answer, open_chat, talk

    say_which_student(model)
    opened = open_chat(model, image, max_new_tokens)
    if question is None:
        talk(opened)
    else:
        answer(opened, question)


@app.command("compare-attention")
def compare_attention(
    model: Annotated[str, typer.Argument(help="Student checkpoint or training run.")],
    samples: SamplesOption = None,
    targets: TargetsOption = None,
    limit: Annotated[int, typer.Option(help="Samples to compare on.", min=1)] = 64,
    report: Annotated[Path | None, typer.Option(help="Where to save the numbers as JSON.")] = None,
    page: Annotated[Path | None, typer.Option(help="Where to save an HTML page with pictures.")] = None,
) -> None:
    """How alike a student's visual attention is to the teacher's cached maps: numbers and pictures."""
    from pipeline.cli.tables import print_similarity, similarity_table
    from pipeline.evaluation import compare_with_targets, gaze_pictures
    from pipeline.ui.html_report import render_report
    from pipeline.ui.progress import bars

    say_which_student(model)
    with bars() as progress:
        result = compare_with_targets(model, need(samples, "--samples"), need(targets, "--targets"), limit, progress)
    if report is not None:
        report.parent.mkdir(parents=True, exist_ok=True)
        report.write_text(result.model_dump_json(indent=1))
    if page is not None:
        pictures = gaze_pictures({Path(model).name: model}, str(samples), str(targets), count=8)
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(render_report(f"Attention of {model}", [similarity_table(result)], pictures), encoding="utf-8")
    print_similarity(result)


@app.command()
def inspect(
    targets: Annotated[str, typer.Argument(help="Target store: folder or object-store URL.")],
) -> None:
    """What a target store holds: shards, samples, maps, bytes by array, fingerprint."""
    from pipeline.cli.tables import print_store_summary
    from storage.inspect import summarize

    print_store_summary(summarize(targets))


@app.command()
def verify(
    targets: Annotated[str, typer.Argument(help="Target store: folder or object-store URL.")],
    samples: SamplesOption = None,
    sample: Annotated[str, typer.Option(help="Share of the shards to read; all records and sizes always.")] = "100%",
    seed: Annotated[int, typer.Option(help="Which shards a share is; another seed reads others.")] = 0,
    repair: Annotated[bool, typer.Option("--repair", help="Set broken parts aside, to be extracted again.")] = False,
    teacher: Annotated[str | None, typer.Option(help="With --repair and --samples: extract them again now.")] = None,
    config: ConfigOption = None,
) -> None:
    """Checks every commit, file, chunk and count; exit code 1 when anything is wrong."""
    from pipeline.cli.tables import print_repair_report
    from storage.repair import repair as set_aside

    share = percent(sample)
    report = verify_targets(targets, samples, share, seed)
    if report.findings and repair:
        repaired = set_aside(report)
        print_repair_report(repaired, report)
        if repaired.moved and (teacher or config):
            extract_targets(config, [], {"teacher.checkpoint": teacher, "samples": samples, "targets": targets})
            report = verify_targets(targets, samples, share, seed)
    if report.findings:
        raise typer.Exit(1)


_EXTRA_OF = {"ray": "ray", "pandas": "ray-train", "pyarrow": "ray-train", "obstore": "s3", "sklearn": "examples"}
"""Optional packages and the extra of the project that installs them."""


def main() -> None:
    """Entry point: a user's mistake is one message and exit code 2, an interruption says how to go on."""
    try:
        with disk_errors_named(Path.cwd()):
            app()
    except UserError as error:
        say(f"error: {error}")
        sys.exit(2)
    except ModuleNotFoundError as error:
        extra = _EXTRA_OF.get((error.name or "").split(".")[0])
        if extra is None:
            raise
        say(f"error: this needs {error.name}, which is not installed; pip install 'compodistill[{extra}]'")
        sys.exit(2)
    except Interrupted as stop:
        say(str(stop))
        sys.exit(stop.exit_code)


if __name__ == "__main__":
    main()
