"""Evaluating checkpoints: finding the model, scoring it, comparing its attention with cached targets."""

from itertools import islice
from pathlib import Path

import torch
from rich.progress import Progress
from torch.utils.data import DataLoader
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin

from pipeline.progress import add_bar
from pipeline.training import STAGES, last_student
from stages.attention import enable_capture
from stages.checkpoints import resolve_checkpoint
from stages.evaluation.evaluate import evaluate_pairs
from stages.evaluation.pairs import load_pairs
from stages.evaluation.report import EvaluationReport
from stages.evaluation.scoring import EvaluationConfig
from stages.evaluation.similarity import AttentionSimilarity, attention_similarity
from stages.student.batches import Collator
from stages.student.build import is_student, load_processor, load_student
from stages.student.matching import match_layers
from stages.student.modeling_compodistill import register
from storage.errors import UserError
from storage.stores import open_store
from storage.stream import StreamConfig, target_stream
from storage.targets import TargetStore

BATCH_SIZE = 16


def find_checkpoint(model: str) -> Path:
    """The checkpoint folder: of a training run the last stage's student, else the folder or hub id itself."""
    folder = Path(model)
    if any((folder / stage).is_dir() for stage in STAGES):
        return last_student(folder)
    return folder / "student" if (folder / "student" / "config.json").is_file() else resolve_checkpoint(model)


def load_model(model: str) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A teacher or a student with its processor, on the GPU when there is one."""
    register()
    folder = find_checkpoint(model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    loaded: PreTrainedModel = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype).to(device).eval()
    return loaded, AutoProcessor.from_pretrained(folder)


def evaluate_checkpoint(
    model: str,
    pairs: Path,
    images: Path | None,
    config: EvaluationConfig,
    limit: int | None,
    progress: Progress,
) -> EvaluationReport:
    """Scores a checkpoint on a folder of pairs in SugarCrepe's layout."""
    suite = load_pairs(pairs, images, limit=limit)
    loaded, processor = load_model(model)
    bar = add_bar(progress, f"evaluate {Path(model).name}", sum(map(len, suite.values())), unit="pairs")
    return evaluate_pairs(loaded, processor, suite, config, lambda amount: progress.advance(bar, amount))


def compare_with_targets(model: str, samples: str, targets: str, limit: int, progress: Progress) -> AttentionSimilarity:
    """Compares a student's attention with the cached maps of the first `limit` samples of a store."""
    folder = find_checkpoint(model)
    if not is_student(folder):
        raise UserError(f"{folder} is no student of this project; its maps cannot be matched with the teacher's")
    student = load_student(folder)
    enable_capture(student)
    store = TargetStore.open(targets)
    matching, _ = match_layers(student.config.text_config.num_hidden_layers, store.manifest.fingerprint)
    collator = Collator(load_processor(folder), student.config.image_token_id, student.config.text_config.vocab_size)
    config = StreamConfig(seed=0, shuffle_shards=0, batch_size=min(BATCH_SIZE, limit))
    stream = target_stream(open_store(samples), store, config, rank=0, world_size=1, epoch=0)
    batches = islice(DataLoader(stream, batch_size=None, collate_fn=collator), -(-limit // config.batch_size))
    bar = add_bar(progress, f"compare {Path(model).name}", limit)
    return attention_similarity(student, batches, matching, lambda amount: progress.advance(bar, amount))
