"""Real tokenizers of each kind, and a pretrained decoder from its file to an export."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    SiglipVisionConfig,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from stages.checkpoints.processors import load_tokenizer
from stages.checkpoints.resolve import resolve_student
from stages.conversations.encoder import ConversationEncoder
from stages.export.export import export_student
from stages.samples.pack import PackConfig, pack_samples
from stages.student.model.inputs import model_inputs
from stages.student.model.loading import load_multimodal
from stages.student.training.loop import train_stage
from stages.student.training.stage_run import StageRun
from stages.student.training.train_config import TrainConfig
from storage.samples.sample_set import SampleSet
from storage.streaming.stream import Source
from tests import real_models
from tests.checkpoints import CHAT_TEMPLATE, IMAGE_TOKEN, make_llava_data
from tests.real_models import RealTokenizer, loaded
from tests.stages.distilled import TinyData, extract_here

pytestmark = pytest.mark.slow

NUM_IMAGE_TOKENS = 16

ANSWERS = {
    "plain": ("It is red.", "Two of them, at the left."),
    "white space": ("  leading and trailing  ", "\n\n\tlines\n\n   and   gaps\n", "one\u00a0two\u2003three\r\nfour"),
    "code": ("def f(x):\n    return x**2  # 12  345\n", "for (;;) { i += 0x1F; }\n\n\n```python\nprint('a')\n```"),
    "CJK and others": ("你好\uff0c世界。これは例です。 한국어", "Grüße, naïve e\u0301tude — Ωμέγα שלום مرحبا"),
    "emoji": ("🙂👩\u200d👩\u200d👧 👍🏽", "🇫🇷 flag then text 🎉🎉"),
    "numbers": ("In 2026, 1234567.89  or  3,141", "v1.2.3-rc4 ¾ ² ⅷ"),
    "contractions": ("It's what they'd've said; WE'LL", "'tis  'S 'll"),
    "one character": ("a", " ", "."),
}


KINDS: dict[str, Callable[[Path, Callable[[], "Decoder"]], RealTokenizer]] = {
    "SentencePiece": lambda folder, _: real_models.sentencepiece(folder),
    "byte-level BPE out of a GGUF file": lambda _, decoder: real_models.byte_level(decoder().folder, decoder().file),
    "tiktoken's ranks": lambda folder, _: real_models.tiktoken_like(folder),
}


@dataclass(frozen=True)
class Decoder:
    """SmolLM2 as a GGUF file, and the folder that it is converted into."""

    file: Path
    folder: Path


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Decoder]:
    file = real_models.smollm2(tmp_path_factory.mktemp("gguf"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CDP_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield Decoder(file, resolve_student(file))


def processor_with(tokenizer: Any) -> LlavaProcessor:
    return LlavaProcessor(
        image_processor=SiglipImageProcessorPil(size={"height": 32, "width": 32}),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE,
    )


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> RealTokenizer:
    made: RealTokenizer = KINDS[request.param](
        tmp_path_factory.mktemp("tokenizer"), lambda: request.getfixturevalue("decoder")
    )
    return made


@pytest.fixture(scope="module")
def encoder(tokenizer: RealTokenizer) -> ConversationEncoder:
    found = loaded(tokenizer, IMAGE_TOKEN)
    return ConversationEncoder(processor_with(found), found.convert_tokens_to_ids(IMAGE_TOKEN), 4096)


def expected(
    tokenizer: RealTokenizer, encoder: ConversationEncoder, turns: list[tuple[str, str]]
) -> list[tuple[int, bool]]:
    """Each token and whether it is of an answer, from the text that the template stands for."""
    special = encoder.processor.tokenizer
    found: list[tuple[int, bool]] = [(token, False) for token in tokenizer.begins]
    first = True
    for number, (question, answer) in enumerate(turns):
        before = "USER: "
        if number == 0:
            found += [(token, False) for token, _ in tokenizer.rule(before, first)]
            found += [(encoder.image_token_id, False)] * NUM_IMAGE_TOKENS
            before, first = "\n", False
        prompt = f"{before}{question} ASSISTANT:"
        start, end, at = len(prompt.encode()), len(f"{prompt} {answer}".encode()), 0
        for token, size in tokenizer.rule(f"{prompt} {answer}", first):
            found.append((token, at + size > start and at < end))
            at += size
        assert at == end, "the rule itself lost bytes"
        found.append((special.eos_token_id, True))
    return found


@pytest.mark.parametrize("kind", ANSWERS)
def test_tokens_and_answers_of_several_turns_are_those_of_an_independent_rule(
    tokenizer: RealTokenizer, encoder: ConversationEncoder, kind: str
) -> None:
    answers = ANSWERS[kind]
    turns = [(f"What about {text.strip() or 'this'}?", text) for text in answers]
    sides = [("human", "gpt")] * len(turns)
    record = [
        {"from": who, "value": ("<image>\n" if n == 0 and who == "human" else "") + text}
        for n, (pair, names) in enumerate(zip(turns, sides, strict=True))
        for who, text in zip(names, pair, strict=True)
    ]
    found = encoder.encode(record, [Image.new("RGB", (40, 30), "red")])
    pairs = list(zip(found.token_ids.tolist(), found.answer_mask.tolist(), strict=True))
    assert pairs == expected(tokenizer, encoder, turns)


@pytest.mark.parametrize("kind", ANSWERS)
def test_a_bare_sentencepiece_model_is_read_as_its_library_reads_it(tmp_path: Path, kind: str) -> None:
    made = real_models.sentencepiece(tmp_path / "made")
    bare = tmp_path / "bare"
    bare.mkdir()
    (tmp_path / "made" / real_models.SENTENCEPIECE).rename(bare / "tokenizer.model")
    (bare / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    tokenizer = load_tokenizer(bare)
    for answer in ANSWERS[kind]:
        text = f"So: {answer}"
        found = tokenizer(text, add_special_tokens=False).input_ids
        assert found == [number for number, _ in made.rule(text, True)]


WORDS = (
    "The history of the bicycle begins in the early nineteenth century, when a German baron built a wooden machine "
    "with two wheels that was pushed along by the rider's feet. Pedals were added some decades later in France."
)


@dataclass(frozen=True)
class Trained:
    """A student of the real decoder after DPT, and what it trained on."""

    run: StageRun
    student: Path
    samples: SampleSet


@pytest.fixture(scope="module")
def trained(decoder: Decoder, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("trained")
    source, images = make_llava_data(folder / "data", 4)
    pack_samples(source, images, folder / "samples", PackConfig())
    make_teacher(folder / "teacher", decoder.folder)
    data = TinyData(folder / "teacher", decoder.folder, folder / "samples")
    store = extract_here(data, folder / "targets", top_k=8, tail_samples=8)
    stage = {"batch_size": 2, "max_steps": 2, "learning_rate": 1e-3}
    run = StageRun(
        name="dpt",
        config=TrainConfig.model_validate({"loader": {"microbatch_size": 2}, "dpt": stage}),
        decoder=str(decoder.file),
        initial=None,
        sources=(Source(SampleSet.open(data.samples), store),),
        output=folder / "run" / "dpt",
    )
    train_stage(run, Accelerator(cpu=True))
    return Trained(run, run.output / "student", SampleSet.open(data.samples))


def make_teacher(folder: Path, decoder: Path) -> None:
    """A tiny random LLaVA that reads with the tokenizer of a folder."""
    tokenizer = loaded(RealTokenizer(decoder, lambda *_: []), IMAGE_TOKEN)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    config = LlavaConfig(
        text_config=LlamaConfig(**small, num_hidden_layers=8, vocab_size=len(tokenizer)),
        vision_config=SiglipVisionConfig(
            **small, num_hidden_layers=2, image_size=32, patch_size=8, vision_use_head=False
        ),
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        image_seq_length=NUM_IMAGE_TOKENS,
        vision_feature_select_strategy="full",
        vision_feature_layer=-2,
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    processor_with(tokenizer).save_pretrained(folder)


def perplexity(model: Any, tokens: torch.Tensor) -> float:
    with torch.no_grad():
        logits_TV = model(input_ids=tokens[None]).logits[0]
    return float(F.cross_entropy(logits_TV[:-1], tokens[1:]).exp())


def test_a_pretrained_decoder_is_the_same_after_training_around_it_folding_and_export(
    decoder: Decoder, trained: Trained, tmp_path: Path
) -> None:
    tokenizer = loaded(RealTokenizer(decoder.folder, lambda *_: []), IMAGE_TOKEN)
    tokens = tokenizer(WORDS, return_tensors="pt").input_ids[0]
    alone = AutoModelForCausalLM.from_pretrained(decoder.folder, dtype=torch.float32).eval()
    before = perplexity(alone, tokens)
    del alone
    # Of random weights it would be 49,152, and a few hundred with queries and keys in another order.
    assert 1 < before < 40
    student = load_multimodal(trained.student)
    assert perplexity(student, tokens) == pytest.approx(before, rel=1e-5)
    report = export_student(trained.student, tmp_path / "export")
    assert report.post_connector == "folded"
    exported = load_multimodal(tmp_path / "export")
    assert perplexity(exported, tokens) == pytest.approx(before, rel=1e-5)
    processor = processor_with(tokenizer)
    encoder = ConversationEncoder(processor, student.config.image_token_id, 1024)
    shown = encoder.encode_pair("What is it?", "A red square.", [Image.new("RGB", (40, 30), "red")])
    with torch.no_grad():
        ours, theirs = (
            model(**model_inputs(model, [shown])).logits[..., : len(tokenizer) - 1] for model in (student, exported)
        )
    # Weights that were folded in float32, seen through 30 layers.
    assert float((ours - theirs).abs().max()) < 1e-4 * float(ours.abs().max())
