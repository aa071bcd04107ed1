"""What users do with a parallel pipeline besides calling it: copy it, pickle it, pass it on."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
diffusers = pytest.importorskip("diffusers")

import tiny  # noqa: E402
from hosting import devices, host, no_warnings, own, parallel  # noqa: E402

import parastep  # noqa: E402
from parastep.diffusers.ranks import Ranks  # noqa: E402
from parastep.diffusers.remote.groups import Group  # noqa: E402

CASE = tiny.CASES["sd"]


def check_parallel(pipe: Any) -> None:
    with no_warnings():
        assert torch.equal(tiny.run(pipe, CASE.kwargs(steps=6)), own("sd", 6).result)
    assert pipe.report.evaluations == [6, 5, 4] and not pipe.report.failures


def through_torch(value: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
    "torch": through_torch,
}


@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("name", COPIES)
def test_a_copy_has_ranks_of_its_own(name: str, called: bool) -> None:
    together = parallel(CASE.build(), 3)
    if called:
        check_parallel(together)
    other = COPIES[name](together)
    assert type(other) is parastep.ParallelPipeline and other.pipe is not together.pipe
    assert (other.pipe.unet is together.pipe.unet) == (name == "copy")
    together.close()
    check_parallel(other)
    other.guidance = 3
    assert not hasattr(together.pipe, "guidance")


def test_a_copy_with_workers() -> None:
    with parallel(CASE.build(), 2, mode="processes") as together:
        with no_warnings(), copy.deepcopy(together) as other:
            for each in (together, other):
                assert torch.equal(tiny.run(each, CASE.kwargs(steps=6)), own("sd", 6).result)
                assert each.report.transports == ["", "host"]


def test_a_group_says_why_it_is_not_copied() -> None:
    ranks = Ranks([torch.device("cpu")] * 2, Group(0, 2, pytest.fail))
    with pytest.raises(parastep.UnsupportedError, match=r"take `\.pipe`"):
        copy.deepcopy(ranks)


def test_parallelize_twice() -> None:
    first = parallel(host("sd"), 2)
    second = parastep.parallelize(first, devices(3), tolerance="rehearse", max_stride=1)
    assert second.pipe is host("sd")
    first.close()
    check_parallel(second)


def test_pipelines_made_from_it() -> None:
    """As diffusers has them: of the pipeline's components, and untouched."""
    together = parallel(CASE.build(), 3)
    assert isinstance(together, diffusers.StableDiffusionPipeline)
    assert isinstance(together, parastep.ParallelPipeline)
    for made in (
        diffusers.AutoPipelineForImage2Image.from_pipe(together),
        diffusers.StableDiffusionImg2ImgPipeline.from_pipe(together),
        diffusers.AutoPipelineForText2Image.from_pipe(together),
        together.from_pipe(together),
    ):
        assert isinstance(made, diffusers.DiffusionPipeline) and made.unet is together.unet
        assert not isinstance(made, parastep.ParallelPipeline)
    check_parallel(together)


def test_a_modular_pipeline_shows_one_bar(capfd: pytest.CaptureFixture[str]) -> None:
    modular = pytest.importorskip("diffusers.modular_pipelines.stable_diffusion_xl")
    parts = tiny.CASES["sdxl"].build().components
    names = ("vae", "unet", "scheduler")
    texts = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    pipe = modular.StableDiffusionXLAutoBlocks().init_pipeline()
    pipe.update_components(**{name: parts[name] for name in (*names, *texts)})

    def run(pipe: Any) -> tuple[Any, int]:
        capfd.readouterr()
        generator = torch.Generator().manual_seed(0)
        size = {"height": 32, "width": 32, "num_inference_steps": 6}
        result = pipe(prompt="a red cat", **size, generator=generator, output="latents")
        return result, capfd.readouterr().err.count(" 0/6")

    alone, bars = run(pipe)
    together = parallel(pipe, 3)
    with no_warnings():
        result, shown = run(together)
    assert torch.equal(result, alone) and (bars, shown) == (1, 1)
    assert together.report.evaluations == [6, 5, 4]
