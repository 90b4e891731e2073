"""Whether a saved student sees with the eyes of the teacher whose targets it is to learn from."""

from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import safe_open

from stages.student.model.build import student_vision_prefix
from storage.errors import FingerprintMismatch


def check_vision_tower(student: Path, teacher: Path) -> None:
    """Compares the image sides, tensor by tensor, at the precision of the student's.

    Args:
        student: checkpoint of a student with a teacher's eyes.
        teacher: `teacher/` of a target store.

    Raises:
        FingerprintMismatch: they differ; names a tensor.
    """
    prefix = student_vision_prefix(student)
    with ExitStack() as opened:
        files = [opened.enter_context(safe_open(path, "pt")) for path in sorted(student.glob("*.safetensors"))]
        file_of = {name: file for file in files for name in file.keys()}  # noqa: SIM118, it is no dict
        seen = opened.enter_context(safe_open(teacher / "model.safetensors", "pt"))
        for name in seen.keys():  # noqa: SIM118
            own = name.replace("model.", prefix, 1)
            found = file_of[own].get_tensor(own) if own in file_of else None
            if found is None or not torch.equal(found, seen.get_tensor(name).to(found.dtype)):
                raise FingerprintMismatch(
                    f"{student} does not see with the eyes of the targets' teacher: it has "
                    f"{'no' if found is None else 'another'} {own}. A saved student goes on with targets of the "
                    "teacher that it was built for; one that was exported has its post-connector folded in: name "
                    "STAGE/student of its run folder instead"
                )
