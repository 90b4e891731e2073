"""Results of suites that somebody hands over: two that are compared, and a folder that is gone on with."""

import json
from pathlib import Path

from hypothesis import strategies as st

from stages.evaluation.answered_items import item_line, read_items
from stages.evaluation.comparison import compare_results
from stages.evaluation.result import IDENTITY_FILE, RESULT_FILE, begun_items, make_result
from stages.evaluation.suites.suite import Item, Likelihood, Question
from tests.fuzz.attempt import Mutant, Target
from tests.fuzz.mutants import spoiled
from tests.suite_runs import suite_run

LIKELIHOODS = (Likelihood(-1.5, 3, -0.25), Likelihood(-2.5, 3, -0.25))


def make(root: Path) -> None:
    """Two runs of SugarCrepe with two items, each in a file of its own, as torchrun's processes write them."""
    for name in ("a", "b"):
        folder = root / name
        folder.mkdir(parents=True)
        for number, file in enumerate(("items.jsonl", "items-1.jsonl")):
            item = Item(f"swap_obj/{number}", ("swap_obj",), (Question("?", ()),) * 2, None, unit="one")
            line = item_line(item, ["A", LIKELIHOODS], {"accuracy": float(name == "a")}, [["0"], []])
            (folder / file).write_text(f"{line}\n")
        answered = read_items(folder).values()
        (folder / RESULT_FILE).write_text(make_result(suite_run(), answered, [], 100, 1.0, 2).to_json())
        (folder / IDENTITY_FILE).write_text(suite_run().to_json())


def read(root: Path) -> None:
    """As `cdp compare` does, and as `cdp evaluate` that goes on."""
    compare_results({str(root / name): root / name for name in ("a", "b")})
    with begun_items(root / "b", suite_run()):
        pass


def mutants(root: Path) -> st.SearchStrategy[Mutant]:
    """One of the files of the second is spoiled; a line of items ends still, as one that does not is left out."""
    return st.one_of([_spoiled(path) for path in sorted((root / "b").iterdir()) if path.suffix in {".json", ".jsonl"}])


def _spoiled(path: Path) -> st.SearchStrategy[Mutant]:
    end, document = b"\n" * (path.suffix == ".jsonl"), json.dumps(json.loads(path.read_text())).encode()

    def writes(data: bytes) -> Mutant:
        return lambda copy: (copy / "b" / path.name).write_bytes(data + end) and None

    return spoiled(f"{path.stem}.json", document).map(writes)


TARGETS = [Target("results of suites", make, read, mutants)]
