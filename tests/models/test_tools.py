"""PyTorch's tools, and those of other packages, on models after `groupnorm.torch.replace`."""

from __future__ import annotations

import contextlib
import copy
import socket

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.fx.experimental import optimization
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

from groupnorm import GroupNorm
from groupnorm.torch import replace, restore
from tests.models.zoo import MODELS, built, first, normal, package

SHAPE = (4, 3, 8, 8)


def small() -> nn.Module:
    """A network with plain, fused and modulated normalizations."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.SiLU(),
        nn.Conv2d(8, 8, 3), nn.GroupNorm(4, 8), nn.Flatten(), nn.Linear(128, 2),
    )  # fmt: skip


@pytest.fixture
def pair():
    """A replaced model and the same one with PyTorch's normalizations."""
    theirs = small()
    ours = copy.deepcopy(theirs)
    assert len(replace(ours).fused) == 1
    return ours, theirs


def gradients(model, x, call=None):
    model.zero_grad()
    (call or model)(x).square().sum().backward()
    return [p.grad for p in model.parameters()]


def assert_close(got, want, tolerance=1e-4):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# Recomputing and moving what is saved for the backward pass ---------------------------------------


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant, pair, rng):
    ours, theirs = pair
    x = normal(rng, *SHAPE).requires_grad_()
    want = gradients(theirs, x)
    plain = gradients(ours, x)
    again = gradients(ours, x, lambda x: checkpoint(ours, x, use_reentrant=reentrant))
    assert all(map(torch.equal, plain, again))
    assert_close(again, want)


@pytest.mark.parametrize("name", ["UNet, scale_shift", "VAE"])
def test_checkpointing_of_diffusers(name, rng):
    model, inputs = built(name).train(), MODELS[name].inputs(rng)
    replace(model)
    results = []
    for _ in range(2):
        results.append(gradients(model, inputs, lambda inputs: MODELS[name].call(model, *inputs)))
        model.enable_gradient_checkpointing()
    assert all(map(torch.equal, *results))


def test_offloading(pair, rng):
    ours, _ = pair
    x = normal(rng, *SHAPE)
    want = gradients(ours, x)
    with torch.autograd.graph.save_on_cpu():
        got = gradients(ours, x)
    assert all(map(torch.equal, got, want))


# Training -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scaled_losses_under_autocast(dtype, pair, rng):
    x = normal(rng, *SHAPE)
    results = []
    for model in pair:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
        for _ in range(2):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=dtype):
                loss = model(x).float().square().mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        results.append([p.detach() for p in model.parameters()])
    assert_close(*results, tolerance=10 * torch.finfo(dtype).eps)


def test_averaged_models(pair, rng):
    ours, _ = pair
    average = torch.optim.swa_utils.AveragedModel(
        ours, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)
    )
    assert sum(isinstance(m, GroupNorm) for m in average.modules()) == 2
    average.update_parameters(ours)
    with torch.no_grad():
        for p in ours.parameters():
            p.add_(1)
    average.update_parameters(ours)
    for p, mean in zip(ours.parameters(), average.module.parameters(), strict=True):
        torch.testing.assert_close(mean, p - 0.5)
    assert len(restore(average).restored) == 3


@pytest.fixture
def one_rank():
    """A process group with this process alone."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:DTensor random operators:UserWarning")
def test_fully_sharded_after_meta_initialization(one_rank, rng):
    from torch.distributed.fsdp import fully_shard

    theirs = small()
    with torch.device("meta"):
        model = small()
    replace(model)
    fully_shard(model)
    model.to_empty(device="cpu")
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert (model[1].weight.full_tensor() == 1).all()
    with torch.no_grad():
        for p, q in zip(model.parameters(), theirs.parameters(), strict=True):
            p.full_tensor().copy_(q)
    x = normal(rng, *SHAPE)
    want = gradients(theirs, x)
    assert_close([g.full_tensor() for g in gradients(model, x)], want)


@pytest.mark.filterwarnings("ignore")  # of lightning, about loggers and workers
def test_lightning(tmp_path, rng):
    lightning = package("lightning")

    class Trained(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = small()

        def training_step(self, batch, index):
            return self.net(batch).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    batches = torch.utils.data.DataLoader(normal(rng, 8, *SHAPE[1:]), batch_size=4)
    ours, theirs = Trained(), Trained()
    replace(ours)
    for model in (ours, theirs):
        trainer = lightning.Trainer(
            max_steps=2, accelerator="cpu", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
        )  # fmt: skip
        trainer.fit(model, batches)
        assert trainer.global_step == 2
        trainer.save_checkpoint(tmp_path / "model.ckpt")
        loaded = Trained.load_from_checkpoint(tmp_path / "model.ckpt")
        assert all(map(torch.equal, loaded.parameters(), model.parameters()))
    assert_close(ours.parameters(), theirs.parameters())


def test_accelerate(pair, rng):
    accelerator = package("accelerate").Accelerator(cpu=True)
    x, results = normal(rng, *SHAPE), []
    for model in pair:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model, optimizer = accelerator.prepare(model, optimizer)
        accelerator.backward(model(x).square().mean())
        optimizer.step()
        results.append(accelerator.unwrap_model(model).parameters())
    assert_close(*results)


def test_models_that_accelerate_has_changed():
    """It replaces the forward of every module on the object, which nothing may pass by."""
    package("accelerate")
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    model = small()
    add_hook_to_module(model[1], AlignDevicesHook(io_same_device=True))
    report = replace(model)
    [entry] = report.skipped
    assert entry.names == ("1",)
    assert "forward was replaced on the object" in entry.note
    assert not report.fused


def test_models_that_accelerate_loads_layer_by_layer(rng):
    """Parameters are loaded when a module is called, and are on the meta device otherwise."""
    accelerate = package("accelerate")
    model, inputs = built("UNet, scale_shift"), MODELS["UNet, scale_shift"].inputs(rng)
    with torch.no_grad():
        replace(model)
        want = first(model, *inputs)
        accelerate.cpu_offload(model, torch.device("cpu"))
        assert all(p.is_meta for p in model.parameters())
        assert_close([first(model, *inputs)], [want], 1e-5)


def test_replaced_models_that_accelerate_changes(pair, rng):
    """Its hooks are called around replaced normalizations, too."""
    package("accelerate")
    from accelerate.hooks import ModelHook, add_hook_to_module

    seen = []

    class Recorded(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            seen.append(module)
            return args, kwargs

    ours, theirs = pair
    add_hook_to_module(ours[1], Recorded())
    x = normal(rng, *SHAPE)
    assert_close([ours(x)], [theirs(x)])
    assert seen == [ours[1]]


# Changed parameters -------------------------------------------------------------------------------


def prune_channels(model):
    """Of the weight, which structured pruning takes for a matrix."""
    weight = model[0].weight
    prune.ln_structured(model[0], "weight", amount=3, n=2, dim=0)
    kept = (model[0].weight.flatten(1).abs().sum(1) > 0).to(weight.dtype)
    for name in ("weight", "bias"):
        prune.custom_from_mask(model[1], name, kept)


def prune_for_good(model):
    prune_channels(model)
    for name in ("weight", "bias"):
        prune.remove(model[1], name)


def parametrize(model):
    parametrizations.weight_norm(model[1], dim=0)


@pytest.mark.parametrize("change", [prune_channels, prune_for_good, parametrize])
def test_changed_parameters(change, pair, rng):
    for model in pair:
        change(model)
    x = normal(rng, *SHAPE)
    ours, theirs = (gradients(model, x) for model in pair)
    assert_close(ours, theirs)


# Programs -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def fresh_compiler():
    try:
        yield
    finally:
        torch._dynamo.reset()


def exported(model, x):
    """For every batch size, height and width."""
    dynamic = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    return torch.export.export(model, (x,), dynamic_shapes=(dynamic,))


def convolutional() -> nn.Module:
    model = small()[:5]
    replace(model)
    return model


def test_exported_for_every_size(rng):
    model = convolutional()
    program = exported(model, normal(rng, *SHAPE)).module()
    for shape in (SHAPE, (3, 3, 9, 12)):
        x = normal(rng, *shape)
        assert_close([program(x)], [model(x)], 1e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # of PyTorch itself
def test_compiled_ahead_of_time(tmp_path, rng):
    model = convolutional()
    with torch.no_grad(), fresh_compiler():
        path = torch._inductor.aoti_compile_and_package(
            exported(model, normal(rng, *SHAPE)), package_path=str(tmp_path / "model.pt2")
        )
        program = torch._inductor.aoti_load_package(path)
        for shape in (SHAPE, (3, 3, 9, 12)):
            x = normal(rng, *shape)
            assert_close([program(x)], [model(x)], 1e-5)


@pytest.mark.slow
def test_compiled_for_every_size(rng):
    model, graphs = convolutional(), []

    def compiler(graph, inputs):
        graphs.append(graph)
        return torch._inductor.compile(graph, inputs)

    counts = set()
    # Not square, since the compiler would take the two sizes for the same.
    with fresh_compiler(), torch.no_grad():
        compiled = torch.compile(model, backend=compiler, dynamic=True, fullgraph=True)
        for shape in ((4, 3, 8, 7), (3, 3, 9, 12), (5, 3, 7, 10)):
            x = normal(rng, *shape)
            assert_close([compiled(x)], [model(x)], 1e-5)
            counts.add(len(graphs))
    assert len(counts) == 1  # nothing is compiled for the other sizes


@pytest.mark.slow
def test_compiled_autograd(pair, rng):
    ours, theirs = pair
    x = normal(rng, *SHAPE)
    want = gradients(theirs, x)
    with fresh_compiler(), torch._dynamo.config.patch(compiled_autograd=True):
        step = torch.compile(lambda x: ours(x).square().sum().backward(), backend="aot_eager")
        step(x)
    assert_close([p.grad for p in ours.parameters()], want)


def test_ensembles(rng):
    """Of models that are called as one, by `torch.func`."""
    models = [convolutional() for _ in range(3)]
    for i, model in enumerate(models):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * i)
    parameters, buffers = torch.func.stack_module_state(models)
    x = normal(rng, *SHAPE)

    def call(parameters, buffers):
        return torch.func.functional_call(models[0], (parameters, buffers), (x,))

    got = torch.func.vmap(call)(parameters, buffers)
    assert_close(got, [model(x) for model in models], 1e-5)


@pytest.mark.parametrize("name", ["resnetv2", "poolformer", "efficientnet"])
def test_traced_symbolically(name, rng):
    model, inputs = built(name), MODELS[name].inputs(rng)
    replace(model)
    graph = torch.fx.symbolic_trace(model)
    names = {key for key, m in model.named_modules() if isinstance(m, GroupNorm)}
    called = {node.target for node in graph.graph.nodes if node.op == "call_module"}
    assert names <= called
    assert_close([graph(*inputs)], [model(*inputs)], 1e-5)


def test_fused_convolutions_of_torch_ao(rng):
    """`torch.ao` folds batch normalizations into convolutions, and leaves these alone."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.GroupNorm(2, 8), nn.ReLU())
    model = model.eval()
    x = normal(rng, *SHAPE)
    want = model(x)
    replace(model)
    folded = optimization.fuse(model)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    assert sum(isinstance(m, GroupNorm) for m in folded.modules()) == 1
    assert_close([folded(x)], [want], 1e-5)
