"""The demo's sound model says the digits that are asked for, and they can be heard."""

import shutil
import wave

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("safetensors")

from parastep.demo import sound  # noqa: E402  (after the skips)


@pytest.fixture(scope="module")
def words():
    classes = np.arange(30) % 10
    pipe = sound.MODEL.load(scheduler="dpmpp2m")
    return classes, pipe(**sound.MODEL.arguments(classes.tolist(), seed=3, steps=12))[0]


def shapes(spectra) -> np.ndarray:
    """Spectra (B, 1, 64, 64) without pitch, loudness and when the word begins: (B, 16 * 24)."""
    level = np.asarray(spectra)[:, 0]
    found = []
    for each in level:
        begin = np.argmax(each.mean(0) > -0.6)
        part = np.pad(each, [(0, 0), (0, 64)], constant_values=-1)[:, begin : begin + 48]
        bands = part.reshape(16, 4, 24, 2).mean((1, 3))
        found.append((bands - bands.mean()).ravel())
    return np.array(found)


def test_words_of_a_class_are_alike(words):
    """The nearest other word is mostly of the same class."""
    classes, spectra = words
    form = shapes(spectra)
    apart = np.linalg.norm(form[:, None] - form[None], axis=-1)
    np.fill_diagonal(apart, np.inf)
    agreement = np.mean(classes[apart.argmin(1)] == classes)
    assert agreement >= 0.6, f"{agreement:.0%} of the words are nearest to one of their class"


@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="needs espeak-ng")
def test_words_are_what_was_asked_for(words):
    pytest.importorskip("sklearn")
    from sklearn.neighbors import KNeighborsClassifier

    from parastep.demo import train_sound

    spectra, target = train_sound.Examples(300, seed=5)(400, seed=6)
    form = shapes(spectra)
    judge = KNeighborsClassifier(3).fit(form[:300], target[:300])
    assert judge.score(form[300:], target[300:]) > 0.85
    classes, made = words
    agreement = np.mean(judge.predict(shapes(made)) == classes)
    assert agreement >= 0.8, f"{agreement:.0%} of the words sound like their class"


def tone(hertz: float) -> np.ndarray:
    time = np.arange(sound.HOP * (sound.SIZE - 1)) / sound.RATE
    return (0.4 * np.sin(2 * np.pi * hertz * time)).astype(np.float32)


def test_a_tone_comes_back():
    """Its spectrogram is loudest in its own band, and so is that of the sound made of it."""
    pitches = [220.0, 900.0, 3000.0]
    spectra = sound.from_wave(np.stack([tone(hertz) for hertz in pitches]))
    assert spectra.shape == (3, 1, sound.SIZE, sound.SIZE)
    middles = sound.mel_bands() @ np.fft.rfftfreq(sound.WINDOW, 1 / sound.RATE)
    for hertz, spectrum in zip(pitches, spectra):
        band = spectrum[0, :, 32].argmax()
        assert abs(middles[band] - hertz) < 0.08 * hertz + 15
    made = sound.to_wave(spectra)
    heard = np.abs(np.fft.rfft(made * np.hanning(made.shape[1]))).argmax(1)
    assert np.allclose(heard * sound.RATE / made.shape[1], pitches, rtol=0.02, atol=25)
    again = sound.from_wave(made)
    assert np.abs(again - spectra).mean() < 0.05


def test_silence_is_silent():
    assert np.abs(sound.to_wave(-np.ones((1, 1, sound.SIZE, sound.SIZE), np.float32))).max() < 1e-3


def test_wave_file(tmp_path):
    sound.save_wave(tone(440.0), tmp_path / "a.wav")
    with wave.open(str(tmp_path / "a.wav")) as file:
        assert (file.getnchannels(), file.getframerate()) == (1, sound.RATE)
        samples = np.frombuffer(file.readframes(file.getnframes()), "<i2")
    assert np.abs(samples / 32767 - tone(440.0)).max() < 1e-4
