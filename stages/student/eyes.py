"""Whether a saved student sees with the eyes of the teacher whose targets it is to learn from."""

from pathlib import Path

import torch
from safetensors import safe_open

from stages.student.build import eyes_prefix
from storage.errors import FingerprintMismatch


def check_eyes(student: Path, teacher: Path) -> None:
    """Compares the image sides, tensor by tensor, at the precision of the student's.

    Args:
        student: checkpoint of a student with a teacher's eyes.
        teacher: `teacher/` of a target store.

    Raises:
        FingerprintMismatch: they differ; names a tensor.
    """
    files = {name: path for path in sorted(student.glob("*.safetensors")) for name in _names(path)}
    prefix = eyes_prefix(student)
    with safe_open(teacher / "model.safetensors", "pt") as seen:
        for name in seen.keys():  # noqa: SIM118, it is no dict
            own = name.replace("model.", prefix, 1)
            if own not in files or not _same(seen.get_tensor(name), files[own], own):
                raise FingerprintMismatch(
                    f"{student} does not see with the eyes of the targets' teacher: it has "
                    f"{'no' if own not in files else 'another'} {own}. A saved student goes on with targets of the "
                    "teacher that it was built for; one that was exported has its post-connector folded in: name "
                    "STAGE/student of its run folder instead"
                )


def _names(file: Path) -> list[str]:
    with safe_open(file, "pt") as tensors:
        return list(tensors.keys())


def _same(expected: torch.Tensor, file: Path, name: str) -> bool:
    with safe_open(file, "pt") as tensors:
        found = tensors.get_tensor(name)
    return torch.equal(found, expected.to(found.dtype))
