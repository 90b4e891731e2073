"""`cdp compare-attention`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli.options import (
    ReportOption,
    SamplesOption,
    TargetsOption,
    TeacherOption,
    can_be_saved,
    check_and_say_which,
    input_path,
    save,
)
from storage.errors import UserError

if TYPE_CHECKING:
    from pipeline.attention.compare import AttentionRequest
    from pipeline.attention.report import AttentionReport
    from pipeline.ui.tables import ReportTable
    from stages.evaluation.attention.objects import ObjectFile

NUM_PICTURES = 8


def compare_attention(
    students: Annotated[list[str] | None, typer.Argument(help="Student checkpoints or training runs.")] = None,
    samples: SamplesOption = None,
    targets: TargetsOption = None,
    limit: Annotated[int, typer.Option(help="Samples to compare on.", min=1)] = 64,
    teacher: TeacherOption = None,
    answers: Annotated[
        list[str] | None, typer.Option(help="Folder of `cdp evaluate` of a student; of several: NAME=FOLDER.")
    ] = None,
    word: Annotated[str | None, typer.Option(help="Attention from this word of answers to the image.")] = None,
    from_: Annotated[str | None, typer.Option("--from", help="answer: attention from whole answers to it.")] = None,
    objects: Annotated[
        Path | None, typer.Option(callback=input_path, help="File of boxes or masks, a record a picture.")
    ] = None,
    objects_suite: Annotated[str | None, typer.Option(help="Suite that marks objects, with --data.")] = None,
    data: Annotated[Path | None, typer.Option(callback=input_path, help="Folder of that suite's files.")] = None,
    images: Annotated[
        Path | None, typer.Option(callback=input_path, help="Folder of its images, if they lie elsewhere.")
    ] = None,
    report: ReportOption = None,
    html: Annotated[
        Path | None, typer.Option(callback=can_be_saved, help="File to save an HTML report with pictures in.")
    ] = None,
) -> None:
    """Compares attention of teacher and students.

    On the same samples: how alike it is, what it falls on, and whether answers are right where it is alike. Without
    students the teacher alone is looked at: its stored maps, or with --teacher itself.
    """
    from pipeline.report.shown_names import shown_names
    from pipeline.run_file import need

    samples, students = need(samples, "--samples"), students or []
    named = dict(zip(shown_names(students), students, strict=True))
    if targets is None and named:
        targets = need(targets, "--targets")
    if targets is None and teacher is None:
        raise UserError("--targets is missing; give it, or --teacher to look at a teacher itself")
    text = _text(from_, word)
    if html is not None and not named:
        raise UserError("--html shows students beside the teacher; name a student")
    found_answers = answers_by_student(answers or [], named)
    places = _objects(objects, objects_suite, data, images)
    _check(named, samples, targets, teacher)

    from pipeline.attention.compare import AttentionRequest, compare_models
    from pipeline.attention.tables import attention_tables
    from pipeline.ui.progress import progress_display
    from pipeline.ui.tables import print_table

    request = AttentionRequest(
        named, samples, targets, limit, teacher, text, places, found_answers,
    )  # fmt: skip
    with progress_display() as progress:
        result = compare_models(request, progress)
    tables = attention_tables(result)
    for table in tables:
        print_table(table)
    save(report, result.to_json())
    if html is not None:
        _save_page(html, request, result, tables)


def _check(named: dict[str, str], samples: str, targets: str | None, teacher: str | None) -> None:
    """Refuses what cannot be compared, before a library is loaded for it."""
    from pipeline.preflight import check_pairing, check_samples, check_teacher
    from stages.teacher.config import TeacherConfig

    for model in named.values():
        check_and_say_which(model, with_template=False)
    if targets is None:
        check_samples(samples)
    else:
        check_pairing(samples, targets)
    if teacher is not None:
        check_teacher(TeacherConfig(checkpoint=teacher))


def _text(from_: str | None, word: str | None) -> str | None:
    """Where attention is taken from beside the image."""
    if from_ not in (None, "answer"):
        raise UserError(f"--from is {from_!r}; give --from answer, or one word with --word")
    if word is None:
        return from_
    if from_ is not None:
        raise UserError(f"--from answer takes all words, --word {word!r} one; give one of them")
    if not word.strip():
        raise UserError("--word is empty; give a word that answers say")
    return word.strip()


def answers_by_student(answers: list[str], named: dict[str, str]) -> dict[str, list[Path]]:
    """Folders of answers by student.

    Raises:
        UserError: If it is not clear whose they are, or one holds none.
    """
    from stages.evaluation.attention.suite_folders import read_run, suite_folders

    found: dict[str, list[Path]] = {}
    for each in answers:
        name, equals, folder = each.partition("=")
        if equals and name in named:
            found.setdefault(name, []).append(Path(folder))
        elif len(named) == 1 and (not equals or Path(each).exists()):
            found.setdefault(next(iter(named)), []).append(Path(each))
        else:
            shown = ", ".join(named) or "none is given"
            raise UserError(f"--answers {each} does not say of which student; give NAME=FOLDER, NAME of: {shown}")
    for suite in (one for folders in found.values() for each in folders for one in suite_folders(each)):
        read_run(suite)
    return found


def _objects(file: Path | None, suite: str | None, data: Path | None, images: Path | None) -> "ObjectFile | None":
    if file is not None and suite is not None:
        raise UserError("--objects and --objects-suite both say where objects are; give one")
    if suite is None:
        if data is not None or images is not None:
            raise UserError("--data and --images are of --objects-suite; name the suite")
        if file is None:
            return None
        from stages.evaluation.attention.objects import read_objects

        return read_objects(file)
    if data is None:
        raise UserError(f"--objects-suite {suite} needs --data, the folder of its files")
    from stages.evaluation.attention.objects import objects_of_suite
    from stages.evaluation.config import SuiteConfig
    from stages.evaluation.loaded_suite import load_suite

    return objects_of_suite(load_suite(suite, SuiteConfig(data=data, images=images, allow_missing_images=True)))


def _save_page(html: Path, request: "AttentionRequest", result: "AttentionReport", tables: "list[ReportTable]") -> None:
    from pipeline.report.build import attention_page
    from pipeline.ui.report.render import render_page

    assert request.targets is not None
    similarity = {name: one.similarity for name, one in result.students.items()}
    page = attention_page(
        request.students, (request.samples, request.targets), similarity, tables, NUM_PICTURES, teacher=request.teacher
    )
    save(html, render_page(page))
