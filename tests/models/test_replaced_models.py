"""Models of published packages, before and after `groupnorm.torch.replace`."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from groupnorm import GroupNorm
from groupnorm.torch import replace, restore
from tests.models.zoo import MODELS, built, normal

IMAGES = [name for name, model in MODELS.items() if model.images]
LAYOUTS = [("contiguous", name) for name in MODELS] + [("channels_last", name) for name in IMAGES]
GENERATED = ["UNet, scale_shift", "resnetv2"]  # the others would take minutes
ROUNDING = 2e-6  # of a model in float32, relative to its largest result


def in_layout(layout, model, inputs):
    if layout == "contiguous":
        return model, inputs
    order = torch.channels_last
    inputs = tuple(x.contiguous(memory_format=order) if x.ndim == 4 else x for x in inputs)
    return model.to(memory_format=order), inputs


def outcome(name, model, inputs, dtype=torch.float32):
    """The result, and the gradients of the first input and of all parameters."""
    inputs = [x.to(dtype) if x.is_floating_point() else x for x in inputs]
    inputs[0] = inputs[0].clone().requires_grad_()
    model.zero_grad()
    y = MODELS[name].call(model, *inputs)
    dy = torch.linspace(-1, 1, y.numel(), dtype=dtype).view(y.shape).sin()
    y.backward(dy)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return y.detach(), [g.clone() for g in (inputs[0].grad, *gradients)]


def error(got, want):
    return float((got - want).abs().max() / want.abs().max())


def gradient_error(got, want):
    """The largest error; of gradients that are zero but for rounding, relative to the others."""
    largest = max(float(w.abs().max()) for w in want)
    return max(
        float((g - w).abs().max()) / max(float(w.abs().max()), 1e-3 * largest)
        for g, w in zip(got, want, strict=True)
    )


@pytest.mark.parametrize("name", MODELS)
def test_report_and_state_dict(name):
    model = built(name)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    norms = [m for m in model.modules() if isinstance(m, nn.GroupNorm)]
    report = replace(model)
    found = MODELS[name]
    assert len(norms) == found.replaced
    assert all(isinstance(norm, GroupNorm) for norm in norms)
    assert (len(report.replaced), len(report.fused)) == (found.replaced, found.fused)
    assert len(report) == found.replaced + found.fused  # nothing else: not skipped, not "not fused"
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)


@pytest.mark.parametrize(("layout", "name"), LAYOUTS)
def test_errors_of_outputs_and_gradients(layout, name, rng):
    """They are those of PyTorch's own normalization, but for rounding."""
    model, inputs = in_layout(layout, built(name), MODELS[name].inputs(rng))
    want, wanted = outcome(name, copy.deepcopy(model).double(), inputs, torch.float64)
    theirs, their_gradients = outcome(name, model, inputs)
    replace(model)
    ours, our_gradients = outcome(name, model, inputs)
    assert ours.dtype == theirs.dtype
    assert ours.stride() == theirs.stride()
    assert error(ours, want) <= 1.5 * error(theirs, want) + ROUNDING
    bound = 1.5 * gradient_error(their_gradients, wanted) + 10 * ROUNDING
    assert gradient_error(our_gradients, wanted) <= bound


@pytest.mark.parametrize("name", MODELS)
def test_restored_models_give_the_same_bits(name, rng):
    model, inputs = built(name), MODELS[name].inputs(rng)
    attributes = {key: m.__dict__.copy() for key, m in model.named_modules()}
    classes = {key: type(m) for key, m in model.named_modules()}
    y, gradients = outcome(name, model, inputs)
    assert len(replace(model)) == len(restore(model).restored)
    assert {key: type(m) for key, m in model.named_modules()} == classes
    assert all(m.__dict__ == attributes[key] for key, m in model.named_modules())
    again, others = outcome(name, model, inputs)
    assert torch.equal(y, again)
    assert all(map(torch.equal, gradients, others))


@pytest.mark.parametrize("name", MODELS)
def test_a_training_step(name, rng):
    ours, inputs = built(name).train(), MODELS[name].inputs(rng)
    theirs = copy.deepcopy(ours)
    replace(ours)
    for model in (ours, theirs):
        torch.manual_seed(1)  # for dropout
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for _ in range(2):
            optimizer.zero_grad()
            MODELS[name].call(model, *inputs).square().mean().backward()
            optimizer.step()
    for (key, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=lambda m, key=key: key + m)


@pytest.mark.parametrize("name", [name for name, model in MODELS.items() if model.save])
def test_saved_and_loaded(name, rng, tmp_path):
    """The files are those of the original model, in both directions."""
    model, inputs = built(name), MODELS[name].inputs(rng)
    call = MODELS[name].call
    with torch.no_grad():
        theirs = call(model, *inputs)
        replace(model)
        ours = call(model, *inputs)
        model.save_pretrained(tmp_path)
        loaded = type(model).from_pretrained(tmp_path).eval()
        assert not any(isinstance(m, GroupNorm) for m in loaded.modules())
        assert torch.equal(call(loaded, *inputs), theirs)
        replace(loaded)
        assert torch.equal(call(loaded, *inputs), ours)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*lru_cache:UserWarning")  # of functions of transformers
@pytest.mark.parametrize(
    ("compiler", "name"),
    [*(("aot_eager", name) for name in MODELS), *(("inductor", name) for name in GENERATED)],
)
def test_compiled_in_one_graph(compiler, name, rng):
    model, inputs = built(name), MODELS[name].inputs(rng)
    with torch.no_grad():
        want = MODELS[name].call(model, *inputs)
        replace(model)
        try:
            got = MODELS[name].call(torch.compile(model, backend=compiler, fullgraph=True), *inputs)
        finally:
            torch._dynamo.reset()
    assert error(got, want) <= 10 * ROUNDING


# Padding ------------------------------------------------------------------------------------------

LENGTHS = (400, 277)


@pytest.fixture
def clips(rng):
    """Two clips of different length; the second one is padded with zeros."""
    x = normal(rng, 2, max(LENGTHS))
    attended = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    return torch.where(attended, x, 0), attended


def alone(model, x, attended):
    """The last hidden states of each clip by itself."""
    return [
        model(x[i : i + 1, :n], attended[i : i + 1, :n]).last_hidden_state[0]
        for i, n in enumerate(LENGTHS)
    ]


def deviation(states, wanted):
    return max(float((s[: len(w)] - w).abs().max()) for s, w in zip(states, wanted, strict=True))


def mask_the_padding(model):
    """Have the encoder's only group normalization receive a mask of the frames within clips."""
    convolution, stride = model.feature_extractor.conv_layers[0], model.config.conv_stride[0]
    kernel = model.config.conv_kernel[0]

    def add_mask(norm, args, keywords):
        [x] = args
        frames = (torch.tensor(LENGTHS) - kernel) // stride + 1
        valid = torch.arange(x.shape[-1]) < frames[:, None]
        return args, keywords | {"mask": valid[:, None]}

    return convolution.layer_norm.register_forward_pre_hook(add_mask, with_kwargs=True)


@torch.no_grad()
def test_padding_does_not_change_what_a_clip_is_encoded_as(clips):
    x, attended = clips
    model = built("Wav2Vec2")
    wanted = alone(model, x, attended)
    assert deviation(model(x, attended).last_hidden_state, wanted) > 1e-2  # of the original model
    replace(model)
    assert deviation(model(x, attended).last_hidden_state, wanted) > 1e-2
    handle = mask_the_padding(model)
    assert deviation(model(x, attended).last_hidden_state, wanted) < 1e-5
    handle.remove()
    assert deviation(alone(model, x, attended), wanted) < 1e-5


def test_gradients_do_not_change_with_padding(clips):
    x, attended = clips
    model = built("Wav2Vec2")
    norm = model.feature_extractor.conv_layers[0].layer_norm
    lengths = [len(states) for states in alone(model, x, attended)]

    def gradients(states):
        model.zero_grad()
        sum(s[:n].exp().sum() for s, n in zip(states, lengths, strict=True)).backward()
        return [p.grad.clone() for p in norm.parameters()]

    wanted = gradients(alone(model, x, attended))
    replace(model)
    mask_the_padding(model)
    for got, want in zip(gradients(model(x, attended).last_hidden_state), wanted, strict=True):
        assert error(got, want) < 1e-4
