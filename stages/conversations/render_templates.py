"""The process that renders chat templates, which are programs of strangers: run as a file, ended by its limits.

It reads one request a line, the arguments of transformers' `render_jinja_template` as JSON, and answers each with a
line: `{"text": ..., "spans": [[first, after], ...]}`, or `{"refused": why}`. `{}` once it is ready.
"""

import json
import resource
import signal
import sys

MAX_SECONDS = 10
"""Processor time of one rendering; real ones take milliseconds. Beyond it SIGPROF ends the process."""
MAX_MEMORY = 2**32
"""Address space of the process, in bytes; it starts with a tenth of it."""
MAX_TEXT = 2**26
"""Characters of a rendered conversation."""


def main() -> None:
    """Renders until its input ends."""
    from transformers.utils.chat_template_utils import render_jinja_template

    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = MAX_MEMORY if hard == resource.RLIM_INFINITY else min(MAX_MEMORY, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    print("{}", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, MAX_SECONDS)
        try:
            (text,), *spans = render_jinja_template(**request)
            if len(text) > MAX_TEXT:
                reply = {"refused": f"it renders {len(text):,} characters, at most {MAX_TEXT:,} are taken"}
            else:
                reply = {"text": text, "spans": spans[0][0] if spans[0] else []}
        except MemoryError:
            reply = {"refused": f"it needs more than {MAX_MEMORY / 2**30:.0f} GiB of memory"}
        except Exception as error:  # of a stranger's program, whatever it is
            reply = {"refused": f"{type(error).__name__}: {error}"[:2000]}
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    main()
