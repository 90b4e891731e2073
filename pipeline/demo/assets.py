"""Where the files of the bundled example are."""

from pathlib import Path

_FOLDER = Path(__file__).parent

TEACHER = _FOLDER / "teacher"
"""A trained LLaVA of 1.9 million parameters; `examples/scenes/README.md` says how it was made."""
STUDENT_LM = _FOLDER / "student_lm"
"""A language model of half the teacher's width that students start from."""
STUDENTS = _FOLDER / "students.yaml"
"""The students that the demo trains, as a sweep file."""
