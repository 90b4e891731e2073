"""Every recipe that comes with the package, against the configs of the models it names, their widths shrunk.

Depths, image sizes, patches and the decoders' kinds are those of the published configs, written down here by hand.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from typer.testing import CliRunner

from pipeline.cli.app import app
from pipeline.demo import assets
from pipeline.recipes import FOLDER, find_config, recipe_names
from pipeline.run_file import RunFile, load_run_file
from stages.attention.layer_selection import student_layers, visual_understanding_layers
from stages.conversations.chat_templates import read_template
from stages.families.registry import family_of
from stages.student.layer_matching import match_layers
from stages.student.model.build import build_student
from stages.student.model.student import Student
from stages.student.model.trainable import prepare_for_stage
from stages.student.stage_config import STAGES
from stages.teacher.config import captured_layers
from storage.errors import UserError
from tests.storage.builders import manifest

SCENES = Path(assets.__file__).parent
SIGLIP = {"model_type": "siglip_vision_model", "num_hidden_layers": 27, "image_size": 384, "patch_size": 14}
CLIP = {"model_type": "clip_vision_model", "num_hidden_layers": 24, "image_size": 336, "patch_size": 14}
CUT = {"vision_feature_select_strategy": "default", "vision_feature_layer": -2}
QWEN_VISION = {"depth": 32, "patch_size": 14, "spatial_merge_size": 2, "window_size": 112}
MROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}

CONFIGS: dict[str, dict[str, Any]] = {
    "models/compodistill-teacher-4b": {
        "model_type": "llava",
        "text_config": {"model_type": "qwen2", "hidden_size": 2560, "num_hidden_layers": 40, "num_attention_heads": 20},
        "vision_config": SIGLIP,
        **CUT,
    },
    "Qwen/Qwen1.5-1.8B": {
        "model_type": "qwen2",
        "hidden_size": 2048,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "tie_word_embeddings": False,
    },
    "Qwen/Qwen1.5-0.5B": {
        "model_type": "qwen2",
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "tie_word_embeddings": True,
    },
    "llava-hf/llava-1.5-7b-hf": {
        "model_type": "llava",
        "text_config": {"model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32},
        "vision_config": CLIP,
        **CUT,
    },
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": {
        "model_type": "llama",
        "hidden_size": 2048,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "tie_word_embeddings": False,
    },
    "Qwen/Qwen2.5-VL-7B-Instruct": {
        "model_type": "qwen2_5_vl",
        "text_config": {
            "model_type": "qwen2_5_vl_text",
            "hidden_size": 3584,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "rope_parameters": MROPE,
        },
        "vision_config": QWEN_VISION,
    },
    "Qwen/Qwen2.5-VL-3B-Instruct": {
        "model_type": "qwen2_5_vl",
        "text_config": {
            "model_type": "qwen2_5_vl_text",
            "hidden_size": 2048,
            "num_hidden_layers": 36,
            "num_attention_heads": 16,
            "rope_parameters": MROPE,
        },
        "vision_config": QWEN_VISION,
        "tie_word_embeddings": True,
    },
}
VOCAB = 64
IMAGE = VOCAB - 1
"""The placeholder's id in the shrunk models."""


@dataclass(frozen=True)
class Published:
    """What the recipe should come to."""

    captured: range
    window: int
    matched: range
    image_tokens: int
    published: bool = False


EXPECTED = {
    "qwen1.5-4b-to-1.8b": Published(range(13, 24), 5, range(8, 15), 728, published=True),
    "qwen1.5-4b-to-0.5b": Published(range(13, 24), 5, range(8, 15), 728, published=True),
    "llava-1.5-7b-to-tinyllama": Published(range(11, 20), 3, range(7, 14), 576),
    "qwen2.5-vl-7b-to-3b": Published(range(9, 18), 3, range(12, 19), 391),
    "demo": Published(range(2, 7), 4, range(2, 4), 36),
}


def config_of(name: str) -> PreTrainedConfig:
    fields = CONFIGS.get(name)
    if fields is None:
        return AutoConfig.from_pretrained(SCENES / Path(name).name)
    return AutoConfig.for_model(**fields)


def shrunk(config: PreTrainedConfig) -> PreTrainedConfig:
    """Two heads of width 8, and two layers in the tower; depth of the decoder and image geometry as they are."""
    small = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_heads": 2, "head_dim": 8}
    small |= {"num_key_value_heads": 2, "vocab_size": VOCAB, "out_hidden_size": 16, "pad_token_id": None}
    small |= {"embed_dim": 16, "bos_token_id": None, "eos_token_id": None}
    tower = getattr(config, "vision_config", None)
    parts = [config.get_text_config(), *([tower] if tower is not None else [])]
    for part in parts:
        for name, value in small.items():
            if hasattr(part, name):
                setattr(part, name, value)
    if tower is not None:
        depth = "depth" if hasattr(tower, "depth") else "num_hidden_layers"
        setattr(tower, depth, min(2, getattr(tower, depth)))
        if hasattr(tower, "fullatt_block_indexes"):
            tower.fullatt_block_indexes = [1]
        config.image_token_id = IMAGE
    if (rope := getattr(config.get_text_config(), "rope_parameters", None)) and "mrope_section" in rope:
        rope["mrope_section"] = [1, 1, 2]
    return config


@pytest.fixture(scope="module")
def student_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[RunFile], Student]:
    """Gives a recipe's student in miniature; each is built once, whoever asks gets a copy."""

    @cache
    def built(teacher: str, decoder: str, own_vision: bool) -> Student:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return build_miniature(teacher, decoder, own_vision, tmp_path_factory.mktemp("recipe"))

    def copied(run: RunFile) -> Student:
        assert run.teacher is not None
        assert run.student is not None
        return copy.deepcopy(built(run.teacher.checkpoint, run.student, run.train.vision == "own"))

    return copied


def build_miniature(teacher_name: str, decoder_name: str, own_vision: bool, folder: Path) -> Student:
    """A student of shrunk models, built as training builds one."""
    decoder = shrunk(config_of(decoder_name))
    if own_vision:
        return AutoModelForImageTextToText.from_config(decoder)
    teacher = AutoModelForImageTextToText.from_config(shrunk(config_of(teacher_name)))
    AutoModelForCausalLM.from_config(decoder).save_pretrained(folder / "decoder")
    seen = teacher.state_dict()
    prefixes = family_of(teacher.config.model_type).vision_prefixes
    teacher.config.save_pretrained(folder / "teacher")
    save_file(
        {name: t.contiguous() for name, t in seen.items() if name.startswith(prefixes)},
        folder / "teacher" / "model.safetensors",
    )
    return build_student(folder / "teacher", folder / "decoder", seed=0)


def pixels_of(student: Student, run: RunFile) -> dict[str, torch.Tensor]:
    """One image as the student's tower takes it."""
    if run.train.vision == "own":
        # The checkpoints' own settings of patches; a photo of COCO's usual size.
        processor = Qwen2VLImageProcessorPil(patch_size=14, merge_size=2)
        return dict(processor(images=[Image.new("RGB", (640, 480))], return_tensors="pt"))
    size = student.config.vision_config.image_size
    return {"pixel_values": torch.zeros(1, 3, size, size)}


def test_there_is_a_case_for_every_recipe() -> None:
    assert recipe_names() == sorted(EXPECTED)


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_a_recipe_names_every_place_and_both_models(name: str) -> None:
    run = load_run_file(Path(name), [], {})
    assert run == load_run_file(FOLDER / f"{name}.yaml", [], {})
    assert None not in (run.samples, run.targets, run.student, run.output, run.teacher)
    assert run.train.parallel.precision == ("fp32" if name == "demo" else "bf16")
    assert run.train.loader.microbatch_size == {"demo": 16, "qwen2.5-vl-7b-to-3b": 4}.get(name, 8)


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_captured_layers_windows_and_matched_layers_are_the_published_ones(name: str) -> None:
    run, expected = load_run_file(Path(name), [], {}), EXPECTED[name]
    assert run.teacher is not None
    assert run.student is not None
    teacher = config_of(run.teacher.checkpoint).get_text_config().num_hidden_layers
    layers, windows = captured_layers(run.teacher, teacher)
    assert layers == tuple(expected.captured)
    assert len(windows) == len(expected.matched)
    depth = config_of(run.student).get_text_config().num_hidden_layers
    if name != "demo":
        assert expected.captured == visual_understanding_layers(teacher)
        assert tuple(expected.matched) == student_layers(depth, 7)
    made = manifest(num_layers=teacher, layers=layers, windows=windows)
    matching, notes = match_layers(depth, made, run.train.matching)
    assert notes == []
    assert matching.stored_masks
    assert matching.student_layers == tuple(expected.matched)
    assert {len(window) for window in matching.windows} == {expected.window}
    assert matching.windows[0][0] == expected.captured[0]
    assert matching.windows[-1][-1] == expected.captured[-1]


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_the_student_in_miniature_sees_the_published_number_of_image_tokens(
    name: str, student_of: Callable[[RunFile], Student]
) -> None:
    run = load_run_file(Path(name), [], {})
    student = student_of(run)
    with torch.no_grad():
        features = student.model.get_image_features(**pixels_of(student, run)).pooler_output
    assert sum(len(part) for part in features) == EXPECTED[name].image_tokens
    assert features[0].shape[-1] == student.config.get_text_config().hidden_size


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_each_stage_trains_the_connector_and_what_it_says_of_the_decoder(
    name: str, student_of: Callable[[RunFile], Student]
) -> None:
    run = load_run_file(Path(name), [], {})
    depth = config_of(str(run.student)).get_text_config().num_hidden_layers
    connector = "model.visual.merger." if run.train.vision == "own" else "model.post_connector."
    for stage_name in STAGES:
        stage = run.train.stage(stage_name)
        student = student_of(run)
        prepare_for_stage(student, stage, run.train.lora, 0, own_projector=run.train.projector == "trained")
        learning = {n: p for n, p in student.named_parameters() if p.requires_grad}
        rest = {n: p for n, p in learning.items() if not n.startswith(connector)}
        assert len(rest) < len(learning)
        if stage_name == "dpt":
            assert not rest
        elif stage.trains == "full":
            assert all("language_model" in n or n.startswith("lm_head") for n in rest)
        else:
            # Both halves of an update for each of the seven linear layers.
            assert len(rest) == 2 * 7 * depth
            assert all("lora_" in n and "language_model.layers" in n for n in rest)
            assert {min(p.shape) for p in rest.values()} <= {16, 128}
            assert max(max(p.shape) for p in rest.values()) == 128


@pytest.mark.parametrize("name", [name for name, expected in EXPECTED.items() if expected.published])
def test_published_pairs_have_the_published_settings(name: str) -> None:
    run = load_run_file(Path(name), [], {})
    train, teacher = run.train, run.teacher
    assert teacher is not None
    assert (teacher.max_length, teacher.map_codec) == (1536, "auto")
    assert (train.lora.rank, train.lora.alpha) == (128, 256)
    stages = [train.stage(stage) for stage in STAGES]
    assert [stage.batch_size for stage in stages] == [256, 128, 192]
    assert {(stage.learning_rate, stage.epochs, stage.warmup_ratio, stage.max_steps) for stage in stages} == {
        (2e-4, 1, 0.03, None)
    }
    weights = [(stage.lm_weight, stage.kd_weight, stage.attention_weight) for stage in stages]
    assert weights == [(1, 1, 0), (1, 1, 1), (1, 0, 0)]
    assert [stage.trains for stage in stages] == ["post_connector", "lora", "lora"]
    assert stages[0].samples != run.samples
    assert stages[0].targets != run.targets


@pytest.mark.parametrize("name", sorted(EXPECTED.keys() - {"demo"}))
def test_one_unusable_conversation_of_a_published_data_set_does_not_fail_an_extraction(name: str) -> None:
    assert 0 < load_run_file(Path(name), [], {}).extract.max_skipped_fraction <= 0.001


def test_answers_of_the_llava_recipe_end_with_a_token() -> None:
    teacher = load_run_file(Path("llava-1.5-7b-to-tinyllama"), [], {}).teacher
    assert teacher is not None
    assert teacher.chat_template is not None
    assert "+ eos_token -}}{%- endgeneration" in read_template(teacher.chat_template)


def test_a_name_that_is_neither_file_nor_recipe_is_refused_with_those_there_are(tmp_path: Path) -> None:
    assert find_config(Path("demo")) == FOLDER / "demo.yaml"
    with pytest.raises(UserError, match=r"qwen9 cannot be read: .*recipes are demo, llava-1.5-7b-to-tinyllama, "):
        find_config(Path("qwen9"))
    # A file of one's own comes first.
    own = tmp_path / "demo"
    own.write_text("train: {seed: 5}")
    assert load_run_file(own, [], {}).train.seed == 5


def test_the_help_of_config_names_the_recipes() -> None:
    shown = CliRunner().invoke(app, ["train-student", "--help"], env={"COLUMNS": "240"}).output
    assert all(name in shown for name in recipe_names())
