"""examples/tiled_vae.py: tiles with shared statistics give the untiled decode; others do not."""

from __future__ import annotations

import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from tests.project.test_examples import EXAMPLES, PNG, SECONDS, load

pytest.importorskip("diffusers", reason="the example decodes with diffusers' AutoencoderKL")

CHANNELS = (8, 16, 16)  # three resolutions
FACTOR = 4  # between the latent and the image
TILE = 32


@pytest.fixture(scope="module")
def example():
    return load("tiled_vae")


@pytest.fixture(scope="module")
def vae(example):
    return example.random_vae(CHANNELS, TILE)


@pytest.fixture(scope="module")
def latent():
    """Its right half has another mean, so that tiles have different statistics."""
    z = np.random.default_rng(0).standard_normal((2, 4, 19, 26), dtype=np.float32)
    z[..., 13:] += 2
    return torch.from_numpy(z)


def largest(a, b) -> float:
    return float((a - b).abs().max())


@pytest.mark.parametrize("tile", [TILE, 24, 1000])
def test_tiles_with_shared_statistics_are_the_untiled_decode(example, vae, latent, tile):
    whole = example.decode_untiled(vae, latent)
    assert whole.shape == (2, 3, 19 * FACTOR, 26 * FACTOR)
    assert 0.1 < whole.std() < whole.abs().max() < 3  # so that 1e-5 is a small difference
    assert largest(example.decode_in_tiles(vae, latent, tile), whole) <= 1e-5


def test_tiles_with_their_own_statistics_are_not(example, vae, latent):
    whole = example.decode_untiled(vae, latent)
    assert largest(example.decode_in_diffusers_tiles(vae, latent), whole) > 0.1


def test_the_margin_is_as_narrow_as_possible(example, vae, latent):
    """Also the control: without the neighbours' pixels, the results are wrong."""
    with torch.no_grad():
        x = vae.decoder.mid_block(vae.decoder.conv_in(latent))
        for stage in example.stages_of(vae.decoder):
            whole = stage(x)
            assert largest(example.in_tiles(stage, x, 8, stage.margin), whole) <= 1e-5
            assert largest(example.in_tiles(stage, x, 8, stage.margin - 1), whole) > 1e-3
            x = whole


def test_a_norm_that_is_called_twice_has_statistics_for_each_call(example):
    norm = torch.nn.GroupNorm(2, 4)
    x = torch.from_numpy(np.random.default_rng(1).uniform(0, 1, (1, 4, 8, 8)).astype(np.float32))

    def network(x):
        return norm(norm(x).exp())

    with torch.no_grad():
        assert largest(example.in_tiles(network, x, 3, 0), network(x)) <= 1e-5


def test_report_detects_wrong_results(example, tmp_path, capsys):
    image = np.random.default_rng(2).uniform(-1, 1, (1, 3, 8, 12)).astype(np.float32)
    fine = {method: example.Result(image.copy(), 1.0, 1.0) for method in example.METHODS}
    assert example.report(fine, tmp_path) == 0
    assert (tmp_path / "tiled_vae.png").read_bytes().startswith(PNG)
    for wrong in (1.0, np.nan):
        changed = image.copy()
        changed[0, 1, 2, 3] += wrong
        results = fine | {"tiles, shared statistics": example.Result(changed, 1.0, 1.0)}
        assert example.report(results, tmp_path) == 1
        assert "DIFFER" in capsys.readouterr().err


@pytest.mark.slow
def test_the_example_needs_less_memory(tmp_path):
    done = subprocess.run(
        [sys.executable, EXAMPLES / "tiled_vae.py", "--out", tmp_path],
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = re.findall(r"^(.*?)  +([\d.e+-]+)  [\d.e+-]+ +(\d+) MB", done.stdout, re.M)
    found = {method: (float(difference), int(memory)) for method, difference, memory in rows}
    assert found["tiles, shared statistics"][0] <= 1e-5, done.stdout
    assert found["tiles, diffusers' own"][0] > 0.1, done.stdout
    # Measured: 104 to 138 MB, and 404 to 472 MB.
    assert found["tiles, shared statistics"][1] < 0.6 * found["untiled"][1], done.stdout
