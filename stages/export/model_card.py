"""The report of an export, and the model card made from it and from the run's files."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from stages.evaluation.result import SuiteResult, note_on_guessing
from stages.export.card_use import GgufFiles, serving, use_of_folder, use_of_gguf
from stages.student.run_folder import StageDescription, StageFolder, StageReport
from stages.student.stage_config import STAGES
from storage.printable import printable
from storage.samples.image_settings import ImageConfig
from storage.strict_model import StrictModel

STAGE_NAMES = tuple(f"{name}." for name in STAGES)

PostConnector = Literal["folded", "kept", "none"]
"""What became of it; `none`: the checkpoint had none."""


class ExportReport(StrictModel):
    """What was exported; `export.json` beside the weights."""

    source: str
    """Last names of the checkpoint's path: run, stage, `student`."""
    model_class: str
    """Class of transformers, or of the modelling file in the folder."""
    custom_code: str | None
    """The modelling file, which `trust_remote_code` runs; None for a class of transformers itself."""
    post_connector: PostConnector
    dtype: str
    """Of the weights."""
    trained_dtype: str
    """Of the checkpoint's weights."""
    parameters: int
    """Of the exported model; tied ones once."""
    bytes: int
    """Of the weight files."""
    image_token_id: int
    """Id of the image token."""
    added_rows: int
    """Rows of zeros added so that the vocabulary holds every id of the tokenizer; they are never generated."""
    images: ImageConfig | None = None
    """How pictures were read and placed in training; None where the checkpoint does not say it."""
    end_token_ids: list[int]
    """Tokens that end an answer."""
    never_generated: tuple[int, ...] = ()
    """Tokens that stand for no text, such as the image token."""
    why_not_vllm: str | None = None
    """Why vLLM's Transformers backend cannot serve a model with `custom_code`; None where it can."""
    logit_error: float
    """Largest difference between logits of the checkpoint and of the exported folder, for one generated picture and
    question. Both are computed in float32, so that it shows the folding and the rounding of weights to `dtype`."""
    rounding_error: float
    """The part of it that comes from rounding all weights from `trained_dtype` to `dtype`; 0 where these are equal. A
    model that computes in `dtype` also rounds in each operation."""
    logit_scale: float
    """Largest of these logits."""
    seconds: float
    """Time taken."""


@dataclass(frozen=True)
class StageRecord:
    """One stage of a run folder: its report, and the settings that it was begun with."""

    report: StageReport
    begun: StageDescription


@dataclass(frozen=True)
class ModelNames:
    """Folders or hub ids of the models that a student was made from; None where it is not known."""

    student: str | None = None
    teacher: str | None = None
    hub_ids: frozenset[str] = frozenset()
    """Those of them that the hub has; a folder such as `models/teacher` only looks like a hub id."""


def read_history(student: Path) -> list[StageRecord]:
    """The stages that trained a student, in order; empty for a checkpoint outside of run folders."""
    history: list[StageRecord] = []
    folder = StageFolder.of_student(student)
    while folder.is_finished and (begun := folder.begun_with()) is not None:
        history.insert(0, StageRecord(folder.report(), begun))
        if len(history) > 3 or begun.data["starts_from"] == "decoder":
            break
        folder = StageFolder(folder.path.with_name(begun.data["starts_from"]))
    return history


def model_card(
    name: str,
    export: ExportReport,
    history: Sequence[StageRecord],
    names: ModelNames,
    evaluations: Sequence[SuiteResult],
    files: GgufFiles | None = None,
) -> str:
    """The card in Markdown, with the front matter that the hub reads; `history` is from `read_history`.

    It is that of a folder for transformers, or of the GGUF files if there are some.
    """
    library = "transformers" if files is None else "gguf"
    parts = [_front_matter(names, history, library), f"# {name}", _about(names, history), "## Use"]
    if files is None:
        parts += use_of_folder(name, export.model_class, export.custom_code)
        parts += ["### Serving", *serving(name, export.custom_code, export.why_not_vllm, export.never_generated)]
    else:
        parts.append(use_of_gguf(files))
    if export.images is not None:
        parts.append(_reading(export.images))
    if history:
        parts += ["## Training", _losses(history), _digests(history), "### Settings", *_settings(history)]
    if evaluations:
        parts += ["## Evaluation", *map(_evaluation, evaluations)]
    return printable("\n\n".join([*parts, "## Export", _export(export)]) + "\n", keep="\n")


def _reading(images: ImageConfig) -> str:
    """How to give the model pictures as in its training."""
    exif = {
        "ignore": "Pictures were read as they are stored, without the turn that EXIF data may ask for.",
        "apply": "Pictures were turned as their EXIF data say: give it `PIL.ImageOps.exif_transpose(image)`.",
    }
    position = {
        "front": "A single picture stood before the text of its turn.",
        "as_written": "A picture stood where the text has it.",
    }
    return f"{exif[images.exif]} {position[images.position]} Transparency was composited on white."


def _front_matter(names: ModelNames, history: Sequence[StageRecord], library: str) -> str:
    # The hub looks these up, so that only its own ids may stand here. JSON is YAML too.
    ids = [model for model in (names.student, names.teacher) if model in names.hub_ids]
    lines = ["---", f"library_name: {library}", "pipeline_tag: image-text-to-text"]
    lines += [f"base_model: {json.dumps(ids)}"] * bool(ids)
    lines += ["tags: [distillation, compodistill]"] * _is_distilled(history)
    return "\n".join([*lines, "---"])


def _is_distilled(history: Sequence[StageRecord]) -> bool:
    """Whether any stage learned from the teacher's logits or attention."""
    return any({"kd", "attention", "answer_attention"} & stage.report.losses.keys() for stage in history)


def _about(names: ModelNames, history: Sequence[StageRecord]) -> str:
    if not history:
        return "A multimodal model."
    if _is_distilled(history):
        made = "distilled from stored targets of a larger one ([CompoDistill](https://arxiv.org/abs/2510.12184))"
        roles = {"its teacher": names.teacher}
    else:
        made = "trained on answers alone, without distillation"
        own_vision = history[-1].begun.settings.get("vision") == "own"
        roles = {"with the vision tower of": None if own_vision else names.teacher}
    roles["begun from"] = names.student
    return f"A multimodal model {made}" + "".join(f", {role} `{_public(m)}`" for role, m in roles.items() if m) + "."


def _public(model: str) -> str:
    # The whole path of a folder is private.
    return Path(model).name if Path(model).is_absolute() or Path(model).exists() else model


def _losses(history: Sequence[StageRecord]) -> str:
    reports = [stage.report for stage in history]
    found = [_named(report.losses) for report in reports]
    about = "Losses are means over the last tenth of a stage's steps."
    if held_out := [report.validation.samples for report in reports if report.validation]:
        validation = [_named(report.validation.losses) if report.validation else {} for report in reports]
        found = [
            trained | {f"validation {name}": value for name, value in held.items()}
            for trained, held in zip(found, validation, strict=True)
        ]
        counts = " and ".join(f"{count:,}" for count in dict.fromkeys(held_out))
        about += f" Validation losses are those at its end, on {counts} samples that were held out of training."
    names = list(dict.fromkeys(name for losses in found for name in losses))
    header = ["stage", "samples", "steps", "trained parameters", "hours", *names]
    rows = []
    for report, losses in zip(reports, found, strict=True):
        numbers = [f"{count:,}" for count in (report.samples, report.steps, report.trained_parameters)]
        numbers.append(f"{report.seconds / 3600:,.3g}")
        rows.append([report.stage, *numbers, *(f"{losses[name]:.4f}" if name in losses else "" for name in names)])
    return f"{_table(header, rows)}\n\n{about}"


def _named(losses: dict[str, float]) -> dict[str, float]:
    return {"loss" if term == "loss" else f"{term} loss": value for term, value in losses.items()}


def _digests(history: Sequence[StageRecord]) -> str:
    """Digests by which others can tell whether they have the same targets and weights."""
    lines = []
    for key, what in (("targets", "fingerprint of the target store"), ("decoder", "weights that training began from")):
        values = [stage.begun.data.get(key) or [] for stage in history]
        digests = dict.fromkeys(str(one) for value in values for one in (value if isinstance(value, list) else [value]))
        lines += [f"- {what}: {', '.join(f'`{digest}`' for digest in digests)}"] * bool(digests)
    return "\n".join(lines)


def _settings(history: Sequence[StageRecord]) -> list[str]:
    """What differs by stage as a table, the rest as a list."""
    own = [
        {name.partition(".")[2]: value for name, value in stage.begun.settings.items() if name.startswith(STAGE_NAMES)}
        for stage in history
    ]
    names = list(dict.fromkeys(name for settings in own for name in settings))
    rows = [[f"`{name}`", *(_value(settings.get(name)) for settings in own)] for name in names]
    last = history[-1].begun.settings
    shared = [f"- `{name}`: {_value(value)}" for name, value in last.items() if not name.startswith(STAGE_NAMES)]
    return [_table(["", *(stage.report.stage for stage in history)], rows), "\n".join(shared)]


def _evaluation(result: SuiteResult) -> str:
    rows = []
    for kind, metrics in result.metrics.items():
        for name, metric in metrics.items():
            interval = "{:.1f} to {:.1f}".format(*metric.interval_95)
            chance = "" if metric.chance is None else f"{metric.chance:.1f}"
            rows.append([kind, str(result.num_items.get(kind, "")), name, f"{metric.value:.1f}", interval, chance])
    table = _table(["kind", "items", "metric", "value", "95 % interval", "guessing"], rows)
    run = result.run
    shown = ", with grey pictures in place of its own" if run.blind else ""
    left_out = f" {result.num_missing} items without their images were left out." if result.num_missing else ""
    guessing = f" {note.capitalize()}." if (note := note_on_guessing(result)) else ""
    return f"Suite `{run.suite}`, asked by `{run.protocol}`{shown}, in {run.dtype}.{left_out}{guessing}\n\n{table}"


def _export(export: ExportReport) -> str:
    became = {
        "folded": "The post-connector was folded into the projector's last linear layer. ",
        "kept": "The post-connector is a layer of its own. ",
        "none": "",
    }
    text = (
        f"`{export.model_class}`, {export.parameters:,} parameters in {export.dtype}. "
        f"{became[export.post_connector]}Logits differ from those of the trained student by "
        f"{export.logit_error:.2g} at most; the largest is {export.logit_scale:.3g}, in float32 on one picture and "
        "question."
    )
    if export.dtype != export.trained_dtype:
        text += f" Rounding the weights from {export.trained_dtype} alone changes logits by at most "
        text += f"{export.rounding_error:.2g}."
    if export.added_rows:
        text += f" {export.added_rows} rows of zeros were added to the vocabulary."
    return text


def _value(value: Any) -> str:
    return "" if value is None else f"`{json.dumps(value)}`" if isinstance(value, list | dict) else str(value)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(
        "| " + " | ".join(printable(str(cell)).replace("|", "\\|") for cell in line) + " |" for line in lines
    )
