"""Each device is probed once before the GPU kernels are used on it; the devices here are fake."""

from __future__ import annotations

import numpy as np
import pytest

from groupnorm.backends.kernels.gpu import build as triton_build
from groupnorm.backends.kernels.gpu.probe import DeviceProbe, why_too_old
from groupnorm.testing import oracle


@pytest.fixture(autouse=True)
def triton_is_available(monkeypatch):
    monkeypatch.setattr(triton_build, "why_unavailable", lambda: None)


class Device:
    """A fake device that computes probes correctly, incorrectly or not at all, and counts them."""

    def __init__(self, factor=1.0, error=None, busy=False, capability=90):
        self.factor, self.error, self.busy, self.count = factor, error, busy, 0
        self.trials = DeviceProbe(
            "PyTorch", lambda i: why_too_old(capability), self.is_busy, self.compute
        )

    def is_busy(self):
        return self.busy

    def compute(self, index, x, program):
        self.count += 1
        if self.error is not None:
            raise self.error
        kernels = [step.kernel for step in program.launches]
        if len(kernels) == 1:
            assert kernels == ["normalize"]
            return oracle.group_norm(x, num_groups=2, feature_axis=1, epsilon=0.0)
        assert kernels == ["measure", "merge", "apply"]
        z = oracle.group_norm(x, num_groups=2, epsilon=0.0)
        return self.factor * z / (1 + np.exp(-z))


def test_a_correct_device_is_probed_once():
    device = Device()
    assert [device.trials.why_unavailable(0) for _ in range(3)] == [None] * 3
    assert device.count == 2  # a kernel by itself, and several, which overlap


@pytest.mark.parametrize("factor", [1.001, np.nan])
def test_a_device_with_wrong_results_is_not_used(factor, caplog):
    device = Device(factor)
    for _ in range(2):
        assert "returned a wrong result" in device.trials.why_unavailable(1).reason
    assert device.count == 2
    assert caplog.text.count("uses the portable implementation on cuda:1 in PyTorch") == 1


def test_a_device_that_raises_is_not_used(caplog):
    why = Device(error=RuntimeError("cuInit: no device")).trials.why_unavailable(0)
    assert "RuntimeError: cuInit: no device" in why.reason
    assert "cuInit: no device" in caplog.text


def test_no_probe_during_stream_capture_but_known_results_apply():
    device = Device(factor=2.0, busy=True)
    assert device.trials.why_unavailable(0) is None
    assert device.count == 0
    device.busy = False
    assert device.trials.why_unavailable(0) is not None
    device.busy = True
    assert device.trials.why_unavailable(0) is not None


def test_older_gpus_are_not_probed():
    device = Device(capability=75)
    assert "capability 8.0, and this one has 7.5" in device.trials.why_unavailable(0).reason
    assert device.count == 0
