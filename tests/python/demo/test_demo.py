"""The demo itself, on a few steps: what it runs, what it says of it, what it writes."""

import math
import wave

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("safetensors")
pytest.importorskip("tqdm")

from tqdm.auto import tqdm  # noqa: E402  (after the skips)

from parastep import demo  # noqa: E402
from parastep.demo import runs, show, sound  # noqa: E402

STEPS = 10


@pytest.fixture(scope="module")
def found():
    threads = torch.get_num_threads()
    made = {}
    with tqdm(disable=True) as bar:
        for name in demo.NAMES:
            made[name] = runs.compare(
                runs.Job(demo.load(name), [3, 8], steps=STEPS), bar, tolerance=0.1, max_stride=1
            )
    torch.set_num_threads(threads)
    return made


@pytest.mark.parametrize("name", demo.NAMES)
def test_runs(found, name):
    each = found[name]
    exact = each[0]
    assert exact.rounds == STEPS
    by_name = {run.name: run for run in each}
    assert torch.equal(by_name["parastep, rehearsed, 2 ranks"].latents, exact.latents)
    ours = by_name["parastep, 8 ranks"]
    assert ours.report.fallback is None
    assert 0 < ours.rounds < STEPS
    assert 15 < ours.psnr(exact) < math.inf
    published = by_name["published rule, 8 ranks"]
    assert published.rounds == ours.rounds
    assert published.report.fallback is None
    fewer = each[-1]
    assert fewer.rounds == ours.rounds
    assert fewer.name == f"{ours.rounds} steps instead"
    text = runs.table(each)
    assert len(text.splitlines()) == 1 + len(each)
    assert [line.endswith("exact") for line in text.splitlines()[1:4:2]] == [True, True]
    assert text.splitlines()[-1].endswith("dB")


def test_what_is_written(found, tmp_path):
    from PIL import Image

    pytest.importorskip("matplotlib")
    show.overview(found, tmp_path / "demo.png")
    assert Image.open(tmp_path / "demo.png").size == (1300, 640)
    show.animation(found["video"], tmp_path / "demo.gif")
    with Image.open(tmp_path / "demo.gif") as gif:
        assert gif.n_frames == 8
    for path in show.voices(found["sound"], tmp_path / "demo"):
        with wave.open(str(path)) as file:
            assert file.getnframes() > 2 * sound.HOP * (sound.SIZE - 1)
    names = {path.name for path in tmp_path.glob("*.wav")}
    rules = ["sequential", "parastep", "published_rule", "fewer_steps"]
    assert names == {f"demo_{rule}.wav" for rule in rules}
