"""What keys compiled kernels on disk changes with every file that is compiled in."""

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

# In a copy of the package: its sources, and which digests are had with each of them edited.
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


def test_each_file_that_is_compiled_in_changes_it(found):
    before, digests, *_ = found
    assert len({before, *digests.values()}) == 1 + len(digests)


def test_what_is_compiled_in(found):
    """Their own package, and what its modules take numbers from; but not all that these name."""
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


def test_other_files_do_not_change_it(found):
    before, _, others, *_ = found
    assert len(others) > 30
    assert set(others.values()) == {before}


def test_a_module_that_is_new_comes_with_what_it_imports(found):
    assert {"more.py", "plan.py"} < set(found[3])


def test_without_its_sources_there_is_no_digest(found):
    """Rather than one that never changes."""
    assert "source" in found[4]
