"""GGUF files hold the student's own weights, and llama.cpp computes of them what transformers computes.

The second runs where `CDP_LLAMA_PYTHON` names an interpreter of an environment with llama-cpp-python.
"""

import json
import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from pipeline.export import export
from stages.checkpoints.gguf_decoder import converted
from stages.checkpoints.processors import load_processor
from stages.conversations.encoder import ConversationEncoder
from stages.export.gguf_export import GgufReport, export_gguf
from stages.export.gguf_tokenizer import read_tokenizer
from stages.student.model.inputs import model_inputs
from stages.student.model.loading import load_multimodal
from stages.teacher.config import TeacherConfig
from stages.teacher.teacher import load_teacher
from storage.errors import UserError
from tests.checkpoints import draw_random_image, make_tiny_llava
from tests.stages.export.gguf_students import DECODERS, SPLITS, TEXTS, make_llava, make_tokenizer
from tests.stages.export.test_export import make_student

PYTHON = os.environ.get("CDP_LLAMA_PYTHON", "")
QUESTION = "Is it red?"

LLAMA_CPP = """
import ctypes, json, sys
import numpy as np
from llama_cpp import Llama, llama_cpp, mtmd_cpp

given = json.loads(sys.argv[1])
llama = Llama(given["decoder"], n_ctx=256, logits_all=True, type_k=0, type_v=0, n_threads=1, verbose=False)
texts, logits = [], {}
for number, text in enumerate(given["texts"]):
    llama.reset()
    tokens = llama.tokenize(text.encode(), add_bos=False, special=True)
    llama.eval(tokens)
    texts.append(tokens)
    logits[f"text {number}"] = np.array(llama.scores[: len(tokens)])
settings = mtmd_cpp.mtmd_context_params_default()
settings.use_gpu, settings.n_threads, settings.warmup = False, 1, False
vision = mtmd_cpp.mtmd_init_from_file(given["vision"].encode(), llama.model, settings)
assert vision, "the vision tower was not read"
pixels = np.fromfile(given["pixels"], np.uint8)
bitmap = mtmd_cpp.mtmd_bitmap_init(32, 32, (ctypes.c_uint8 * pixels.size)(*pixels))
prompt = given["prompt"].replace("<image>", mtmd_cpp.mtmd_default_marker().decode()).encode()
text = mtmd_cpp.mtmd_input_text(prompt, len(prompt), True, True)
chunks = mtmd_cpp.mtmd_input_chunks_init()
bitmaps = (ctypes.c_void_p * 1)(bitmap)
assert mtmd_cpp.mtmd_tokenize(vision, chunks, ctypes.byref(text), bitmaps, 1) == 0
llama.reset()
llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(llama.ctx), True)
past = llama_cpp.llama_pos(0)
assert mtmd_cpp.mtmd_helper_eval_chunks(vision, llama.ctx, chunks, 0, 0, 256, True, ctypes.byref(past)) == 0
last = llama_cpp.llama_get_logits_ith(llama.ctx, -1)
logits["picture"] = np.ctypeslib.as_array(last, (llama.n_vocab(),)).copy()
np.savez(given["out"], **logits)
print(json.dumps({"texts": texts, "past": past.value, "ends": llama.token_eos()}))
"""


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CDP_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "gguf-cache"))


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student of a wider teacher, as a stage leaves it."""
    folder = tmp_path_factory.mktemp("narrow")
    checkpoint = make_tiny_llava(folder / "checkpoint")
    (folder / "teacher").mkdir()
    load_teacher(TeacherConfig(checkpoint=str(checkpoint))).save_vision(folder / "teacher")
    return make_student(folder / "student", folder / "teacher", vocab_size=338)


def tensors_of(file: Path) -> dict[str, np.ndarray]:
    return {tensor.name: tensor.data for tensor in GGUFReader(file).tensors}


def settings_of(file: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in GGUFReader(file).fields.items()}


def test_a_students_projector_becomes_two_layers_and_every_other_weight_stays_as_it_is(
    narrow: Path, tmp_path: Path
) -> None:
    report = export(str(narrow), tmp_path / "out", file_format="gguf")
    assert isinstance(report, GgufReport)
    assert (report.student.post_connector, report.student.added_rows) == ("folded", 2)
    student = {name: tensor.double().numpy() for name, tensor in load_multimodal(narrow).state_dict().items()}
    found = tensors_of(tmp_path / "out" / report.files.vision)
    expected = dict(vision_tensors(student, depth=1))
    post, post_bias = student["model.post_connector.weight"], student["model.post_connector.bias"]
    last, last_bias = (student[f"model.multi_modal_projector.linear_2.{kind}"] for kind in ("weight", "bias"))
    expected |= {"mm.2.weight": post @ last, "mm.2.bias": post @ last_bias + post_bias}
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(found[name], tensor.astype(np.float32), err_msg=name)
    decoder = tensors_of(tmp_path / "out" / report.files.decoder)
    embedding = decoder["token_embd.weight"]
    assert np.array_equal(embedding[:338], student["model.language_model.embed_tokens.weight"])
    assert embedding.shape == (340, 24)
    assert not embedding[338:].any()
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {report.files.decoder, report.files.vision, "README.md", "export.json"}
    assert GgufReport.model_validate_json((tmp_path / "out" / "export.json").read_text()) == report


def vision_tensors(student: dict[str, np.ndarray], depth: int) -> Iterator[tuple[str, np.ndarray]]:
    """By their names in llama.cpp, written down a second time."""
    inner = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"}
    inner |= {"self_attn.out_proj": "attn_out", "layer_norm1": "ln1", "layer_norm2": "ln2"}
    inner |= {"mlp.fc1": "ffn_up", "mlp.fc2": "ffn_down"}
    tower = "model.vision_tower."
    yield "v.patch_embd.weight", student[f"{tower}embeddings.patch_embedding.weight"]
    yield "v.patch_embd.bias", student[f"{tower}embeddings.patch_embedding.bias"]
    yield "v.position_embd.weight", student[f"{tower}embeddings.position_embedding.weight"]
    for kind in ("weight", "bias"):
        yield f"mm.0.{kind}", student[f"model.multi_modal_projector.linear_1.{kind}"]
        for layer in range(depth):
            for name, short in inner.items():
                yield f"v.blk.{layer}.{short}.{kind}", student[f"{tower}encoder.layers.{layer}.{name}.{kind}"]


@pytest.mark.parametrize("decoder", [name for name in DECODERS if name != "llama, linear"])
def test_the_decoder_that_transformers_reads_back_has_the_same_weights_and_tokens(decoder: str, tmp_path: Path) -> None:
    source = make_llava(tmp_path / "llava", decoder)
    report = export_gguf(source, tmp_path / "out")
    back = converted(tmp_path / "out" / report.files.decoder)
    model, expected = AutoModelForCausalLM.from_pretrained(back), load_multimodal(source)
    tensors = expected.state_dict()
    for name, tensor in model.state_dict().items():
        own = name if name == "lm_head.weight" else name.replace("model.", "model.language_model.", 1)
        assert torch.equal(tensor, tensors[own]), name
    assert model.config.rope_parameters == expected.config.text_config.rope_parameters
    tokenizer, own = PreTrainedTokenizerFast.from_pretrained(back), make_tokenizer(DECODERS[decoder][1])
    assert [tokenizer(text)["input_ids"] for text in TEXTS[:2]] == [own(text)["input_ids"] for text in TEXTS[:2]]
    settings = settings_of(tmp_path / "out" / report.files.decoder)
    assert settings["tokenizer.ggml.pre"] == DECODERS[decoder][1]
    kinds = settings["tokenizer.ggml.token_type"]
    assert [kinds[row] for row in (0, 2, 3, len(own) - 1, len(own))] == [3, 3, 1, 4, 5]
    assert settings["tokenizer.ggml.add_bos_token"] is False


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_matrices_have_the_precision_that_was_asked_for_and_vectors_float32(dtype: Any, tmp_path: Path) -> None:
    source = make_llava(tmp_path / "llava", "qwen2", vision_feature_layer=-2)
    report = export_gguf(source, tmp_path / "out", dtype=dtype)
    kinds = {
        tensor.name: tensor.tensor_type.name
        for file in (report.files.decoder, report.files.vision)
        for tensor in GGUFReader(tmp_path / "out" / file).tensors
    }
    short = {"bfloat16": "BF16", "float16": "F16"}[dtype]
    assert {kinds[name] for name in ("blk.0.attn_q.weight", "v.blk.0.ffn_up.weight", "mm.0.weight")} == {short}
    assert {kinds[name] for name in ("v.patch_embd.bias", "v.position_embd.weight", "mm.2.bias")} == {"F32"}
    assert kinds["v.patch_embd.weight"] == ("F32" if dtype == "bfloat16" else "F16")
    assert not {name for name in kinds if name.startswith(("v.post_ln", "v.blk.2."))}
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"llama-server -m {report.files.decoder} --mmproj {report.files.vision} --jinja --logit-bias 2-inf" in card
    assert "library_name: gguf" in card
    assert ".resize((32, 32), Image.Resampling.BICUBIC)" in card


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"projector_hidden_act": "relu"}, "activation of the projector: relu"),
        ({"vision_feature_select_strategy": "default"}, "selected image features: default"),
        ({"vision_feature_layer": [-2, -1]}, "kind of vision_feature_layer: list"),
    ],
)
def test_what_llama_cpp_has_no_place_for_is_refused_and_nothing_is_left(
    changes: dict[str, Any], found: str, tmp_path: Path
) -> None:
    source = make_llava(tmp_path / "llava", "qwen2")
    config = json.loads((source / "config.json").read_text())
    if isinstance(changes.get("vision_feature_layer"), list):
        source = make_llava(tmp_path / "other", "qwen2", **changes)
    else:
        (source / "config.json").write_text(json.dumps(config | changes))
    if "default" in changes.values():
        processor = json.loads((source / "processor_config.json").read_text())
        processor |= {"vision_feature_select_strategy": "default"}
        (source / "processor_config.json").write_text(json.dumps(processor))
    with pytest.raises(UserError, match=found):
        export_gguf(source, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_a_clip_is_refused_because_llama_cpp_puts_its_class_token_in_another_place(tmp_path: Path) -> None:
    source = make_llava(tmp_path / "llava", "qwen2", "clip")
    with pytest.raises(UserError, match=r"class token .*issues/25814"):
        export_gguf(source, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_a_tokenizer_that_llama_cpp_would_read_differently_is_refused() -> None:
    for split in SPLITS:
        assert read_tokenizer(make_tokenizer(split), 400, [0]).pre == split
    backend = make_tokenizer("qwen2").backend_tokenizer
    rules = json.loads(backend.to_str())

    def refused(found: str, **changes: Any) -> None:
        changed = Tokenizer.from_str(json.dumps(rules | changes))
        with pytest.raises(UserError, match=found):
            read_tokenizer(PreTrainedTokenizerFast(tokenizer_object=changed, eos_token="<image>"), 400, [0])

    refused("ignore_merges True", model=rules["model"] | {"ignore_merges": True})
    refused("changes text first", normalizer={"type": "Lowercase"})
    refused("splits text by", pre_tokenizer={"type": "Whitespace"})
    refused("SentencePiece", model=rules["model"] | {"byte_fallback": True})
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    refused("splits text by", pre_tokenizer=json.loads(backend.to_str())["pre_tokenizer"])
    stripping = [rules["added_tokens"][0] | {"rstrip": True}, *rules["added_tokens"][1:]]
    refused("beside <.endoftext.>", added_tokens=stripping)


def test_a_post_connector_cannot_be_kept(narrow: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="leave out --no-fold"):
        export(str(narrow), tmp_path / "out", fold=False, file_format="gguf")


@pytest.mark.slow
@pytest.mark.skipif(not PYTHON, reason="CDP_LLAMA_PYTHON names no interpreter with llama-cpp-python")
@pytest.mark.parametrize("case", ["narrow", *DECODERS])
def test_llama_cpp_has_the_students_tokens_and_logits(case: str, narrow: Path, tmp_path: Path) -> None:
    source = narrow if case == "narrow" else make_llava(tmp_path / "llava", case)
    report = export_gguf(source, tmp_path / "out")
    model, processor = load_multimodal(source), load_processor(source)
    image = draw_random_image(random.Random(1)).resize((32, 32))
    (tmp_path / "pixels").write_bytes(image.tobytes())
    prompt = f"USER: <image>\n{QUESTION} ASSISTANT:"
    given = {name: str(tmp_path / "out" / getattr(report.files, name)) for name in ("decoder", "vision")}
    # llama.cpp does not compose characters as NFC does.
    texts = [*TEXTS[:2], TEXTS[2].replace("x\u0301", "x"), "<think>it's<|endoftext|>"]
    given |= {"texts": texts, "prompt": prompt, "pixels": str(tmp_path / "pixels"), "out": str(tmp_path / "out.npz")}
    done = subprocess.run(
        [PYTHON, "-c", LLAMA_CPP, json.dumps(given)], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found, logits = json.loads(done.stdout.splitlines()[-1]), np.load(tmp_path / "out.npz")
    expected_tokens = [processor.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert found["texts"] == expected_tokens
    errors = []
    with torch.inference_mode():
        for number, tokens in enumerate(expected_tokens):
            errors.append(share(logits[f"text {number}"], model(input_ids=torch.tensor([tokens])).logits[0].numpy()))
        encoder = ConversationEncoder(processor, model.config.image_token_id, 10_000)
        asked = encoder.encode_prompt(QUESTION, [image])
        seen = model(**model_inputs(model, [asked])).logits[0, -1].numpy()
    assert found["past"] == len(asked.token_ids)
    picture = share(logits["picture"], seen)
    print(f"{case}: text {max(errors):.2g}, picture {picture:.2g} of the largest logit")
    assert max(errors) < 1e-5
    # The GELU is another one there: a hyperbolic tangent, from a table of 16 bits.
    assert picture < 0.01


def share(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference, as a share of the largest logit."""
    width = expected.shape[-1]
    return float(np.abs(found[..., :width] - expected).max() / np.abs(expected).max())
