"""Chat templates are programs of strangers: none may end, stop or fill the process that uses it."""

import os
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from stages.conversations import template_process
from stages.conversations.chat_templates import with_image_parts
from stages.conversations.encoder import ConversationEncoder
from stages.conversations.template_process import RefusedByTemplate, render
from storage.errors import UserError
from tests.checkpoints import load_tiny_llava, make_tiny_llava
from tests.pipeline.forks import Forked
from tests.processes import wait_until_dead

MESSAGES = [{"role": "user", "content": [{"type": "text", "text": "é\ud800"}]}]
PLAIN = "{{ messages[0].content[0].text }}"
LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}BODY{% endfor %}{% endfor %}"

AT_ONCE = {
    "{{ 1 / 0 }}": "ZeroDivisionError: division by zero",
    "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}": "RecursionError: maximum recursion depth",
    "{{ none.one.two }}": "UndefinedError: ",
    "{{ raise_exception('\x1b[31m') }}": "TemplateError: \x1b",
    "{{ ''.__class__.__mro__ }}": "SecurityError: access to attribute '__class__'",
    "{{" + "(" * 10**5 + "1" + ")" * 10**5 + "}}": "RecursionError: ",
    "{{ ('x' * 10**10) | length }}": "it needs more than 4 GiB of memory",
    "{{ 'x' * 7 * 10**7 }}": "it renders 70,000,000 characters, at most 67,108,864 are taken",
}
WITHOUT_AN_END = {
    "a loop": LOOPS.replace("BODY", ""),
    "a loop that writes": LOOPS.replace("BODY", "{{ 'x' * 1000 }}"),
    "one operation": "{{ 10 ** (10 ** 10) }}",
}


@pytest.mark.parametrize(("template", "reason"), AT_ONCE.items(), ids=AT_ONCE.values())
def test_what_a_template_does_wrong_is_the_reason_and_the_next_is_rendered(template: str, reason: str) -> None:
    with pytest.raises(RefusedByTemplate, match="^" + re.escape(reason)):
        render(template, MESSAGES, {})
    assert render(PLAIN, MESSAGES, {}) == ("é\ud800", [])
    assert with_image_parts(template, {}, "<image>", "<image>") is None


@pytest.mark.slow
@pytest.mark.parametrize("template", WITHOUT_AN_END.values(), ids=WITHOUT_AN_END)
def test_a_template_without_an_end_is_ended(template: str) -> None:
    with pytest.raises(RefusedByTemplate, match=r"^it (renders for more than 10 s|needs more than 4 GiB)"):
        render(template, MESSAGES, {})
    assert render(PLAIN, MESSAGES, {})[0] == "é\ud800"


def test_a_checkpoint_with_such_a_template_is_refused(tmp_path: Path) -> None:
    processor = load_tiny_llava(make_tiny_llava(tmp_path))[1]
    of_strings = "{% for m in messages %}{{ m['role'] + m['content'] }}{% endfor %}"
    for template in ("{{ 1 / 0 }}", of_strings + "{{ 1 / 0 }}"):
        processor.chat_template = template
        with pytest.raises(UserError, match=r"^the chat template \(.*\) cannot render .*answer: ZeroDivisionError"):
            ConversationEncoder(processor, processor.image_token_id, 512)


def test_a_rendering_process_that_is_killed_from_outside_is_replaced_and_no_sample_is_lost() -> None:
    render(PLAIN, MESSAGES, {})
    process = template_process._RENDERER._process
    assert process is not None
    process.send_signal(signal.SIGKILL)
    assert render(PLAIN, MESSAGES, {})[0] == "é\ud800"


def test_threads_and_forks_get_their_own_answers() -> None:
    def rendered(number: int) -> str:
        return render(PLAIN, [{"content": [{"text": str(number)}]}], {})[0]

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(rendered, range(200))) == [str(number) for number in range(200)]
    process = template_process._RENDERER._process
    assert process is not None
    assert Forked(lambda _: rendered(7)).end().result == "7"
    assert process.poll() is None


def test_a_process_whose_current_folder_was_removed_renders(tmp_path: Path) -> None:
    def rendered() -> str:
        folder = tmp_path / "removed"
        folder.mkdir()
        os.chdir(folder)
        folder.rmdir()
        return render(PLAIN, MESSAGES, {})[0]

    assert Forked(lambda _: rendered()).end().result == "é\ud800"


def test_special_tokens_do_not_take_the_place_of_arguments() -> None:
    assert render(PLAIN + "{{ eos_token }}", MESSAGES, {"eos_token": "!", "conversations": "?"})[0] == "é\ud800!"


def test_the_process_ends_with_the_one_that_started_it() -> None:
    script = (
        "from stages.conversations import template_process as t\n"
        f"t.render({PLAIN!r}, {MESSAGES!r}, {{}})\n"
        "print(t._RENDERER._process.pid, flush=True)\n"
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL
    assert wait_until_dead(int(done.stdout))
