"""Mutation tests: change one operator or number at a time, and list the changes no test notices.

``nox -s mutants`` mutates every file of ``targets.toml`` in a copy of the repository, with
cosmic-ray; ``-- FILE ...`` only these. It fails if a mutant survives that is not listed in
``survivors.toml``, or if a listed one is now killed or no longer exists.
"""

from __future__ import annotations

import functools
import gc
import importlib
import json
import math
import os
import shlex
import shutil
import signal
import socketserver
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
# Asks this process, which has imported the libraries, to run the tests: a new one takes ten times
# as long to start as most tests take.
ASK = (
    "import socket as s, sys; c = s.socket(s.AF_UNIX); c.connect('server'); "
    "sys.exit(c.recv(1) != b'0')"
)


def main(only: list[str]) -> int:
    for library in ("hypothesis", "array_api_compat", "ml_dtypes", "pytest"):
        importlib.import_module(library)
    gc.freeze()  # children need not look at all of this
    settings = tomllib.loads((HERE / "targets.toml").read_text())
    listed = tomllib.loads((HERE / "survivors.toml").read_text())
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "copy")
        ignored = shutil.ignore_patterns(".*", "__pycache__", "build")
        shutil.copytree(ROOT, copy, symlinks=True, ignore=ignored)
        os.chdir(copy)
        sys.path.insert(0, str(copy))
        for name in only or settings["targets"]:
            start = time.perf_counter()
            killed, survivors = mutate(name, settings)
            reasons = {mutant for entry in listed.get(name, []) for mutant in entry["mutants"]}
            total = killed + len(survivors)
            print(
                f"{name}: {total} mutants, {killed} killed, {len(survivors)} survive, "
                f"{killed / total:.1%} ({time.perf_counter() - start:.0f} s)"
            )
            news, stale = sorted(set(survivors) - reasons), sorted(reasons - set(survivors))
            for heading, mutants in ("NEW SURVIVOR", news), ("LISTED, BUT KILLED OR GONE", stale):
                for mutant in mutants:
                    print(f"{heading}: {mutant}")
            sys.stdout.flush()
            failed = failed or bool(news or stale)
    return int(failed)


def mutate(name: str, settings: dict) -> tuple[int, list[str]]:
    """Return the number of killed mutants of a file, and the others, as in ``survivors.toml``."""
    others = f"core/(?!({'|'.join(settings['operators'])})$)"
    Path("config.toml").write_text(
        f"[cosmic-ray]\nmodule-path = {json.dumps(name)}\ntimeout = 600\nexcluded-modules = []\n"
        f"test-command = {json.dumps(shlex.join([sys.executable, '-I', '-S', '-c', ASK]))}\n"
        '[cosmic-ray.distributor]\nname = "local"\n'
        f"[cosmic-ray.filters.operators-filter]\nexclude-operators = {json.dumps([others])}\n"
    )
    Path("session.sqlite").unlink(missing_ok=True)
    run("cosmic-ray", "init", "config.toml", "session.sqlite")
    run("cr-filter-operators", "session.sqlite", "config.toml")
    tests = functools.partial(Tests, [*settings["pytest"], *settings["targets"][name]])
    Path("server").unlink(missing_ok=True)
    with Server("server", tests) as server:
        # The tests must pass without a mutation. This also stores their bytecode; that of the
        # package is compared with its source by content: mutants may have equal sizes and times.
        sys.dont_write_bytecode, start = False, time.perf_counter()
        server.answer("cosmic-ray", "baseline", "config.toml")
        sys.dont_write_bytecode = True
        # A loop that does not end counts as noticed.
        server.limit = math.ceil(5 + 5 * (time.perf_counter() - start))
        hashed = ("-q", "-f", "--invalidation-mode", "checked-hash", "groupnorm", "backends")
        run(sys.executable, "-m", "compileall", *hashed)
        server.answer("cosmic-ray", "exec", "config.toml", "session.sqlite")
    lines = run("cosmic-ray", "dump", "session.sqlite").splitlines()
    results = [result for _, result in map(json.loads, lines)]
    done = [result for result in results if result["worker_outcome"] != "skipped"]
    broken = [result for result in done if result["worker_outcome"] != "normal"]
    if broken:
        raise RuntimeError(f"cosmic-ray could not make or test {len(broken)} mutants: {broken[0]}")
    outcomes = [(change(result["diff"]), result["test_outcome"]) for result in done]
    outcomes = [(c, o) for c, o in outcomes if not any(n in c for n in settings["not_counted"])]
    survivors = [c for c, outcome in outcomes if outcome == "survived"]
    return len(outcomes) - len(survivors), survivors


def run(*command: str) -> str:
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


class Server(socketserver.ForkingMixIn, socketserver.UnixStreamServer):
    timeout = 0.1  # of waiting for a request
    limit = 600  # seconds for the tests of one mutant

    def answer(self, *command: str) -> None:
        """Answer requests until a command ends."""
        with subprocess.Popen(command) as running:
            while running.poll() is None:
                self.handle_request()
        if running.returncode:
            raise subprocess.CalledProcessError(running.returncode, command)


class Tests(socketserver.BaseRequestHandler):
    """Run the tests in a child of this process, and answer 0 if they pass."""

    def __init__(self, arguments: list[str], *rest) -> None:
        self.arguments = arguments
        super().__init__(*rest)

    def handle(self) -> None:
        signal.alarm(self.server.limit)  # ends this child
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        code = importlib.import_module("pytest").main(self.arguments)
        self.request.sendall(b"0" if code == 0 else b"1")


def change(diff: str) -> str:
    """Return the changed line before and after the mutation."""
    lines = [line for line in diff.splitlines() if not line.startswith(("---", "+++"))]
    before, after = (
        " ".join(line[1:].strip() for line in lines if line.startswith(sign)) for sign in "-+"
    )
    return f"{before} -> {after}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
