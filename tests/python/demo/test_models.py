"""What all models of the demo promise: small files, classes, seeds, schedulers, denoisers."""

import dataclasses

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("safetensors")

from parastep import demo  # noqa: E402  (after the skips)
from parastep.demo import common, training  # noqa: E402

PAIRS = [(name, scheduler) for name in demo.NAMES for scheduler in demo.load(name).schedulers]


@pytest.fixture(scope="module", params=demo.NAMES)
def model(request):
    return demo.load(request.param)


@pytest.fixture(scope="module")
def pipes():
    """A pipeline a model, loaded once."""
    return {}


@pytest.fixture(scope="module")
def pipe(model, pipes):
    return pipes.setdefault(model, model.load())


def test_is_small(model):
    assert model.weights.stat().st_size < 2_000_000


def test_a_seed_fixes_the_sample(model, pipe):
    first, again, other = (pipe(**model.arguments([1, 8], seed=s, steps=3))[0] for s in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.shape == (2, *model.shape)


def test_the_class_and_the_guidance_count(model, pipe):
    calls = [([3], {}), ([4], {}), ([3], {"guidance": 1.5})]
    made = [pipe(**model.arguments(c, steps=3, **extra))[0] for c, extra in calls]
    assert not torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


@pytest.mark.parametrize(("name", "scheduler"), PAIRS)
def test_denoiser_is_what_the_pipeline_calls(name, scheduler, pipes):
    model = demo.load(name)
    pipe = pipes.setdefault(model, model.load())
    pipe.scheduler = model.make_scheduler(scheduler)
    f = model.denoiser([2, 7], 4, scheduler=scheduler, pipe=pipe)
    seen = []

    def keep(pipe, step, time, tensors):
        seen.append(tensors["latents"].clone())
        return {}

    pipe(**model.arguments([2, 7], 11, 4), callback_on_step_end=keep)
    pipe.scheduler = model.make_scheduler()
    grid = model.make_scheduler(scheduler)
    grid.set_timesteps(4)
    x = model.noise(2, 11) * getattr(grid, "init_noise_sigma", 1.0)
    rng = model.arguments([2], 11)["generator"]
    torch.randn(x.shape, generator=rng)  # what the pipeline drew for x
    for step, time in enumerate(grid.timesteps):
        found = f(x, step)
        if hasattr(grid, "scale_model_input"):
            grid.scale_model_input(x, time)
        extra = {"generator": rng} if scheduler in ("ddpm", "euler_a") else {}
        x = grid.step(found, time, x, return_dict=False, **extra)[0]
        assert torch.allclose(x, seen[step], atol=1e-4, rtol=1e-4), step
    assert len(seen) == len(grid.timesteps)


def test_denoiser_takes_stacked_steps_and_arrays(model, pipe):
    f = model.denoiser([1, 5], 10, pipe=pipe)
    x = model.noise(4)
    both = f(x, [0, 6])
    assert torch.allclose(both[2:], f(x[2:], 6), atol=1e-4)
    assert not torch.allclose(both[2:], f(x[2:], 0), atol=1e-2)
    assert np.allclose(f(x.numpy(), [0, 6]), both.numpy(), atol=1e-5)
    with pytest.raises(ValueError, match="items"):
        f(x, 0)


def test_unknown_names_are_refused(model):
    with pytest.raises(ValueError, match="classes are 0 to 9"):
        model.arguments([10])
    with pytest.raises(ValueError, match="classes are 0 to 9"):
        model.arguments([-1])
    with pytest.raises(ValueError, match="unknown scheduler"):
        model.make_scheduler("none")
    with pytest.raises(ValueError, match="unknown model"):
        demo.load("text")


def test_what_is_trained_is_what_is_loaded(model, tmp_path):
    """Two steps of training go into a file, which loads as the network that was trained."""
    torch.manual_seed(0)
    options = training.command_line("", 2, 1e-3, tmp_path / "w.safetensors", 4).parse_args([])

    def examples(count, seed):
        return torch.randn(count, *model.shape), torch.arange(count) % len(model.classes)

    def loss_of(trained, clean, label, level):
        prompts = [getattr(trained, table)[label] for table in model.prompts]
        return model.forward(trained.network, clean, level * 999, *prompts).square().mean()

    trained = training.fit(common.Conditioned(model), examples, loss_of, options)
    training.save(trained, options.out)
    restored = common.Conditioned(model)
    training.restore(restored, options.out)
    for kept, was in zip(restored.parameters(), trained.parameters(), strict=True):
        assert torch.equal(kept, was.half().float())
    again = dataclasses.replace(model, weights=options.out)
    x, times = model.noise(1), torch.tensor([500.0])
    prompts = [again.rows(table, [3])[0] for table in model.prompts]
    pipe = again.load()
    network = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    with torch.no_grad():
        for table, rows in zip(model.prompts, prompts):
            assert torch.allclose(rows[0], getattr(trained, table)[3], atol=1e-3)
        want = model.forward(trained.network, x, times, *prompts)
        assert torch.allclose(model.forward(network, x, times, *prompts), want, atol=2e-2)
