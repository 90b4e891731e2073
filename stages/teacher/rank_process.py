"""The process of a rank of a teacher beside rank 0 (`ranks.py`): loads its part, then takes part in each pass.

Started as a script with the number of rank 0's process. It reads messages from its input and writes answers to what
was its output; what libraries print goes to the errors. It ends when its input does, when rank 0 is no more, or when a
pass fails.
"""

import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any, Final

import torch

from stages.teacher.batching import PreparedSample
from stages.teacher.config import TeacherConfig
from stages.teacher.forward import run_teacher
from stages.teacher.prefix_forward import Prefixes, run_continuations, run_prefixes
from stages.teacher.rank_messages import Pass, read_fields, read_pass, write_fields
from stages.teacher.teacher import Teacher, load_rank
from stages.teacher.tensor_split import join
from storage.errors import UserError
from storage.samples.image_settings import ImageConfig

LOOK_S: Final = 1.0
"""Between two looks at whether rank 0 lives."""
DETAIL_CHARS: Final = 2000


def main() -> None:
    """Works for the rank 0 that started it; ends the process."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    messages = sys.stdin.buffer
    if (request := read_fields(messages)) is None:
        return
    threading.Thread(target=_end_without, args=(int(sys.argv[1]),), daemon=True).start()
    try:
        work(request, messages, lambda state: write_fields(answers, {"state": state}))
    except torch.OutOfMemoryError as error:
        _fail(answers, "out_of_memory", error)
    except UserError as error:
        _fail(answers, "unusable", error)
    except Exception as error:
        _fail(answers, "failed", error)
    # Whoever waits in the group for this rank must see it end; leaving the group in order would wait for them.
    os._exit(0)


def work(request: dict[str, Any], messages: IO[bytes], answer: Callable[[str], None]) -> None:
    """Loads the rank that is asked for, and takes part until there are no more messages."""
    torch.set_num_threads(request["threads"])
    settings = TeacherConfig.model_validate(request["teacher"])
    images = ImageConfig.model_validate(request["images"])
    answer("ready")
    join(Path(request["store"]), request["rank"], request["num_ranks"])
    teacher = load_rank(settings, images, request["num_ranks"])
    answer("loaded")
    prefixes: Prefixes | None = None
    while (asked := read_pass(messages)) is not None:
        if asked.name != "run_continuations":
            prefixes = None  # they take memory
        prefixes = take_part(teacher, asked, prefixes)
        answer("done")


def take_part(teacher: Teacher, asked: Pass, prefixes: Prefixes | None) -> Prefixes | None:
    """This rank's part of a pass; gives the prefixes that the next may go on from."""
    batch: Sequence[PreparedSample] = asked.batch
    if asked.name == "run_teacher":
        run_teacher(teacher, batch, asked.wanted)
    elif asked.name == "run_prefixes":
        return run_prefixes(teacher, batch, asked.wanted)
    else:
        assert prefixes is not None
        run_continuations(teacher, prefixes, asked.rows, batch)
    return prefixes


def _fail(answers: IO[bytes], state: str, error: Exception) -> None:
    detail = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    write_fields(answers, {"state": state, "detail": detail[:DETAIL_CHARS]})


def _end_without(parent: int) -> None:
    """Ends this process once rank 0's is no more, also where it waits for that one in a sum."""
    while os.getppid() == parent:
        time.sleep(LOOK_S)
    os._exit(1)


if __name__ == "__main__":
    main()
