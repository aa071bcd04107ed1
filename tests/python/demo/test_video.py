"""The demo's video model makes clips of the digits that are asked for, and they move."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("safetensors")

from parastep.demo import video  # noqa: E402  (after the skips)


def ink_of(latents) -> np.ndarray:
    """How much a pixel differs from the ground: (B, 8, 24, 24), 0 to 1."""
    colour = video.to_frames(latents).astype(np.float64)
    frame = [colour[:, :, 0], colour[:, :, -1], colour[:, :, :, 0], colour[:, :, :, -1]]
    ground = np.median(np.concatenate(frame, 2), axis=(1, 2))[:, None, None, None]
    ink = np.linalg.norm(colour - ground, axis=-1)
    return ink / ink.max((1, 2, 3), keepdims=True)


def middles(ink: np.ndarray) -> np.ndarray:
    """The centre of the ink, (B, 8, 2), in pixels down and right."""
    weight = np.where(ink > 0.4, ink, 0)
    total = weight.sum((2, 3))
    pixels = np.arange(ink.shape[-1])
    down = (weight.sum(3) @ pixels) / total
    right = (weight.sum(2) @ pixels) / total
    return np.stack([down, right], -1)


def centred(ink: np.ndarray) -> np.ndarray:
    """Each clip's frames laid over each other by their middles: (B, 256)."""
    found = np.zeros((len(ink), 16, 16))
    for clip, frames in enumerate(np.pad(ink, [(0, 0), (0, 0), (8, 8), (8, 8)])):
        for frame, middle in zip(frames, np.rint(middles(ink[clip : clip + 1])[0]).astype(int)):
            down, right = middle.clip(0, 23)
            found[clip] += frame[down : down + 16, right : right + 16]
    return found.reshape(len(ink), -1) / 8


@pytest.fixture(scope="module")
def clips():
    classes = list(range(10)) * 2
    pipe = video.MODEL.load(scheduler="dpmpp2m")
    return classes, pipe(**video.MODEL.arguments(classes, seed=3, steps=16))[0]


def test_clips_show_their_class(clips):
    pytest.importorskip("sklearn")
    from sklearn.neighbors import KNeighborsClassifier

    from parastep.demo import train_video

    latents, target = train_video.examples(1200, seed=7)
    known = centred(ink_of(latents))
    judge = KNeighborsClassifier(5).fit(known[:1000], target[:1000])
    assert judge.score(known[1000:], target[1000:]) > 0.85  # the judge itself, on clips held out
    classes, made = clips
    agreement = np.mean(judge.predict(centred(ink_of(made))) == classes)
    assert agreement >= 0.7, f"{agreement:.0%} of the clips look like their class"


def test_digits_move_in_several_directions(clips):
    path = middles(ink_of(clips[1]))
    way = path[:, -1] - path[:, 0]
    assert np.median(np.linalg.norm(way, axis=1)) > 4
    headings = np.round(np.arctan2(way[:, 0], way[:, 1]) / (np.pi / 4)).astype(int) % 8
    assert len(set(headings)) >= 4
    steady = np.abs(np.diff(path, n=2, axis=1)).max((1, 2))
    assert np.median(steady) < 2.5  # pixels of change of speed from frame to frame


def test_grounds_differ(clips):
    grounds = np.median(video.to_frames(clips[1]), axis=(1, 2, 3))
    apart = np.linalg.norm(grounds[:, None] - grounds[None], axis=-1)
    assert (apart > 60).sum() > len(grounds) ** 2 / 2


def test_encode_and_decode():
    latents = torch.randn(2, *video.MODEL.shape)
    pixels = video.decode(latents)
    assert pixels.shape == (2, 8, 3, 24, 24)
    assert torch.allclose(video.encode(pixels), latents, atol=1e-5)
    flat = torch.tensor([0.3, -0.7, 0.9])[None, None, :, None, None].expand(1, 8, 3, 24, 24)
    assert torch.allclose(video.decode(video.encode(flat)), flat, atol=1e-5)
    inside = video.encode(torch.rand(2, 8, 3, 24, 24) * 2 - 1)
    assert inside.abs().max() <= 1 + 1e-5
