"""The demo's image model draws the digits that are asked for."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("safetensors")

from parastep.demo import image  # noqa: E402  (after the skips)


@pytest.fixture(scope="module")
def pipe():
    return image.MODEL.load(scheduler="dpmpp2m")


def ink_of(pictures: np.ndarray) -> np.ndarray:
    """How much a pixel differs from the paper: (B, 256), 0 to 1, of pictures (B, 32, 32, 3)."""
    colour = pictures.astype(np.float64)
    frame = np.concatenate([colour[:, 0], colour[:, -1], colour[:, :, 0], colour[:, :, -1]], 1)
    paper = np.median(frame, axis=1)[:, None, None]
    ink = np.linalg.norm(colour - paper, axis=-1)
    ink = ink.reshape(-1, 16, 2, 16, 2).mean((2, 4)).reshape(len(ink), 256)
    return ink / ink.max(1, keepdims=True)


def test_pictures_show_their_class(pipe):
    pytest.importorskip("sklearn")
    from sklearn.neighbors import KNeighborsClassifier

    from parastep.demo import train_image

    latents, target = train_image.render(*train_image.load_strokes(), 3000, seed=7)
    ink = ink_of(image.to_image(latents))
    judge = KNeighborsClassifier(5).fit(ink[:2600], target[:2600])
    assert judge.score(ink[2600:], target[2600:]) > 0.9  # the judge itself, on pictures held out

    classes = list(range(10)) * 4
    pictures = image.to_image(pipe(**image.MODEL.arguments(classes, seed=3, steps=12)).images)
    agreement = np.mean(judge.predict(ink_of(pictures)) == classes)
    assert agreement >= 0.8, f"{agreement:.0%} of the pictures look like their class"


def test_pictures_of_a_class_differ(pipe):
    pictures = image.to_image(pipe(**image.MODEL.arguments([3] * 6, seed=1, steps=10)).images)
    ink = ink_of(pictures)
    apart = [np.abs(a - b).mean() for k, a in enumerate(ink) for b in ink[:k]]
    assert min(apart) > 0.03


def test_image_and_latents_are_inverse():
    pictures = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    assert np.array_equal(image.to_image(image.from_image(pictures)), pictures)
    assert image.grid(pictures, columns=2, scale=2, gap=4).size == (132, 132)
