"""The code of a model card runs as it stands, with nobody there to answer a question."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tokenizers import processors

from stages.checkpoints.processors import load_processor
from stages.conversations.encoder import ConversationEncoder
from stages.export.export import CARD, export_student
from stages.student.model.loading import load_multimodal
from stages.teacher.config import TeacherConfig
from stages.teacher.teacher import load_teacher
from tests.checkpoints import CHAT_TEMPLATE, make_tiny_llava
from tests.stages.export.test_export import make_student

BOS = "<|pad|>"


def with_bos(folder: Path) -> Path:
    """A checkpoint whose template writes a beginning token, and whose tokenizer adds one to any text."""
    processor: Any = load_processor(folder)
    tokenizer = processor.tokenizer
    tokenizer.bos_token, tokenizer.pad_token = BOS, tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.bos_token_id)]
    )
    processor.chat_template = "{{- bos_token -}}" + CHAT_TEMPLATE
    processor.save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("hidden", [24, 32], ids=["code of the folder", "a class of transformers"])
def test_it_answers_and_reads_the_picture_as_the_student_was_trained(hidden: int, tmp_path: Path) -> None:
    teacher = tmp_path / "teacher"
    load_teacher(TeacherConfig(checkpoint=str(make_tiny_llava(tmp_path / "checkpoint")))).save_vision(teacher)
    export = tmp_path / "named-model"
    report = export_student(with_bos(make_student(tmp_path / "student", teacher, hidden=hidden)), export)
    assert (report.custom_code is not None) == (hidden == 24)
    picture = Image.effect_noise((48, 40), 60).convert("RGB")
    picture.save(tmp_path / "picture.jpg")
    (code,) = re.findall(r"```python\n(.*?)```", (export / CARD).read_text(), re.DOTALL)
    script = tmp_path / "use.py"
    script.write_text(code + "\nimport json\nprint(json.dumps(inputs['input_ids'][0].tolist()))\n")
    # From an empty standard input a question would be seen; a closed one cannot even be asked.
    begun = 'exec "$0" "$1" </dev/null' if hidden == 24 else 'exec "$0" "$1" <&-'
    done = subprocess.run(
        ["/bin/sh", "-c", begun, sys.executable, str(script)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "custom code" not in done.stdout + done.stderr
    ids = json.loads(done.stdout.splitlines()[-1])
    student = load_multimodal(export)
    encoder = ConversationEncoder(load_processor(export), student.config.image_token_id, 512)
    with Image.open(tmp_path / "picture.jpg") as stored:
        expected = encoder.encode_prompt("What is in the picture?", [stored.convert("RGB")])
    assert ids == expected.token_ids.tolist()
    assert ids.count(load_processor(export).tokenizer.bos_token_id) == 1
