"""Compile JAX programs with GPU kernels without a GPU, and print the calls they contain.

The argument is the launcher's name. Needs JAX's CUDA plugin on the path, but no GPU and no driver.
"""

import json
import re
import sys
from unittest import mock

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from groupnorm import group_norm
from groupnorm.backends.jax import gpu as jax_gpu

# The description of a GPU that XLA needs for compiling.
TARGET = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000 l2_cache_size: 52428800 device_memory_size: 151397597184
  clock_rate_ghz: 1.98 registers_per_core_limit: 65536 registers_per_block_limit: 65536
  cuda_compute_capability { major: 9 } runtime_version: "13.0.0" driver_version: "13.0.0"
}
platform_name: "CUDA"
device_description_str: "a GPU of capability 9.0"
"""

SHAPES = {"one kernel": (4, 8, 8, 320), "tiles": (2, 64, 64, 320)}


def forward(x, scale, bias):
    return group_norm(x, scale, bias, activation="silu", implementation="fused", dtype="input")


def backward(x, scale, bias, dy):
    return jax.vjp(forward, x, scale, bias)[1](dy)


def main() -> None:
    topology = topologies.get_topology_desc(platform="cuda", topology="1x1x1", target_config=TARGET)
    sharding = jax.sharding.SingleDeviceSharding(topology.devices[0])
    launcher = {"ptx": jax_gpu._by_ptx, "jax-triton": jax_gpu._by_jax_triton}[sys.argv[1]]
    found = {}
    with mock.patch.multiple(
        jax_gpu, chosen_launcher=lambda: launcher, compute_capability=lambda: 90
    ):
        for name, shape in SHAPES.items():
            x = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
            parameter = jax.ShapeDtypeStruct(shape[-1:], jnp.float32)
            for function, arrays in (
                (forward, (x, parameter, parameter)),
                (backward, (x, parameter, parameter, x)),
            ):
                compiled = jax.jit(function, in_shardings=sharding).lower(*arrays).compile()
                calls = re.findall(r'custom_call_target="([^"]+)"', compiled.as_text())
                found[f"{function.__name__}, {name}"] = calls
    print(json.dumps(found))


main()
