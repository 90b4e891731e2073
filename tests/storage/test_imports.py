"""What a bare machine can import, and what is said when an extra is missing."""

import subprocess
import sys

import pytest

from storage.errors import UserError
from storage.stores import open_store

_IMPORTS = """
import sys
HEAVY = {"zarr", "webdataset", "ray", "transformers", "obstore", "stages", "pipeline"}
loaded = lambda: print(sorted(HEAVY & {name.partition(".")[0] for name in sys.modules}))
import storage.codecs.windows, storage.codecs.answer_logits, storage.targets.sample_targets, storage.targets.manifest
import storage.samples.shard_reader, storage.samples.shard_writer, storage.stores
loaded()
import storage.targets.store, storage.integrity.verify, storage.targets.summary
loaded()
import storage.streaming.stream
loaded()
"""


def test_each_part_loads_only_what_it_needs():
    found = subprocess.run([sys.executable, "-c", _IMPORTS], capture_output=True, text=True, check=True)
    assert found.stdout.splitlines() == ["[]", "[]", "['webdataset']"]


def test_a_missing_obstore_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(UserError, match=r"compodistill\[s3\]"):
        open_store("s3://bucket/prefix").read("x")
