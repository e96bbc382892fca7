"""The XLA structs that the core declares agree with the header in the installed jaxlib."""

from __future__ import annotations

import ctypes
import importlib
import re
import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.needs("jax")
core = pytest.importorskip(
    "groupnorm.backends.kernels.cpu._core", reason="the core is not compiled here"
)

# Names in version 0.3 of the interface, and in others: minor versions may rename.
RENAMED = {
    "XLA_FFI_Extension_Base": "XLA_FFI_InternalExtension",  # 0.5
}


@pytest.fixture(scope="module")
def header():
    jax = importlib.import_module("jax")
    return Path(jax.ffi.include_dir(), "xla", "ffi", "api", "c_api.h")


@pytest.fixture(scope="module")
def named(header):
    """Return the installed header's name for a name of version 0.3."""
    text = header.read_text()

    def name(known):
        if re.search(rf"\b{known}\b", text):
            return known
        return RENAMED.get(known, known)

    return name


def by_a_compiler(header, fields, constants, tmp_path):
    """Return offsets and sizes of fields, and values of constants, from a C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("there is no C compiler; the other case parses the header")
    numbers = []
    for struct, field in fields:
        numbers += [f"offsetof({struct}, {field})", f"sizeof((({struct}*)0)->{field})"]
    lines = "".join(f'printf("%zu\\n", (size_t)({n}));' for n in [*numbers, *constants])
    program = tmp_path / "offsets.c"
    program.write_text(f'#include <stdio.h>\n#include "{header}"\nint main(void){{{lines}}}\n')
    subprocess.run([compiler, "-o", tmp_path / "offsets", program], check=True, timeout=120)
    done = subprocess.run(
        [tmp_path / "offsets"], check=True, timeout=60, capture_output=True, text=True
    )
    found = list(map(int, done.stdout.split()))
    pairs = found[: len(numbers)]
    where = dict(zip(fields, zip(pairs[::2], pairs[1::2], strict=True), strict=True))
    return where, dict(zip(constants, found[len(numbers) :], strict=True))


def by_parsing(header, fields, constants, tmp_path):
    """Return the same, parsed from the header and laid out by ctypes."""
    text = re.sub(r"//.*", "", header.read_text())
    bodies = dict(re.findall(r"struct (\w+) \{(.*?)\n\}", text, re.DOTALL))
    plain = {
        "size_t": ctypes.c_size_t, "int64_t": ctypes.c_int64, "int32_t": ctypes.c_int32,
        "uint32_t": ctypes.c_uint32, "int": ctypes.c_int,
        "XLA_FFI_Handler_Traits": ctypes.c_uint32,
    }  # fmt: skip
    plain |= dict.fromkeys(re.findall(r"typedef enum \{[^}]*\} (\w+);", text), ctypes.c_int)

    def kind(name):
        return plain[name] if name in plain else laid_out(name)

    def laid_out(struct):
        found = []
        for declaration in bodies[struct].split(";"):
            words = declaration.replace("(*", " * ").split()
            if not words:
                continue
            if words[0].startswith("_XLA_FFI_API_STRUCT_FIELD"):
                found.append((words[0].split("(")[1].rstrip(")"), ctypes.c_void_p))
            elif "*" in declaration:
                found.append((words[-1].lstrip("*"), ctypes.c_void_p))
            else:
                found.append((words[-1], kind(words[-2])))
        return type(struct, (ctypes.Structure,), {"_fields_": found})

    where = {}
    for struct, field in fields:
        descriptor = getattr(laid_out(struct), field)
        where[struct, field] = descriptor.offset, descriptor.size
    return where, {c: int(re.search(rf"\b{c} (?:= )?(\d+)", text)[1]) for c in constants}


@pytest.mark.parametrize("how", [by_a_compiler, by_parsing])
def test_offsets_sizes_and_constants(how, header, named, tmp_path):
    declared = core.xla_interface()
    fields = {
        (named(key[0]), named(key[1])): where
        for key, where in declared.items()
        if isinstance(key, tuple)
    }
    constants = {key: value for key, value in declared.items() if isinstance(key, str)}
    minor = constants.pop("XLA_FFI_API_MINOR")  # newer ones are compatible
    assert minor == 3
    assert len(fields) > 40
    assert len(constants) > 10
    assert how(header, list(fields), list(constants), tmp_path) == (fields, constants)
