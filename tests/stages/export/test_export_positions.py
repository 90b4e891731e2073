"""An export of a student with 3D positions, loaded where this project is not, generates the student's tokens."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from stages.checkpoints.processors import load_processor
from stages.conversations.encoder import ConversationEncoder
from stages.export.export import export_student
from stages.student.model.build import build_student
from stages.student.model.inputs import model_inputs
from stages.teacher.config import TeacherConfig
from stages.teacher.teacher import load_teacher
from tests.checkpoints import draw_random_image, make_tiny_lm
from tests.tiny_families import make_tiny_family

ELSEWHERE = """
import json, sys
for name in ("stages", "storage", "pipeline", "examples", "tests"):
    sys.modules[name] = None
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

torch.set_num_threads(1)
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
fixed = {"min_new_tokens": 6, "max_new_tokens": 6, "do_sample": False}
found = []
for file in sys.argv[2:]:
    inputs = load_file(file)
    for use_cache in (True, False):
        output = model.generate(**inputs, **fixed, use_cache=use_cache)
        found.append(output[:, inputs["input_ids"].shape[1] :].tolist())
print(json.dumps(found))
"""


@pytest.mark.slow
def test_an_export_generates_the_students_tokens_where_only_transformers_is(tmp_path: Path) -> None:
    checkpoint = make_tiny_family(tmp_path / "checkpoint", "qwen3_vl")
    (tmp_path / "kept").mkdir()
    load_teacher(TeacherConfig(checkpoint=str(checkpoint))).save_vision(tmp_path / "kept")
    decoder = make_tiny_lm(tmp_path / "lm", tokenizer_from=checkpoint, num_layers=2, hidden=32, heads=2)
    student: Any = build_student(tmp_path / "kept", decoder, seed=0).eval()
    for connector in student.model.deepstack_connectors:
        torch.nn.init.normal_(connector.weight, std=0.2, generator=torch.Generator().manual_seed(1))
    student.save_pretrained(tmp_path / "student")
    load_processor(checkpoint).save_pretrained(tmp_path / "student")
    export_student(tmp_path / "student", tmp_path / "out")
    encoder = ConversationEncoder(load_processor(checkpoint), student.config.image_token_id, 10_000)
    rng = random.Random(0)
    images = [draw_random_image(rng).resize(size) for size in ((90, 30), (40, 100))]
    asked = ("What?", "What is the color of the square that is left of the green triangle?")
    prompts = [encoder.encode_prompt(text, [image]) for text, image in zip(asked, images, strict=True)]
    settings = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    fixed = {"min_new_tokens": 6, "max_new_tokens": 6, "do_sample": False, "pad_token_id": settings["pad_token_id"]}
    fixed |= {"eos_token_id": settings["eos_token_id"], "suppress_tokens": settings["suppress_tokens"]}
    expected, files = [], []
    for number, chosen in enumerate((prompts[:1], prompts[1:], prompts)):
        inputs = model_inputs(student, chosen, pad_left=True)
        save_file(inputs, file := tmp_path / f"{number}.safetensors")
        files.append(str(file))
        expected += [student.generate(**inputs, **fixed)[:, inputs["input_ids"].shape[1] :].tolist()] * 2
    assert expected[-1] == expected[0] + expected[2]
    command = [sys.executable, "-c", ELSEWHERE, str(tmp_path / "out"), *files]
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == expected
