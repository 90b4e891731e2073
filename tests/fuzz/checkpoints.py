"""Hugging Face folders: configs, processors, weights and their index, and the configs of released checkpoints."""

import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.utils import logging as transformers_logging

from stages.checkpoints.configs import load_config
from stages.checkpoints.processors import hide_loading_bars, load_processor
from stages.checkpoints.resolve import resolve_checkpoint, resolve_student
from stages.checkpoints.weights import load_weights, weights_digest
from stages.convert.checkpoint import convert_checkpoint
from stages.student.model.loading import check_weights
from stages.student.student_kind import is_student
from tests.checkpoints import make_tiny_llava, make_tiny_lm
from tests.fuzz.attempt import Mutant, Target
from tests.fuzz.mutants import spoiled, spoiled_bytes
from tests.fuzz.runs import written
from tests.fuzz.safetensors_files import spoiled_safetensors
from tests.gguf_files import make_gguf
from tests.stages.checkpoints.test_weights import saved
from tests.stages.convert.test_checkpoint import GOLDEN, make_tokenizer

WEIGHTS = "model.safetensors"


@contextmanager
def quiet() -> Iterator[None]:
    """What the libraries log or warn of is not looked at."""
    hide_loading_bars()
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(level)


def make_weights(root: Path) -> None:
    """A decoder in one file, and one in several."""
    saved(root / "one")
    saved(root / "several", shard="20KB")


def read_weights(root: Path) -> None:
    """Headers, digests and tensors."""
    with quiet():
        for name in ("one", "several"):
            folder = resolve_checkpoint(root / name)
            weights_digest(folder)
            check_weights(folder, bare=True)
            load_weights(AutoModelForCausalLM, folder, dtype=torch.float32)


def spoiled_files(root: Path) -> st.SearchStrategy[Mutant]:
    """One of the JSON or weight files is spoiled."""
    files = sorted(path for path in root.rglob("*") if path.suffix in (".json", ".safetensors"))
    return st.one_of(
        [
            written(
                path.relative_to(root).as_posix(),
                spoiled(path.name, path.read_bytes())
                if path.suffix == ".json"
                else spoiled_safetensors(path.read_bytes()),
            )
            for path in files
        ]
    )


def make_configs(root: Path) -> None:
    """A LLaVA."""
    make_tiny_llava(root / "llava")


def read_configs(root: Path) -> None:
    """All but the tensors."""
    with quiet():
        folder = resolve_checkpoint(root / "llava")
        is_student(folder)
        load_config(folder)
        load_processor(folder)
        check_weights(folder, bare=False)


def make_released(root: Path) -> None:
    """A checkpoint to convert."""
    shutil.copytree(GOLDEN, root / "released", ignore=shutil.ignore_patterns("expected.*"))
    make_tokenizer(root / "released", 198)
    SiglipImageProcessorPil(size={"height": 70, "width": 70}).save_pretrained(root / "released")


def read_released(root: Path) -> None:
    """Converts it."""
    with quiet():
        convert_checkpoint(root / "released", root / "converted")


def make_gguf_file(root: Path) -> None:
    """A decoder."""
    make_tiny_lm(root / "lm", tokenizer_from=make_tiny_llava(root / "llava"), num_layers=1)
    make_gguf(root / "decoder.gguf", root / "lm")
    for name in ("lm", "llava"):
        shutil.rmtree(root / name)


def read_gguf(root: Path) -> None:
    """Converts it."""
    with quiet(), pytest.MonkeyPatch.context() as patch:
        patch.setenv("CDP_CACHE_DIR", str(root / "cache"))
        resolve_student(root / "decoder.gguf")


def spoiled_gguf(root: Path) -> st.SearchStrategy[Mutant]:
    """Its head is spoiled, or any byte."""
    data = (root / "decoder.gguf").read_bytes()
    head = data.index(b"token_embd.weight") + 1000
    return written(
        "decoder.gguf",
        st.one_of(spoiled("decoder.gguf", data), spoiled_bytes(data[:head]).map(lambda found: found + data[head:])),
    )


TARGETS = [
    Target("gguf", make_gguf_file, read_gguf, spoiled_gguf),
    Target("weights", make_weights, read_weights, spoiled_files),
    Target("configs", make_configs, read_configs, spoiled_files),
    Target("released checkpoint", make_released, read_released, spoiled_files),
]
