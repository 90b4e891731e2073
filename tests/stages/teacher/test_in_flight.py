"""Several batches in a teacher at once: the bytes of one, and a batch that fails is judged alone."""

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import stages.teacher.device_turns
from pipeline.extraction.config import ExtractConfig
from pipeline.extraction.extract import in_flight_notes
from stages.teacher.batching import BatchSize, PreparedSample, SamplePreparer
from stages.teacher.config import PrefixReuse, TeacherConfig
from stages.teacher.device_turns import DeviceTurns
from stages.teacher.identity import identify_teacher
from stages.teacher.in_flight import PeakMemory, kept_between_batches, num_in_flight, why_one
from stages.teacher.isolate import run_isolated
from stages.teacher.observe import Observer
from stages.teacher.teacher import Teacher, load_teacher
from stages.teacher.timings import Timings, idle_shares
from storage.errors import UserError
from storage.samples.sample_set import SampleSet
from storage.samples.shard_reader import SampleShard
from tests.processes import PATIENCE_S
from tests.stages.distilled import TinyData, make_tiny_data
from tests.stages.extracted_families import LAYERS, make_samples
from tests.stages.teacher.forward_passes import before_each_pass
from tests.stages.teacher.test_observe import everything_of
from tests.tiny_families import RECIPES, make_tiny_family

NUM_PLACES = 3
IN_FLIGHT = NUM_PLACES + 1
WAYS: tuple[PrefixReuse, ...] = ("off", "on")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TinyData:
    torch.set_num_threads(1)
    return make_tiny_data(tmp_path_factory.mktemp("flight"), num_samples=16)


@pytest.fixture(scope="module", params=WAYS)
def teacher(data: TinyData, request: pytest.FixtureRequest) -> Teacher:
    settings = {"checkpoint": str(data.teacher), "prefix_reuse": request.param, "answer_attention": True}
    return load_teacher(TeacherConfig.model_validate({**settings, "batch_size": 2, "top_k": 5}))


@pytest.fixture(scope="module")
def usual(teacher: Teacher, data: TinyData) -> list[object]:
    """With one batch in flight."""
    with Observer(teacher) as observer, opened(data) as shard:
        assert observer.schedule.in_flight.num_batches == 1
        return everything_of(observer.observe(shard))


@pytest.fixture(autouse=True)
def devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers take turns as if they were on three devices in a row."""

    monkeypatch.setattr(
        stages.teacher.device_turns, "execution_device", lambda layer: torch.device("cpu", place_of(layer))
    )


def place_of(layer: nn.Module) -> int:
    """Number of the pretended device of a decoder's layer."""
    numbers = (getattr(part, "layer_idx", None) for part in layer.modules())
    return next((number for number in numbers if number is not None), 0) % NUM_PLACES


def opened(data: TinyData, shard: int = 0) -> SampleShard:
    return SampleSet.open(data.samples).shard(shard)


def is_beside() -> bool:
    """Whether the calling thread is one of those whose batches have neighbours."""
    return threading.current_thread().name.startswith("batch")


class Company:
    """Notes how many forward passes are in the teacher; the first few wait until there is another."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, meet: Callable[[Sequence[PreparedSample]], None]) -> None:
        self.most, self.now, self._meet = 0, 0, meet
        self._changed = threading.Condition()
        before_each_pass(monkeypatch.setattr, self.come, meet_prefixes=self.come)

    def come(self, batch: Sequence[PreparedSample]) -> None:
        if is_beside():
            with self._changed:
                self.now += 1
                self.most = max(self.most, self.now)
                self._changed.notify_all()
                self._changed.wait_for(lambda: self.most > 1, timeout=PATIENCE_S)
                self.now -= 1
        self._meet(batch)


def nothing(_: Sequence[PreparedSample]) -> None:
    """What a sample does that is as it should be."""


def test_several_batches_in_flight_give_the_bytes_of_one(
    teacher: Teacher, data: TinyData, usual: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    company = Company(monkeypatch, nothing)
    with Observer(teacher, batches_in_flight=IN_FLIGHT) as observer, opened(data) as shard:
        progress: list[int] = []
        assert everything_of(observer.observe(shard, progress.append)) == usual
        assert sum(progress) == len(shard)
        assert observer.timings.seconds()["forward"] > 0
        assert idle_shares(observer.timings.seconds()) == {}, "a CPU has no clock of its own"
    assert company.most > 1


def test_two_shards_in_flight_give_the_bytes_of_each_though_every_batch_fails_beside_others(
    teacher: Teacher, data: TinyData, usual: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    def meet(_: Sequence[PreparedSample]) -> None:
        if is_beside():
            raise RuntimeError("another batch is here")

    with Observer(teacher) as observer, opened(data, 1) as shard:
        other = everything_of(observer.observe(shard))
    Company(monkeypatch, meet)
    with Observer(teacher, batches_in_flight=IN_FLIGHT) as observer, ThreadPoolExecutor(2) as threads:
        for _ in range(3):
            with opened(data, 0) as first, opened(data, 1) as second:
                found = threads.map(lambda shard: everything_of(observer.observe(shard)), (first, second))
                assert list(found) == [usual, other]
        assert observer.schedule.in_flight.num_batches == IN_FLIGHT, "this is no matter of memory"


def test_of_a_batch_with_a_bad_sample_only_this_is_in_the_ledger_and_its_neighbours_are_not(
    teacher: Teacher, data: TinyData, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(data) as shard:
        keys = [shard.read(row).key for row in range(len(shard))]
    alone = []

    def meet(batch: Sequence[PreparedSample]) -> None:
        if any(sample.key == keys[1] for sample in batch):
            alone.append(not is_beside())
            raise ValueError("no such picture")

    Company(monkeypatch, meet)
    with Observer(teacher, batches_in_flight=IN_FLIGHT) as observer, opened(data) as shard:
        with pytest.raises(ValueError, match="no such picture"):
            observer.observe(shard)
        assert alone == [False, True]
        seen = run_isolated(teacher, shard, controls=[(shard, len(shard) - 1)], crashing_rows=(), at=lambda _: None)
    assert [(one.key, one.reason) for one in seen.skipped] == [(keys[1], "teacher_error")]
    assert [sample.key for sample in seen.samples] == [key for key in keys if key != keys[1]]


class LittleMemory:
    """Room for `most` samples alone and `most_beside` beside others, and for none of the key `huge`."""

    def __init__(self, most: int, most_beside: int, huge: str = "") -> None:
        self.most, self.most_beside, self.huge = most, most_beside, huge

    def __call__(self, batch: Sequence[PreparedSample]) -> None:
        room = self.most_beside if is_beside() else self.most
        if len(batch) > room or any(sample.key == self.huge for sample in batch):
            raise torch.OutOfMemoryError("CUDA out of memory")


def test_what_does_not_fit_beside_others_and_does_alone_is_not_halved_but_fewer_are_in_flight(
    teacher: Teacher, data: TinyData, usual: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    Company(monkeypatch, LittleMemory(most=8, most_beside=0))
    with Observer(teacher, batches_in_flight=2) as observer, opened(data) as shard:
        observer.batch_size = BatchSize(None, on_gpu=True)
        observer.batch_size.value = 4
        assert everything_of(observer.observe(shard)) == usual
        assert observer.schedule.in_flight.num_batches == 1
        assert observer.batch_size.value == 4
        assert everything_of(observer.observe(shard)) == usual


def test_neighbours_that_do_not_fit_together_cost_one_place_in_flight_and_not_one_each(
    teacher: Teacher, data: TinyData, usual: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    refused: list[bool] = []

    def meet(_: Sequence[PreparedSample]) -> None:
        if is_beside() and len(refused) < 2:
            refused.append(True)
            raise torch.OutOfMemoryError("CUDA out of memory")

    Company(monkeypatch, meet)
    with Observer(teacher, batches_in_flight=IN_FLIGHT) as observer, opened(data) as shard:
        assert everything_of(observer.observe(shard)) == usual
        assert (len(refused), observer.schedule.in_flight.num_batches) == (2, IN_FLIGHT - 1)


def test_what_does_not_fit_alone_is_halved_or_refused_if_its_size_was_set_and_as_many_are_in_flight(
    teacher: Teacher, data: TinyData, usual: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    Company(monkeypatch, LittleMemory(most=1, most_beside=1))
    with Observer(teacher, batches_in_flight=IN_FLIGHT) as observer, opened(data) as shard:
        with pytest.raises(UserError, match="a batch of 2 samples does not fit"):
            observer.observe(shard)
        observer.batch_size = BatchSize(None, on_gpu=True)
        observer.batch_size.value = 4
        assert everything_of(observer.observe(shard)) == usual
        assert (observer.batch_size.value, observer.schedule.in_flight.num_batches) == (1, IN_FLIGHT)


def test_a_sample_that_alone_does_not_fit_is_in_the_ledger_and_as_many_batches_stay_in_flight(
    teacher: Teacher, data: TinyData, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(data) as shard:
        huge = shard.read(2).key
    Company(monkeypatch, LittleMemory(most=8, most_beside=8, huge=huge))
    with Observer(teacher, batches_in_flight=IN_FLIGHT) as observer, opened(data) as shard:
        observer.batch_size = BatchSize(None, on_gpu=True)
        observer.batch_size.value = 2
        seen = observer.observe(shard)
        assert [(one.key, one.reason) for one in seen.skipped] == [(huge, "out_of_memory")]
        assert len(seen.samples) == len(shard) - 1
        assert observer.schedule.in_flight.num_batches == IN_FLIGHT


def test_batches_are_halved_until_gpus_have_room_for_all_in_flight_and_then_fewer_are(
    teacher: Teacher, data: TinyData, usual: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    for room, found in ((IN_FLIGHT, (1, IN_FLIGHT)), (2, (1, 2))):
        monkeypatch.setattr(
            PeakMemory, "has_room_for", lambda _, num, room=room: num * observer.batch_size.value <= room
        )
        with Observer(teacher, batches_in_flight=IN_FLIGHT) as observer, opened(data) as shard:
            observer.batch_size = BatchSize(None, on_gpu=True)
            observer.batch_size.value = 4
            observer.schedule._has_room = False
            for _ in range(3):
                assert everything_of(observer.observe(shard)) == usual
            assert (observer.batch_size.value, observer.schedule.in_flight.num_batches) == found


def test_a_shard_that_is_interrupted_leaves_no_batch_and_no_thread_behind(
    teacher: Teacher, data: TinyData, usual: list[object]
) -> None:
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    with Observer(teacher, batches_in_flight=IN_FLIGHT) as observer, opened(data) as shard:
        with pytest.raises(KeyboardInterrupt):
            observer.observe(shard, interrupt)
        with observer.schedule.in_flight.alone():
            pass
        assert everything_of(observer.observe(shard)) == usual
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("batch")]
    assert not teacher.model.model._forward_pre_hooks


def test_one_batch_is_on_a_device_at_a_time_and_others_are_on_the_next(
    teacher: Teacher, data: TinyData, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, most, lock = Counter[int](), Counter[int](), threading.Lock()
    met, waited = threading.Event(), threading.local()

    def come(layer: nn.Module, _: object) -> None:
        at = place_of(layer)
        with lock:
            here[at] += 1
            most[at] = max(most[at], here[at])
            if here.total() > 1:
                met.set()
        # In the middle of the first batch of each thread, until there is another batch elsewhere.
        if at == 1 and not hasattr(waited, "once"):
            waited.once = met.wait(PATIENCE_S)

    def go(layer: nn.Module, *_: object) -> None:
        with lock:
            here[place_of(layer)] -= 1

    layers = teacher.model.get_decoder().layers
    with Observer(teacher, batches_in_flight=IN_FLIGHT) as observer, opened(data) as shard:
        hooks = [layer.register_forward_pre_hook(come) for layer in layers]
        hooks += [layer.register_forward_hook(go) for layer in layers]
        observer.observe(shard)
    for hook in hooks:
        hook.remove()
    assert met.is_set(), "two batches were in the teacher, each on a device of its own"
    assert most == dict.fromkeys(range(NUM_PLACES), 1)


class Event:
    """Of a GPU's clock, in milliseconds."""

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing
        self.time = 0.0

    def record(self, stream: SimpleNamespace) -> None:
        self.time = stream.time

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: "Event") -> float:
        return end.time - self.time


class Stream(SimpleNamespace):
    """Of one GPU: when it is through with what it was given."""

    time = 0.0

    def wait_event(self, event: Event) -> None:
        self.time = max(self.time, event.time)


class Layer(nn.Module):
    """Takes a GPU some time."""

    def __init__(self, gpu: int, milliseconds: float, streams: dict[tuple[str, int], Stream]) -> None:
        super().__init__()
        self.gpu, self.milliseconds, self.streams = gpu, milliseconds, streams

    def forward(self, batch: str) -> str:
        self.streams[batch, self.gpu].time += self.milliseconds
        return batch


def test_a_gpu_is_idle_while_it_waits_for_the_one_before_and_busy_while_it_computes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    streams = {(batch, gpu): Stream() for batch in "ab" for gpu in (0, 1)}
    layers = nn.Sequential(Layer(0, 1, streams), Layer(0, 2, streams), Layer(1, 5, streams))
    layers.layers = list(layers)
    model = SimpleNamespace(model=layers, get_decoder=lambda: layers)
    running = ""
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda gpu: streams[running, gpu.index])
    monkeypatch.setattr(stages.teacher.device_turns, "execution_device", lambda one: torch.device("cuda", one.gpu))
    timings = Timings()
    turns = DeviceTurns(SimpleNamespace(model=model, device=torch.device("cuda", 0)), timings)  # type: ignore[arg-type]
    for running in "ab":
        with turns.forward_pass():
            layers(running)
    # a: 0 to 3 on the first, 3 to 8 on the second; b: 3 to 6, and 8 to 13.
    assert [streams[at].time for at in (("a", 0), ("a", 1), ("b", 0), ("b", 1))] == [3, 8, 6, 13]
    busy = timings.seconds()
    assert busy == pytest.approx({"busy cuda:0": 0.006, "busy cuda:1": 0.010})
    shares = idle_shares({**busy, "forward": 0.012, "waited": 0.001, "coding": 9.0})
    assert shares == pytest.approx({"cuda:0": 7 / 13, "cuda:1": 3 / 13})
    assert idle_shares(busy) == {}
    with pytest.raises(KeyError), turns.forward_pass():
        layers("c")
    assert not any(turn.lock.locked() for turn in turns._turns.values()), "one that fails gives its turn back"


def test_room_is_what_a_gpu_has_left_for_as_many_batches_as_may_be_in_flight(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = torch.device("cuda", 0), torch.device("cuda", 1)
    allocated, peak = {first: 10, second: 10}, {first: 15, second: 30}
    monkeypatch.setattr(torch.cuda, "memory_allocated", allocated.__getitem__)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", peak.__getitem__)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 30)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (40, 100))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: None)
    memory = PeakMemory((first, second))
    # Of 40 that are free and 20 that are reserved and not used, a batch takes 5 and 20.
    assert [memory.has_room_for(number) for number in (1, 3, 4)] == [True, True, False]
    assert PeakMemory(()).has_room_for(9)


@pytest.mark.parametrize(
    ("rope", "why"),
    [
        ({"rope_type": "default", "rope_theta": 1e4}, None),
        ({"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}, "dynamic"),
        ({"full_attention": {"rope_type": "longrope", "rope_theta": 1e4}}, "longrope"),
    ],
)
def test_a_model_that_keeps_something_of_a_batch_has_one_in_flight(
    data: TinyData, rope: dict[str, object], why: str | None
) -> None:
    teacher = identify_teacher(TeacherConfig(checkpoint=str(data.teacher)), on_gpu=False)
    config = teacher.config
    assert kept_between_batches(config) is None
    config.text_config.rope_parameters = rope
    assert (why is None) == (kept_between_batches(config) is None)
    assert (why or "") in (kept_between_batches(config) or "")
    assert [num_in_flight(teacher, *asked) for asked in ((1,), (4,), (1, 3), (4, 1))] == (
        [1, 5, 3, 1] if why is None else [1, 1, 1, 1]
    )
    config.text_config.is_causal = False
    assert num_in_flight(teacher, 4) == 1


def test_a_teacher_that_is_split_over_processes_has_one_batch_in_flight(data: TinyData) -> None:
    settings = TeacherConfig(checkpoint=str(data.teacher), parallel="tensor")
    teacher = identify_teacher(settings, on_gpu=False, num_ranks=2)
    assert [num_in_flight(teacher, *asked) for asked in ((1,), (2,), (1, 3))] == [1, 1, 1]
    assert "one forward pass after the other" in (why_one(teacher) or "")
    assert in_flight_notes(ExtractConfig(gpus_per_worker=2), teacher) == ()
    (note,) = in_flight_notes(ExtractConfig(gpus_per_worker=2, batches_in_flight=3), teacher)
    assert note.startswith("one batch at a time is in the teacher: the processes that share its layers")


def kept(model: nn.Module) -> dict[str, object]:
    """What a model holds besides its weights, as far as it can be compared."""
    found: dict[str, object] = {name: buffer.tolist() for name, buffer in model.named_buffers()}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if not key.startswith("_") and key != "rope_deltas":
                held = value.tolist() if isinstance(value, torch.Tensor) else value
                found[f"{name}.{key}"] = held if isinstance(held, list | tuple | int | float | str) else None
    return found


@pytest.mark.slow
def test_no_family_keeps_more_of_a_batch_than_positions_nobody_reads_and_several_in_flight_give_the_bytes_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").mkdir()
    samples = make_samples(tmp_path / "data")
    company = Company(monkeypatch, nothing)
    for family in RECIPES:
        checkpoint = str(make_tiny_family(tmp_path / family, family))
        settings = {"checkpoint": checkpoint, "layers": LAYERS, "num_matched": 1, "batch_size": 1}
        teacher = load_teacher(TeacherConfig.model_validate({**settings, "answer_attention": True}))
        with SampleSet.open(samples).shard(0) as shard:
            with Observer(teacher, overlap=False) as observer:
                expected = everything_of(observer.observe(shard))
                held = kept(teacher.model)
                prepare = SamplePreparer(teacher.encoder, shard, observer.timings)
                for row in range(len(shard)):
                    sample = prepare(row)
                    assert isinstance(sample, PreparedSample)
                    observer.try_out(sample)
                    assert kept(teacher.model) == held, family
            company.most = 0
            with Observer(teacher, batches_in_flight=IN_FLIGHT) as observer:
                assert everything_of(observer.observe(shard)) == expected, family
            assert company.most > 1
