"""Test modules whose code is run lazily."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType

import pytest

from caisson.agent.base.lazyimport import LazyImporter

CODE = "import sys\nsys.late_runs = getattr(sys, 'late_runs', 0) + 1\nvalue = 7\ndef double():\n    return 2 * value\n"


@pytest.fixture
def lazy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LazyImporter]:
    (tmp_path / "late_module.py").write_text(CODE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "late_runs", 0, raising=False)
    lazy = LazyImporter(["late_module", "late_and_missing"])
    others = [finder for finder in sys.meta_path if finder is not PathFinder]
    monkeypatch.setattr(sys, "meta_path", [lazy, *others, PathFinder])  # last, as in the agent's interpreter
    yield lazy
    sys.modules.pop("late_module", None)


def runs() -> int:
    return int(sys.late_runs)  # type: ignore[attr-defined]


def test_a_module_runs_when_something_of_it_is_used_and_once(lazy: LazyImporter) -> None:
    import late_module  # type: ignore[import-not-found]
    import late_module as again

    assert again is late_module
    assert not hasattr(late_module, "__path__")
    assert runs() == 0
    assert late_module.double() == 14
    assert type(late_module) is ModuleType
    assert str(late_module.__file__).endswith("late_module.py")
    lazy.load()
    assert runs() == 1


def test_load_executes_all_imported_modules(lazy: LazyImporter) -> None:
    import late_module

    lazy.load()
    assert runs() == 1
    assert late_module.value == 7


def test_a_thread_waits_for_a_module_that_another_one_executes(lazy: LazyImporter, tmp_path: Path) -> None:
    begun, go_on = threading.Event(), threading.Event()
    sys.late_events = begun, go_on  # type: ignore[attr-defined]
    waits = "begun, go_on = sys.late_events\nbegun.set()\nassert go_on.wait(60)\n"
    (tmp_path / "late_module.py").write_text(f"import sys\n{waits}{CODE}")
    import late_module

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(lambda: late_module.value)
        assert begun.wait(60)
        second = pool.submit(lambda: late_module.double())
        go_on.set()
        assert (first.result(60), second.result(60)) == (7, 14)
    assert runs() == 1
    del sys.late_events  # type: ignore[attr-defined]


def test_a_module_that_asks_for_what_it_lacks_is_told_so(lazy: LazyImporter, tmp_path: Path) -> None:
    asks = "import late_module\nassert not hasattr(late_module, 'value')\n"
    (tmp_path / "late_module.py").write_text(f"{asks}{CODE}")
    import late_module

    assert late_module.value == 7 and runs() == 1


def test_a_module_that_is_not_there_is_not_there(lazy: LazyImporter) -> None:
    with pytest.raises(ModuleNotFoundError, match="late_and_missing"):
        import late_and_missing  # type: ignore[import-not-found]  # noqa: F401


def test_the_agent_gets_to_its_first_answer_without_them() -> None:
    """For the libraries' current versions; a new one that uses these at import would make them a detour."""
    code = """if True:
        import sys
        from caisson.agent.base.lazyimport import LazyImporter
        lazy = LazyImporter()
        sys.meta_path.insert(0, lazy)
        import asyncio
        import caisson.agent.api.health, caisson.agent.rpc.server, caisson.agent.rpc.listener
        from caisson.agent.base.signals import Signals
        async def handle():
            with Signals(asyncio.get_running_loop()) as signals:
                signals.handle(10, print)
            await asyncio.to_thread(print)
        asyncio.run(handle())
        assert not {"ast", "google.protobuf.text_format"} & set(sys.modules), sorted(sys.modules)
        lazy.load()
        assert "ast" in sys.modules
        assert "google.protobuf.text_format" not in sys.modules  # only protobuf in Python comes by it
    """
    subprocess.run([sys.executable, "-S", "-c", f"import sys; sys.path[:0] = {sys.path!r}\n{code}"], check=True)
