"""`teacher/` of a target store: what students need of the teacher, committed and checked like a shard."""

from pathlib import Path

from storage.errors import CorruptData, UserError
from storage.stores import Store
from storage.stores.base import measure_files
from storage.targets.commits import COMMITS, Committed, publish
from storage.targets.manifest import Manifest

TEACHER = "teacher"
TEACHER_RECORD = f"{COMMITS}/{TEACHER}.json"


class TeacherRecord(Committed):
    """The folder of vision tower, projector, configs and processor."""

    @property
    def record_path(self) -> str:
        """`commits/teacher.json`."""
        return TEACHER_RECORD

    def folder_for(self, digest: str) -> str:
        """`teacher/0123456789abcdef`."""
        return f"{TEACHER}/{digest[:16]}"


def save_teacher(store: Store, manifest: Manifest, staged: Path) -> TeacherRecord:
    """Commit a folder of the teacher's files from `store.staging`, as `publish`; the staged folder is gone then."""
    record = TeacherRecord.build(manifest.format_version, files=measure_files(staged), manifest=manifest.digest)
    return publish(store, staged, record)


def teacher_record(store: Store) -> TeacherRecord:
    """The record of the teacher's files.

    Raises:
        UserError: If none is committed.
    """
    try:
        return TeacherRecord.load(store, TEACHER_RECORD)
    except FileNotFoundError:
        missing = f"{store.url}/{TEACHER_RECORD} does not exist"
        raise UserError(f"{store.url}/{TEACHER} is not committed: {missing}; run `cdp extract-teacher`") from None


def teacher_folder(store: Store, manifest: Manifest) -> Path:
    """A local folder of the teacher's files, every byte of which is what was committed.

    Raises:
        UserError: If none is committed.
        CorruptData: If a file is missing, damaged or not ours, naming it.
    """
    where, record = f"{store.url}/{TEACHER}", teacher_record(store)
    todo = "run `cdp verify --repair` on the store, then `cdp extract-teacher`"
    if record.manifest != manifest.digest:
        raise CorruptData(
            f"{where} belongs to manifest {record.manifest[:12]}, the store's is {manifest.digest[:12]}; {todo}"
        )
    try:
        folder = store.local(record.path, record.files)
        found = measure_files(folder)
    except FileNotFoundError as error:
        raise CorruptData(f"{where}: {record.path} is missing; {todo}") from error
    if wrong := sorted({name for name, _ in found.items() ^ record.files.items()}):
        raise CorruptData(f"{where}: {record.path}/{wrong[0]} is not as committed ({len(wrong)} files differ); {todo}")
    return folder
