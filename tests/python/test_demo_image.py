"""The demo's image model: its weights load quickly and draw the digits that are asked for."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("safetensors")

from parastep.demo import image  # noqa: E402  (after the skips)


@pytest.fixture(scope="module")
def pipe():
    return image.load(scheduler="dpmpp2m")


def ink_of(pictures: np.ndarray) -> np.ndarray:
    """How much a pixel differs from the paper: (B, 256), 0 to 1, of pictures (B, 32, 32, 3)."""
    colour = pictures.astype(np.float64)
    frame = np.concatenate([colour[:, 0], colour[:, -1], colour[:, :, 0], colour[:, :, -1]], 1)
    paper = np.median(frame, axis=1)[:, None, None]
    ink = np.linalg.norm(colour - paper, axis=-1)
    ink = ink.reshape(-1, 16, 2, 16, 2).mean((2, 4)).reshape(len(ink), 256)
    return ink / ink.max(1, keepdims=True)


def test_is_small():
    assert image.WEIGHTS.stat().st_size < 2_000_000


def test_pictures_show_their_class(pipe):
    pytest.importorskip("sklearn")
    from sklearn.neighbors import KNeighborsClassifier

    from parastep.demo import train_image

    latents, target = train_image.render(*train_image.load_strokes(), 3000, seed=7)
    ink = ink_of(image.to_image(latents))
    judge = KNeighborsClassifier(5).fit(ink[:2600], target[:2600])
    assert judge.score(ink[2600:], target[2600:]) > 0.9  # the judge itself, on pictures held out

    classes = list(range(10)) * 4
    pictures = image.to_image(pipe(**image.arguments(classes, seed=3, steps=12)).images)
    agreement = np.mean(judge.predict(ink_of(pictures)) == classes)
    assert agreement >= 0.8, f"{agreement:.0%} of the pictures look like their class"


def test_pictures_of_a_class_differ(pipe):
    pictures = image.to_image(pipe(**image.arguments([3] * 6, seed=1, steps=10)).images)
    ink = ink_of(pictures)
    apart = [np.abs(a - b).mean() for k, a in enumerate(ink) for b in ink[:k]]
    assert min(apart) > 0.03


def test_a_seed_fixes_the_picture(pipe):
    first, again, other = (
        pipe(**image.arguments([1, 8], seed=s, steps=4)).images for s in (5, 5, 6)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.shape == (2, image.CHANNELS, image.SIZE, image.SIZE)


def test_each_scheduler_draws(pipe, monkeypatch):
    for name in image.SCHEDULERS:
        monkeypatch.setattr(pipe, "scheduler", image.make_scheduler(name))
        assert torch.isfinite(pipe(**image.arguments([4], steps=2)).images).all(), name
    with pytest.raises(ValueError, match="unknown scheduler"):
        image.make_scheduler("none")


@pytest.mark.parametrize("name", ["ddim", "dpmpp2m", "euler"])
def test_denoiser_is_what_the_pipeline_calls(name):
    pipe = image.load(scheduler=name)
    classes, steps, seed = [2, 7], 6, 11
    f = image.denoiser(classes, steps, scheduler=name, pipe=pipe)
    want = pipe(**image.arguments(classes, seed, steps)).images
    grid = image.make_scheduler(name)
    grid.set_timesteps(steps)
    x = image.noise(2, seed) * grid.init_noise_sigma
    for step, time_ in enumerate(grid.timesteps):
        found = f(x, step)
        grid.scale_model_input(x, time_)
        x = grid.step(found, time_, x, return_dict=False)[0]
    assert torch.allclose(x, want, atol=1e-4)


def test_denoiser_takes_stacked_steps_and_arrays(pipe):
    f = image.denoiser([1, 5], 10, scheduler="dpmpp2m", pipe=pipe)
    x = image.noise(4)
    both = f(x, [0, 6])
    assert torch.allclose(both[2:], f(x[2:], 6), atol=1e-5)
    assert np.allclose(f(x.numpy(), [0, 6]), both.numpy(), atol=1e-6)
    with pytest.raises(ValueError, match="items"):
        f(x, 0)


def test_image_and_latents_are_inverse():
    pictures = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    assert np.array_equal(image.to_image(image.from_image(pictures)), pictures)
    assert image.grid(pictures, columns=2, scale=2, gap=4).size == (132, 132)


def test_unknown_class_is_refused():
    with pytest.raises(ValueError, match="classes are 0 to 9"):
        image.arguments([10])
