import ast
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest

from pipeline.lmms_eval.plugin import manifest
from tests.requirements import PROJECT, ROOT

LOADS = """
import sys
import pipeline.lmms_eval.plugin
print(sorted({"torch", "transformers", "lmms_eval"} & set(sys.modules)))
"""


def test_the_entry_point_is_the_function_that_names_the_models() -> None:
    assert PROJECT["entry-points"]["lmms_eval.models"] == {"cdp": f"{manifest.__module__}:{manifest.__name__}"}


def test_nothing_is_loaded_for_the_models_of_others() -> None:
    done = subprocess.run([sys.executable, "-c", LOADS], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "[]\n"


def test_the_classes_that_are_named_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = ModuleType("lmms_eval.models.registry_v2")
    registry.ModelManifest = SimpleNamespace  # type: ignore[attr-defined]
    for name in ("lmms_eval", "lmms_eval.models", registry.__name__):
        monkeypatch.setitem(sys.modules, name, registry)
    named = manifest()
    assert named.model_id == "cdp"
    tree = ast.parse((ROOT / "pipeline" / "lmms_eval" / "models.py").read_text())
    simple_of = {
        node.name: statement.value.value
        for node in tree.body
        if isinstance(node, ast.ClassDef)
        for statement in node.body
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Constant)
    }
    for path, is_simple in ((named.chat_class_path, False), (named.simple_class_path, True)):
        module, _, name = path.rpartition(".")
        assert module == "pipeline.lmms_eval.models"
        assert simple_of[name] is is_simple
