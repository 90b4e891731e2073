"""Exports a student to two GGUF files that llama.cpp serves without code of this project."""

import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin

from stages.checkpoints.new_folder import check_new, new_folder
from stages.checkpoints.processors import load_processor
from stages.evaluation.result import SuiteResult
from stages.export.card_use import GgufFiles
from stages.export.export import CARD, REPORT, Dtype, export_student
from stages.export.gguf_files import check_student, write_decoder, write_vision
from stages.export.gguf_tokenizer import read_tokenizer
from stages.export.model_card import ExportReport, ModelNames, model_card, read_history
from stages.student.model.loading import load_multimodal
from storage.errors import UserError
from storage.progress import SILENT, Progress
from storage.strict_model import StrictModel

_SHORT = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


class GgufReport(StrictModel):
    """What was written; `export.json` beside the GGUF files."""

    student: ExportReport
    """Of the folded student that the files hold."""
    files: GgufFiles
    bytes: int
    """Of both files."""
    seconds: float
    """Time taken."""


def export_gguf(
    source: Path,
    output: Path,
    *,
    dtype: Dtype | None = None,
    names: ModelNames = ModelNames(),  # noqa: B008 a frozen value
    evaluations: Sequence[SuiteResult] = (),
    progress: Progress = SILENT,
) -> GgufReport:
    """Writes `output`: a decoder, a vision tower with its projector (`mmproj`), a model card and a report.

    The student is exported as by `export_student` first, the post-connector folded, and its logits are compared; the
    files are made of that. It lies beside them until they are written, and takes as much room.

    Args:
        source: As of `export_student`.
        output: As of `export_student`.
        dtype: Of the matrices, as of `export_student`; vectors are float32.
        names: As of `export_student`.
        evaluations: As of `export_student`.
        progress: Counts three steps of the student and one of the files.

    Raises:
        UserError: As `export_student`; if the `gguf` package is missing, or llama.cpp would serve another model.
    """
    started = time.perf_counter()
    check_new(output)
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"GGUF files are written with the gguf package, which is missing here ({error}): "
            "pip install 'compodistill[gguf]'"
        ) from error
    with new_folder(output) as staging:
        folded = staging / "folded"
        student = export_student(source, folded, dtype=dtype, progress=progress)
        task = progress.task(f"write {output.name}", total=1, unit="steps")
        files = _write(load_multimodal(folded), load_processor(folded), student, staging, output.name)
        shutil.rmtree(folded)
        report = GgufReport(
            student=student,
            files=files,
            bytes=sum((staging / name).stat().st_size for name in (files.decoder, files.vision)),
            seconds=round(time.perf_counter() - started, 3),
        )
        (staging / REPORT).write_text(report.to_json())
        card = model_card(output.name, student, read_history(source), names, evaluations, files)
        (staging / CARD).write_text(card, encoding="utf-8")
        task.update(done=1, note="")
    return report


def _write(
    model: PreTrainedModel, processor: ProcessorMixin, student: ExportReport, folder: Path, name: str
) -> GgufFiles:
    check_student(model)
    num_rows = model.get_input_embeddings().weight.shape[0]
    tokenizer = read_tokenizer(processor.tokenizer, num_rows, student.end_token_ids)
    size = model.config.vision_config.image_size
    _check_pictures(processor.image_processor, size)
    decoder = f"{name}-{_SHORT[student.dtype]}.gguf"
    vision = f"mmproj-{decoder}"
    write_decoder(folder / decoder, name, model, tokenizer, processor.chat_template)
    write_vision(folder / vision, name, model, processor.image_processor)
    return GgufFiles(
        decoder=decoder,
        vision=vision,
        pre_tokenizer=tokenizer.pre,
        image_size=size,
        is_cropped=bool(getattr(processor.image_processor, "do_center_crop", False)),
        resampling=Image.Resampling(int(processor.image_processor.resample)).name,
        never_generated=student.never_generated,
    )


def _check_pictures(image_processor: object, size: int) -> None:
    """Refuses a processor that makes something else of a picture than `size` times `size` pixels from 0 to 1, scaled.

    Raises:
        UserError: If it does.
    """
    found = {name: getattr(image_processor, name, None) for name in ("do_rescale", "rescale_factor")}
    if not found["do_rescale"] or abs(float(found["rescale_factor"] or 0) * 255 - 1) > 1e-6:
        raise UserError(f"pictures are read with {found}, llama.cpp divides by 255; leave out --format gguf")
    sizes = [getattr(image_processor, name, None) or {} for name in ("crop_size", "size")]
    heights = [dict(sides).get("height") or dict(sides).get("shortest_edge") for sides in sizes]
    if next((height for height in heights if height), size) != size:
        raise UserError(
            f"pictures become {heights} pixels high where the vision tower takes {size}; check the processor"
        )
