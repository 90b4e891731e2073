"""Teachers on one pretended device and spread over three: run as a script, as `pretended_devices` asks.

Its arguments are a file of JSON, `[checkpoint, samples, settings]` by name; it prints what it found of each as JSON.
"""

import json
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from transformers import PreTrainedModel

from stages.teacher.config import TeacherConfig
from stages.teacher.in_flight import BatchesInFlight
from stages.teacher.map_coder import MapCoder
from stages.teacher.observe import Observer, ShardObservations
from stages.teacher.teacher import Teacher, load_teacher
from storage.samples.sample_set import SampleSet
from tests.pretended_devices import KIND, PretendedDevices, register
from tests.stages.teacher.test_observe import everything_of

IN_FLIGHT = 4


def scattered(model: PreTrainedModel) -> dict[str, int]:
    """Device by part: each of the decoder's layers is on another than the one before, the rest on any."""
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    names = {id(module): name for name, module in model.named_modules()}
    own = [name for name, _ in model.model.named_parameters(recurse=False)]
    own += [name for name, child in model.model.named_children() if child is not decoder]
    parts = {f"{names[id(model.model)]}.{name}": 1 for name in own}
    for name, child in decoder.named_children():
        at = f"{names[id(decoder)]}.{name}"
        if name == "layers":
            parts |= {f"{at}.{number}": number % 3 for number in range(len(child))}
        else:
            parts[at] = 0 if child is model.get_input_embeddings() else 2
    is_tied = head.weight is model.get_input_embeddings().weight
    return parts | {names[id(head)]: 0 if is_tied else 1}


def seen_on(teacher: Teacher, parts: dict[str, int], samples: Path) -> tuple[ShardObservations, list[tuple[int, ...]]]:
    """What the teacher says of the samples, and what went from device to device meanwhile."""
    with PretendedDevices() as devices:
        dispatch_model(teacher.model, {name: torch.device(KIND, n) for name, n in parts.items()}, force_hooks=True)
        devices.crossings.clear()
        with Observer(teacher, overlap=False) as observer, SampleSet.open(samples).shard(0) as shard:
            return observer.observe(shard), devices.crossings


def seen_in_flight(teacher: Teacher, samples: Path) -> tuple[ShardObservations, int]:
    """What a teacher that is spread says with several batches in it, and how many were in it at once."""
    now, most, lock = set[int](), 0, threading.Lock()
    met = threading.Event()

    def within(run: Callable[..., Any]) -> Callable[..., Any]:
        def in_thread(*args: Any) -> Any:
            # Only the thread that enters the block sees the devices.
            with PretendedDevices():
                return run(*args)

        return in_thread

    def forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal most
        with lock:
            now.add(threading.get_ident())
            most = max(most, len(now))
        if most > 1:
            met.set()
        met.wait(10)
        try:
            return whole(*args, **kwargs)
        finally:
            now.discard(threading.get_ident())

    whole = teacher.model.model.forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BatchesInFlight, "_run", within(BatchesInFlight._run))
        patch.setattr(MapCoder, "_code", within(MapCoder._code))
        patch.setattr(teacher.model.model, "forward", forward)
        with (
            PretendedDevices(),
            Observer(teacher, batches_in_flight=IN_FLIGHT) as observer,
            SampleSet.open(samples).shard(0) as shard,
        ):
            return observer.observe(shard), most


def compare(teachers: tuple[Teacher, Teacher], samples: Path) -> dict[str, Any]:
    """Whether a teacher says the same, bit by bit, wherever its parts are."""
    one, several = teachers
    expected, _ = seen_on(one, {"": 0}, samples)
    spread, crossings = seen_on(several, scattered(several.model), samples)
    pairs = list(zip(expected.samples, spread.samples, strict=True))
    attention = [(a.answer_attention_LaN, b.answer_attention_LaN) for a, b in pairs]
    maps = zip(expected.maps, spread.maps, strict=True)
    found = {
        "samples": len(pairs),
        "skipped": [skipped.detail for skipped in spread.skipped],
        "maps": len(spread.maps),
        "logits_same": all(torch.equal(a.logits_RQ, b.logits_RQ) for a, b in pairs),
        "attention_same": all(torch.equal(a, b) for a, b in attention if a is not None and b is not None),
        "attention": sum(a is not None for a, _ in attention),
        "maps_same": all(torch.equal(a.codes_LC, b.codes_LC) and torch.equal(a.caps_L, b.caps_L) for a, b in maps),
        "devices": sorted({str(weight.device) for weight in several.model.parameters()}),
        "crossings": crossings,
    }
    # Once is enough: most of both ways is the same.
    if several.identity.settings.prefix_reuse != "off":
        in_flight, found["most_in_flight"] = seen_in_flight(several, samples)
        found["in_flight_same"] = everything_of(in_flight) == everything_of(spread)
    return found


def main() -> None:
    torch.set_num_threads(1)
    asked = json.loads(Path(sys.argv[1]).read_text())
    loaded = {}
    for name, (checkpoint, samples, settings) in asked.items():
        config = TeacherConfig.model_validate({"checkpoint": checkpoint, **settings})
        loaded[name] = (load_teacher(config), load_teacher(config)), Path(samples)
    register()
    print(json.dumps({name: compare(*each) for name, each in loaded.items()}))


if __name__ == "__main__":
    main()
