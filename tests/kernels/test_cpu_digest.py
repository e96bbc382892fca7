"""The digest that keys cached kernels on disk changes with every file compiled into them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import groupnorm

pytest.importorskip("numba", reason="kernels need numba")

# In a copy of the package: its sources, and the digests with each of them edited.
PROGRAM = """
import json
import sys
from pathlib import Path
import groupnorm
from groupnorm.backends.kernels.cpu.compiled import entry_points as entries
root = Path(groupnorm.__file__).parent
assert root == Path(sys.argv[1], "groupnorm"), root
before = entries._digest()
assert before == entries._DIGEST
digests = {}
for path in entries._sources():
    text = path.read_bytes()
    path.write_bytes(text + b"# edited")
    digests[path.relative_to(root).as_posix()] = entries._digest()
    path.write_bytes(text)
assert entries._digest() == before
others = {}
for path in set(root.rglob("*.py")) - set(entries._sources()):
    text = path.read_bytes()
    path.write_bytes(text + b"# edited")
    others[path.relative_to(root).as_posix()] = entries._digest()
    path.write_bytes(text)
(Path(entries.__file__).parent / "more.py").write_text("from groupnorm import plan")
more = [path.name for path in entries._sources()]
own = Path(entries.__file__)
own.rename(own.with_suffix(".moved"))
try:
    missing = entries._digest()
except RuntimeError as error:
    missing = str(error)
print(json.dumps([before, digests, others, more, missing]))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("copy").resolve()
    skip = shutil.ignore_patterns("__pycache__", "*.nbi", "*.nbc")
    shutil.copytree(Path(groupnorm.__file__).parent, folder / "groupnorm", ignore=skip)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"NUMBA_CACHE_DIR": str(folder / "cache"), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder)], capture_output=True, text=True, timeout=120,
        check=False, cwd=folder, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_compiled_file_changes_the_digest(found):
    before, digests, *_ = found
    assert len({before, *digests.values()}) == 1 + len(digests)


def test_which_files_are_in_the_digest(found):
    """The kernels' package and the modules it takes constants from, but not all their imports."""
    _, digests, others, *_ = found
    folder = "backends/kernels/cpu/compiled/"
    kernels = {name for name in [*digests, *others] if name.startswith(folder)}
    assert len(kernels) > 7
    assert kernels < set(digests)
    assert set(digests) > {
        "portable/activations.py",  # ERFC_SERIES
        "backends/kernels/erfc.py",
        "backends/kernels/cpu/call_frame.py",
        "backends/kernels/cpu/huge_pages.py",
        "backends/kernels/cpu/xla_structs.py",
    }
    assert not {"plan.py", "typing.py", "adapter.py", "backends/numpy/cpu.py"} & set(digests)


def test_other_files_do_not_change_the_digest(found):
    before, _, others, *_ = found
    assert len(others) > 30
    assert set(others.values()) == {before}


def test_a_new_module_is_included_with_its_imports(found):
    assert {"more.py", "plan.py"} < set(found[3])


def test_missing_sources_raise(found):
    """It raises, because the digest could not change with the sources."""
    assert "source" in found[4]
