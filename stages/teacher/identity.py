"""Which teacher it is and what is stored of it; known from its folder without loading the weights."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, ProcessorMixin

from stages.attention.capturable_layers import check_maps, layers_with_maps
from stages.attention.capture import CAPTURE_VERSION
from stages.attention.prefix_support import why_no_prefix
from stages.checkpoints.configs import load_config
from stages.checkpoints.processors import image_processor_backend, load_processor, tokenizer_digest
from stages.checkpoints.quantization import check_packages
from stages.checkpoints.quantization_scheme import scheme_of
from stages.checkpoints.resolve import resolve_checkpoint
from stages.checkpoints.weights import weights_digest
from stages.conversations.answer_ends import notes_of_ends
from stages.conversations.chat_templates import ChatTemplate, chat_template, image_text, read_template
from stages.conversations.encoder import ConversationEncoder
from stages.families.family import Family
from stages.families.registry import family_of
from stages.teacher.config import TeacherConfig, captured_layers
from stages.teacher.image_rules import ImageRules
from stages.teacher.tensor_split import check_split
from storage.codecs.attention_maps import MapCodec
from storage.codecs.codec_settings import (
    LogitCodecConfig,
    MapCodecConfig,
    default_num_levels,
    default_top_k,
)
from storage.errors import UserError
from storage.samples.image_settings import DEFAULT_IMAGES, ImageConfig
from storage.targets.manifest import Fingerprint, Manifest

_LOCAL = {"_name_or_path", "name_or_path", "transformers_version", "dtype", "torch_dtype", "_attn_implementation"}


@dataclass(frozen=True)
class TeacherIdentity:
    """Everything in a teacher's folder except the weights; `identify_teacher` makes one."""

    folder: Path
    settings: TeacherConfig
    images: ImageConfig
    config: PreTrainedConfig
    processor: ProcessorMixin
    family: Family
    codec: MapCodecConfig
    layers: tuple[int, ...]
    windows: tuple[tuple[int, ...], ...]
    dtype: torch.dtype
    weights: str
    prefix_reuse: bool = False
    """Whether tokens up to a sample's last image are computed once for all samples that share them."""
    num_ranks: int = 1
    """Processes over which each of its layers is split."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes for the user about what students of this teacher will not learn, and how it is loaded."""
        scheme = scheme_of(self.config)
        quantized = () if scheme is None else (f"the teacher is quantized ({scheme}); so is what students learn of it",)
        apart = _why_no_prefix(self.config) if self.settings.prefix_reuse == "auto" else None
        whole = () if apart is None else (f"each conversation is computed as a whole, its images too: {apart}",)
        ends = notes_of_ends(
            self.processor,
            self.config.image_token_id,
            f"the chat template of {self.settings.chat_template or self.settings.checkpoint}",
            "Set teacher.chat_template to a template that writes one after each answer: a jinja file, or the one of "
            "those that come with the package that it was trained on (chatml, llama-3, llava-1.5, mistral)",
        )
        is_split = self.num_ranks > 1
        split = (f"each layer is split over {self.num_ranks} processes, which round unlike one",) if is_split else ()
        return quantized + split + whole + ends

    @property
    def map_codec(self) -> MapCodec:
        """Codes the captured layers and their windows."""
        return MapCodec.of_layers(self.codec, self.layers, self.windows)

    @property
    def image_rules(self) -> ImageRules:
        """What is asked of the image tokens of a sample."""
        settings, token = self.settings, self.config.image_token_id
        return ImageRules(self.family, self.processor, token, settings.map_pooling, settings.max_image_tokens)

    @property
    def logit_codec(self) -> LogitCodecConfig:
        """How answer rows are coded."""
        settings, vocab_size = self.settings, self.config.get_text_config().vocab_size
        top_k = settings.top_k or default_top_k(vocab_size, settings.temperatures)
        return LogitCodecConfig(
            name=settings.logit_codec,
            vocab_size=vocab_size,
            top_k=top_k,
            num_tail_samples=settings.tail_samples,
            temperatures=settings.temperatures,
            num_tempered_samples=settings.tempered_samples,
            num_levels=default_num_levels(vocab_size, top_k, settings.temperatures),
        )

    def encoder(self) -> ConversationEncoder:
        """Encodes conversations as the teacher reads them."""
        settings, image_token_id = self.settings, self.config.image_token_id
        return ConversationEncoder(
            self.processor, image_token_id, settings.max_length, cut=settings.cut, images=self.images
        )

    def manifest(self, samples_digest: str, num_shards: int) -> Manifest:
        """What a target store made by this teacher from these samples is."""
        text_config = self.config.get_text_config()
        fingerprint = self._fingerprint(samples_digest)
        return Manifest(
            format_version=fingerprint.format_version,
            fingerprint=fingerprint,
            num_layers=text_config.num_hidden_layers,
            hidden_size=text_config.hidden_size,
            num_shards=num_shards,
        )

    def _fingerprint(self, samples_digest: str) -> Fingerprint:
        return Fingerprint(
            teacher_weights=self.weights,
            teacher_config=_portable(self.config.to_dict()),
            processor=_portable(self.processor.to_dict()),
            chat_template=chat_template(self.processor),
            tokenizer=tokenizer_digest(self.processor.tokenizer),
            layers=self.layers,
            windows=self.windows,
            map_codec=self.codec,
            logit_codec=self.logit_codec,
            dtype=str(self.dtype).removeprefix("torch."),
            max_length=self.settings.max_length,
            cut=self.settings.cut,
            images=self.images,
            image_backend=image_processor_backend(self.processor),
            samples=samples_digest,
            capture_version=CAPTURE_VERSION,
            answer_attention=self.settings.answer_attention,
            prefix_reuse=self.prefix_reuse,
            tensor_ranks=self.num_ranks,
            map_pooling=self.settings.map_pooling,
            max_image_tokens=self.settings.max_image_tokens,
        )


def identify_teacher(
    settings: TeacherConfig,
    images: ImageConfig = DEFAULT_IMAGES,
    *,
    on_gpu: bool,
    with_weights: bool = True,
    num_ranks: int = 1,
) -> TeacherIdentity:
    """Reads config, processor and chat template and digests the weight files.

    `images` says how it is shown pictures, `on_gpu` decides what dtype "auto" means. Without weights, as for an
    estimate, their digest is empty. `num_ranks` are the processes over which each layer is split (`config.ranks_of`).

    Raises:
        UserError: If checkpoint or chat template cannot be read, its family or layers cannot be used, or it is
            quantized and a package that loads it is missing; if it cannot be split so.
    """
    folder = resolve_checkpoint(settings.checkpoint, with_weights=with_weights)
    config = load_config(folder, trust_remote_code=settings.trust_remote_code)
    check_split(config, folder, num_ranks, trust_remote_code=settings.trust_remote_code)
    check_packages(config, folder)
    family = family_of(config.model_type)
    num_layers = config.get_text_config().num_hidden_layers
    layers, windows = captured_layers(settings, num_layers, layers_with_maps(config.get_text_config()))
    check_maps(str(folder), config.get_text_config(), layers, "set teacher.layers to others, or choose another teacher")
    dtype = settings.dtype if settings.dtype != "auto" else ("bfloat16" if on_gpu else "float32")
    processor = load_processor(folder, trust_remote_code=settings.trust_remote_code)
    if settings.chat_template is not None:
        processor.chat_template = read_template(settings.chat_template, image_text(processor))
    # One for plain strings is stored, and saved with students, as it is used here: behind what makes strings of parts.
    if (used := ChatTemplate(processor, settings.chat_template).text) != chat_template(processor):
        processor.chat_template = used
    is_causal = family.causal_image_tokens and settings.map_pooling == 1
    identity = TeacherIdentity(
        folder=folder,
        settings=settings,
        images=images,
        config=config,
        processor=processor,
        family=family,
        codec=MapCodecConfig.of_windows(settings.map_codec, windows, causal=is_causal),
        layers=layers,
        windows=windows,
        dtype=getattr(torch, dtype),
        weights=weights_digest(folder) if with_weights else "",
        prefix_reuse=_reuses_prefix(settings, config, folder),
        num_ranks=num_ranks,
    )
    identity.image_rules.check()
    return identity


def _reuses_prefix(settings: TeacherConfig, config: PreTrainedConfig, folder: Path) -> bool:
    """Whether conversations share what they begin with.

    Raises:
        UserError: If they must, and the decoder does not allow it.
    """
    if settings.prefix_reuse == "off":
        return False
    why = _why_no_prefix(config)
    if why is not None and settings.prefix_reuse == "on":
        raise UserError(
            f"conversations cannot share what comes before them in {folder}: {why}; set teacher.prefix_reuse to auto "
            "or off"
        )
    return why is None


def _why_no_prefix(config: PreTrainedConfig) -> str | None:
    return family_of(config.model_type).why_no_prefix() or why_no_prefix(config.get_text_config())


def _portable(config: dict[str, Any]) -> dict[str, Any]:
    """A config without what depends on where and by which library version it was loaded, as JSON holds it.

    With tuples or numbers as keys it would never equal the stored one.
    """
    kept = {
        key: _portable(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in _LOCAL and isinstance(value, str | int | float | bool | list | tuple | dict | None)
    }
    portable: dict[str, Any] = json.loads(json.dumps(kept))
    return portable
