"""Looks at what a command was given before it loads a library for it: a mistake is said before they load."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.checkpoints import which_student
from pipeline.cluster.address import check_address
from pipeline.extraction.config import ExtractConfig
from pipeline.run_file import RunFile, need, sources_of
from pipeline.sweep_file import Sweep
from pipeline.ui.console import is_main_process
from stages.checkpoints.config_files import CONFIG, num_decoder_layers, read_config
from stages.checkpoints.gguf import gguf_file, read_decoder_head
from stages.checkpoints.processor_files import TOKENIZER, check_own_template, check_processor_files
from stages.checkpoints.resolve import resolve_checkpoint
from stages.conversations.chat_templates import read_template
from stages.families.registry import family_of
from stages.student.data.vocabularies import refuse_other_vocabulary
from stages.student.run_folder import RunFolder, StageFolder
from stages.student.stage_config import DataSource
from stages.student.store_check import check_answers, check_one_teacher, check_served
from stages.student.student_kind import check_student, refuse_without_images
from stages.teacher.config import TeacherConfig, captured_layers, ranks_of
from storage.codecs.codec_settings import MapCodecConfig, default_top_k
from storage.errors import UserError
from storage.regular_files import refuse_unusable
from storage.samples.image_settings import ImageConfig
from storage.samples.index import INDEX_PATH, SampleIndex
from storage.stores import LocalStore, Store, open_store
from storage.stores.recognize import CHECKPOINT, RUN, SAMPLE_SET, TARGET_STORE, what_lies_at
from storage.streaming.source_checks import check_mixable, check_same_samples, incomplete, read_keys
from storage.targets.commits import COMMITS, committed_shards
from storage.targets.manifest import MANIFEST_PATH, MAX_LAYERS, Manifest, check_same
from storage.targets.teacher_assets import teacher_record
from storage.writable import check_writable


def check_samples(url: str) -> SampleIndex:
    """Refuses what is no finished sample set."""
    return SampleIndex.load(open_store(url))


def check_targets(url: str) -> Manifest:
    """Refuses what is no target store."""
    return Manifest.load(open_store(url))


def check_holds_targets(url: str) -> None:
    """Refuses what has not even a damaged manifest."""
    store = open_store(url)
    if not store.exists(MANIFEST_PATH):
        Manifest.load(store)


def check_holds_samples(url: str) -> None:
    """Refuses what has not even a damaged index of samples."""
    store = open_store(url)
    if not store.exists(INDEX_PATH):
        SampleIndex.load(store)


def check_extraction(
    teacher: TeacherConfig, samples: str, targets: str, config: ExtractConfig, images: ImageConfig
) -> None:
    """Refuses an extraction that cannot begin. A target store may be there already.

    Raises:
        UserError: If there is no such teacher, sample set or Ray cluster, or something else lies where targets are to
            be.
        FingerprintMismatch: If the targets there were made with other settings or from other samples.
    """
    num_ranks = ranks_of(teacher, config.gpus_per_worker)
    store = open_store(targets)
    check_new(store, TARGET_STORE)
    stored = Manifest.load(store) if store.exists(MANIFEST_PATH) else None
    index = check_samples(samples)
    check_teacher(teacher)
    if stored is not None:
        check_same(store.url, stored, _asked_for(stored, teacher, index, images, num_ranks))
    if config.ray_address is not None:
        check_address(config.ray_address)


def _asked_for(
    stored: Manifest, teacher: TeacherConfig, index: SampleIndex, images: ImageConfig, num_ranks: int
) -> Manifest:
    """What would be stored, as far as settings and samples alone decide it; all else as it is stored."""
    fingerprint = stored.fingerprint
    codec = {
        "name": teacher.logit_codec,
        "num_tail_samples": teacher.tail_samples,
        "temperatures": teacher.temperatures,
        "num_tempered_samples": teacher.tempered_samples,
        "top_k": teacher.top_k or default_top_k(stored.vocab_size, teacher.temperatures),
    }
    decided = {
        "max_length": teacher.max_length,
        "cut": teacher.cut,
        "images": images,
        "samples": index.digest,
        "layers": teacher.layers or fingerprint.layers,
        "logit_codec": fingerprint.logit_codec.model_copy(update=codec),
        "map_codec": MapCodecConfig.of_windows(
            teacher.map_codec, fingerprint.windows, causal=fingerprint.map_codec.causal
        ),
        "tensor_ranks": num_ranks,
        "map_pooling": teacher.map_pooling,
        "max_image_tokens": teacher.max_image_tokens,
    }
    asked = fingerprint.model_copy(update=decided)
    return stored.model_copy(update={"fingerprint": asked, "num_shards": len(index.shards)})


def check_pairing(samples: str, targets: str) -> Manifest:
    """Refuses samples and targets that do not belong together; gives the manifest.

    Raises:
        UserError: If they do not, or one of them is something else.
    """
    index, manifest = check_samples(samples), check_targets(targets)
    check_same_samples(open_store(samples).url, index.digest, open_store(targets).url, manifest.fingerprint)
    return manifest


def check_model(model: str, *, with_template: bool = True) -> list[str]:
    """Refuses what is neither a checkpoint, a training run nor a model of the hub; gives the notes of `which_student`.

    Of a model of the hub no weights are fetched yet. `with_template` says whether questions are put to it.
    """
    if notes := which_student(model):
        return notes
    if not (StageFolder(Path(model)).student / CONFIG).is_file():
        folder = _checkpoint(model)
        refuse_without_images(folder)
        check_processor_files(folder)
        if with_template:
            check_own_template(folder, "")
    return []


def check_teacher(settings: TeacherConfig, *, with_weights: bool = True) -> None:
    """Refuses a teacher whose files alone say that it cannot be one; of the hub no weights are fetched yet.

    Raises:
        UserError: If it is no checkpoint of a known family, has other layers than are to be captured, or lacks its
            weights, processor or chat template; if there is no such template.
    """
    folder = _checkpoint(settings.checkpoint, with_weights=with_weights)
    config = read_config(folder / CONFIG)
    num_layers = num_decoder_layers(config)
    # Otherwise the library knows how many there are, or refuses the checkpoint.
    if num_layers is not None and num_layers <= MAX_LAYERS:
        # Which of them have maps, only the library knows.
        captured_layers(settings, num_layers, settings.layers)
    if settings.chat_template is not None:
        read_template(settings.chat_template)
    # Code that comes with a checkpoint decides itself of which type it is, and what it reads.
    if settings.trust_remote_code:
        return
    family_of(config.get("model_type", ""))
    check_processor_files(folder)
    if settings.chat_template is None:
        check_own_template(folder, ", or set teacher.chat_template")


def check_training(run: RunFile, *, resume: bool = True) -> None:
    """Refuses a training whose settings, files or stores say that it cannot be done.

    The machine that starts a training on a cluster need not see what the cluster sees.

    Raises:
        UserError: If an output, a student, samples or targets are missing or something else; if the student is of a
            kind that cannot be trained so, or the targets do not serve it.
    """
    output = Path(need(run.output, "--output"))
    student = need(run.student, "--student")
    sources = {stage: sources_of(run, stage) for stage in run.train.stages}
    refuse_unusable(output)
    if not resume:
        RunFolder(output).refuse_existing(run.train.stages)
    if run.train.cluster.ray_address is not None:
        check_address(run.train.cluster.ray_address)
        return
    if is_main_process:
        check_new(LocalStore(output), RUN)
    pairs = sorted({(one.samples, one.targets) for many in sources.values() for one in many})
    manifests = {targets: check_pairing(samples, targets) for samples, targets in pairs}
    for many in sources.values():
        check_mixable([(open_store(one.targets).url, manifests[one.targets].fingerprint) for one in many])
    first = {stage: manifests[many[0].targets] for stage, many in sources.items()}
    own_vision = run.train.vision == "own"
    # A finished stage is not trained again, whatever its targets are by now.
    to_train = [stage for stage in run.train.stages if not RunFolder(output).stage(stage).is_finished]
    num_layers = _student_layers(student, first[run.train.stages[0]], own_vision=own_vision)
    logits = [one for one in map(run.train.stage, to_train) if one.kd_weight > 0 and not one.aligns_tokenizers]
    if logits:
        _check_vocabulary(student, open_store(sources[to_train[0]][0].targets))
    if not own_vision:
        check_one_teacher({stage: manifest.fingerprint.teacher_weights for stage, manifest in first.items()})
    for stage in to_train:
        url, settings = open_store(sources[stage][0].targets).url, run.train.stage(stage)
        check_served(stage, settings, run.train.matching, url, first[stage], num_layers)
        stores = [(open_store(one.targets).url, manifests[one.targets].fingerprint) for one in sources[stage]]
        check_answers(stage, settings, stores)
        _check_data(run, sources[stage], manifests)


def check_sweep(sweep: Sweep, *, resume: bool) -> list[str]:
    """Refuses a sweep none of whose students can be trained and asked; gives a warning for each of some that cannot.

    Raises:
        UserError: If the sweep's folder is something else; or what is wrong with the first, if all are wrong.
    """
    if is_main_process:
        check_new(LocalStore(sweep.output), None)
    wrong: dict[str, UserError] = {}
    for name, run in sweep.runs.items():
        try:
            check_training(run, resume=resume)
            _check_suites(sweep, need(run.student, "--student"))
        except UserError as error:
            wrong[name] = error
    if len(wrong) == len(sweep.runs):
        name, first = next(iter(wrong.items()))
        raise UserError(f"student {name}: {first}") from first
    # Each process of a group looks; one of them says it.
    wrong = wrong if is_main_process else {}
    return [f"warning: student {name} will fail, the others are trained: {error}" for name, error in wrong.items()]


def _student_layers(student: str, manifest: Manifest, *, own_vision: bool) -> int | None:
    """Layers of the decoder that is to be trained, if its files say how many; refuses what cannot be trained."""
    teacher_type = str(manifest.fingerprint.teacher_config.get("model_type", ""))
    if (file := gguf_file(Path(student))) is None:
        return num_decoder_layers(check_student(_checkpoint(student), teacher_type, own_vision=own_vision))
    if own_vision:
        raise UserError(
            f"{file} is a GGUF file, which is read as a decoder alone; --vision own takes the checkpoint folder of a "
            "whole multimodal model: name one, or leave the vision tower to the teacher (--vision teacher)"
        )
    return read_decoder_head(file).num_layers


def _check_vocabulary(student: str, targets: Store) -> None:
    """Refuses a student with another vocabulary that is to learn from logits, where both lie on this machine."""
    if isinstance(targets, LocalStore) and Path(student).is_dir() and gguf_file(Path(student)) is None:
        teacher = targets.root / teacher_record(targets).path
        # What was lost of a store is said where all of it is checked.
        if (teacher / TOKENIZER).is_file():
            refuse_other_vocabulary(teacher, Path(student))


def _check_suites(sweep: Sweep, student: str) -> None:
    """Refuses a student whose tokenizer lacks a suite's answers, where it lies on this machine."""
    wanted = {name: suite for name, suite in sweep.suites.items() if suite.compares_first_tokens}
    if wanted and (Path(student) / TOKENIZER).is_file():
        # These load a library, so only where they are needed.
        from pipeline.suite_evaluation import check_suite_words
        from stages.checkpoints.processors import load_tokenizer

        tokenizer = load_tokenizer(Path(student))
        for name, suite in wanted.items():
            check_suite_words(tokenizer, name, suite)


def _check_data(run: RunFile, sources: Sequence[DataSource], manifests: Mapping[str, Manifest]) -> None:
    """Refuses a list of samples that cannot be read, and targets that are not complete though they must be."""
    for one in sources:
        if one.subset is not None:
            read_keys(Path(one.subset))
        if run.train.data.allow_incomplete:
            continue
        store, num_shards = open_store(one.targets), manifests[one.targets].num_shards
        committed = committed_shards(store.list(COMMITS))
        if missing := [shard for shard in range(num_shards) if shard not in committed]:
            raise incomplete(store.url, num_shards, missing)


def _checkpoint(name: str, *, with_weights: bool = True) -> Path:
    """The folder of a checkpoint; weights are looked for in folders of this machine, where nothing is fetched."""
    return resolve_checkpoint(name, with_weights=with_weights and Path(name).is_dir())


def check_new(store: Store, kind: str | None) -> None:
    """Refuses a place that holds something else than `kind`, or where nothing can be written; None is a new folder.

    Raises:
        UserError: If it is one; says what lies there.
    """
    found = what_lies_at(store)
    if found in {SAMPLE_SET, TARGET_STORE, CHECKPOINT, RUN} - {kind}:
        raise UserError(
            f"{store.url} is {found}, expected {f'{kind} or ' if kind else ''}a new folder"
            + ("; are samples and targets swapped?" if {found, kind} == {SAMPLE_SET, TARGET_STORE} else "")
        )
    if isinstance(store, LocalStore):
        check_writable(store.root)
