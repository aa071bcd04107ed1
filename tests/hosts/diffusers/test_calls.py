"""Calls of a parallel pipeline one after another: other arguments, generators, dtypes, schedulers'
settings, second loops.
"""

from __future__ import annotations

import math
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
diffusers = pytest.importorskip("diffusers")

import tiny  # noqa: E402
from hosting import (  # noqa: E402
    attributes,
    caught,
    distance,
    frozen,
    host,
    no_warnings,
    parallel,
    rounds_without_limit,
    set_options,
)

Kwargs = dict[str, Any]


def both(name: str, kwargs: Kwargs, again: Kwargs, **options: Any) -> Any:
    """Runs a call untouched and in parallel, which must agree in every bit; returns the report."""
    pipe = host(name)
    alone = tiny.run(pipe, kwargs)
    state = frozen(pipe.scheduler)
    with no_warnings():
        together = parallel(pipe, **options)
        result = tiny.run(together, again)
    assert torch.equal(result, alone)
    assert frozen(pipe.scheduler) == state
    return together.report


def test_calls_in_a_row() -> None:
    """Nothing of a call reaches the next: another seed, length, prompt, batch, the first again."""
    case, pipe = tiny.CASES["sd"], host("sd")
    tiny.run(pipe, case.kwargs(steps=1))
    together, before = parallel(pipe, 3), attributes(pipe)
    changes: list[Kwargs] = [
        {"steps": 5},
        {"steps": 7, "seed": 1},
        {"steps": 5, "batch": 2, "cond": 1},
        {"steps": 1},
        {"steps": 2},
        {"steps": 4, "guidance_scale": 1.0},
        {"steps": 4, "num_images_per_prompt": 2},
        {"steps": 4, "height": 16, "width": 48},
        {"steps": 5},
    ]
    replicas = []
    for change in changes:
        with no_warnings():
            result = tiny.run(together, case.kwargs(**change))
        assert attributes(pipe) == before
        alone = tiny.run(pipe, case.kwargs(**change))  # the pipe is usable by itself meanwhile
        assert torch.equal(result, alone), change
        n = change["steps"]
        assert together.report.rounds == n
        if n > 1:
            assert together.report.evaluations == [max(n - rank, 1) for rank in range(3)]
        else:  # there is no run: a follower may be at its first evaluation, or not there yet
            assert together.report.evaluations[0] == 1
            assert max(together.report.evaluations) == 1
        replicas.append(together._ranks._replicas[1])
    assert all(replica is replicas[0] for replica in replicas)


@pytest.mark.parametrize("name", sorted(tiny.CASES))
def test_replicas_serve_many_calls(name: str) -> None:
    """What a call leaves in the modules does not count as a change of weights."""
    case, together = tiny.CASES[name], parallel(host(name), 2, math.inf)
    kept = []
    for _ in range(3):
        tiny.run(together, case.kwargs(steps=2))
        kept.append(together._ranks._replicas[1])
    assert kept[1] is kept[2]


def test_global_generator() -> None:
    """Without a generator of its own a call draws from torch's, and leaves it as it would."""
    case, pipe = tiny.CASES["sd"], host("sd")
    outputs, states = [], []
    stochastic = diffusers.EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)
    for scheduler in (pipe.scheduler, stochastic):
        pipe.scheduler, kept = scheduler, pipe.scheduler
        try:
            for called in (pipe, parallel(pipe, 3), parallel(pipe, 3, math.inf)):
                torch.manual_seed(5)
                outputs.append(tiny.run(called, case.kwargs(steps=6, generator=None)))
                states.append(torch.get_rng_state())
        finally:
            pipe.scheduler = kept
        alone, exact, fast = outputs[-3:]
        assert torch.equal(exact, alone) and distance(fast, alone) < 0.5
        assert called.report.rounds == rounds_without_limit(6, 3)
        assert torch.equal(states[-3], states[-2]) and torch.equal(states[-3], states[-1])


@pytest.mark.parametrize("name", ["svd", "sdxl_img2img", "sd_inpaint9"])
def test_draws_before_the_loop_from_the_global_generator(name: str) -> None:
    """Noise for a picture is conditioning: followers must draw the leader's, or they are lost."""
    case, results = tiny.CASES[name], []
    for called in (host(name), parallel(host(name), 2), parallel(host(name), 2, math.inf)):
        torch.manual_seed(5)
        with no_warnings():
            results.append(tiny.run(called, case.kwargs(steps=4, generator=None)))
        results.append(torch.get_rng_state())
    assert torch.equal(results[0], results[2]) and torch.equal(results[1], results[3])
    assert torch.equal(results[1], results[5]) and distance(results[4], results[0]) < 0.5


def test_list_of_generators() -> None:
    case = tiny.CASES["sd"]

    def kwargs() -> Kwargs:
        generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
        return case.kwargs(steps=6, batch=2, generator=generators)

    report = both("sd", kwargs(), kwargs(), ranks=3)
    assert report.rounds == 6


def test_arguments_stay_the_callers_own() -> None:
    """Followers work on copies: a pipeline may edit what it is given."""
    case, pipe = tiny.CASES["sd"], host("sd")
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(2))
    kept, settings = latents.clone(), {"scale": 1.0}
    kwargs = case.kwargs(steps=4, latents=latents, cross_attention_kwargs=settings)
    result = tiny.run(parallel(pipe, 3), kwargs)
    assert torch.equal(result, tiny.run(pipe, kwargs))
    assert torch.equal(latents, kept) and settings == {"scale": 1.0}


def test_pictures_from_files(tmp_path: Any) -> None:
    """A picture is read when first used, which must not happen in several threads at once."""
    image = pytest.importorskip("PIL.Image")
    case, path = tiny.CASES["sd_img2img"], tmp_path / "a.png"
    pixels = tiny.picture("file", 0, 32, 32, 3).mul(255).byte().numpy()
    image.fromarray(pixels).save(path)
    report = both(
        "sd_img2img",
        case.kwargs(steps=8, image=image.open(path)),
        case.kwargs(steps=8, image=image.open(path)),
    )
    assert report.rounds == 6


def test_argument_that_can_be_read_once_runs_serially() -> None:
    case, pipe = tiny.CASES["sd"], host("sd")
    alone = tiny.run(pipe, case.kwargs(steps=3))
    together = parallel(pipe, 2)
    with caught() as texts:
        sigmas = iter([3.0, 2.0, 1.0])
        with pytest.raises(ValueError, match="timesteps|sigmas"):  # DDIM takes neither
            tiny.run(together, case.kwargs(sigmas=sigmas))
    assert not texts and "only once" in together.report.fallback
    assert torch.equal(tiny.run(together, case.kwargs(steps=3)), alone)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "name", ["sd", "cogvideox_ddim", "wan", "hunyuanvideo", "mochi", "flux", "latte", "ltx"]
)
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    case = tiny.CASES[name]
    pipe = case.build(dtype=dtype)
    try:
        alone = tiny.run(pipe, case.kwargs(dtype=dtype))
    except RuntimeError as error:
        pytest.skip(f"the pipeline itself cannot: {error}")
    if not alone.isfinite().all():
        pytest.skip("the pipeline itself overflows")
    with no_warnings():
        together = parallel(pipe, 3)
        assert torch.equal(tiny.run(together, case.kwargs(dtype=dtype)), alone)
        assert together.report.rounds == case.steps
        together = parallel(pipe, 3, math.inf)
        result = tiny.run(together, case.kwargs(dtype=dtype))
        assert together.report.rounds == rounds_without_limit(case.steps, 3)
    assert distance(result, alone) < 0.4


def test_inference_mode_and_autocast() -> None:
    case, pipe = tiny.CASES["sd"], host("sd")
    for context in (torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)):
        with context:
            alone = tiny.run(pipe, case.kwargs(steps=5))
            together = parallel(pipe, 3)
            with no_warnings():
                result = tiny.run(together, case.kwargs(steps=5))
        assert torch.equal(result, alone)
        assert together.report.evaluations == [5, 4, 3]


@pytest.mark.parametrize("name", ["sd", "svd", "flux", "audioldm2", "wan"])
def test_tuple_as_output(name: str) -> None:
    case = tiny.CASES[name]
    both(name, case.kwargs(steps=3, return_dict=False), case.kwargs(steps=3, return_dict=False))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("sd", {"guidance_rescale": 0.7, "eta": 0.5}),
        ("sd", {"timesteps": [900, 600, 300, 20], "steps": None}),
        ("sdxl", {"denoising_end": 0.6, "guidance_rescale": 0.5, "original_size": (16, 16)}),
        ("sdxl_img2img", {"denoising_start": 0.4, "denoising_end": 0.8, "strength": None}),
        ("cogvideox_ddim", {"use_dynamic_cfg": True}),
        ("flux", {"sigmas": [1.0, 0.8, 0.5, 0.2], "steps": None}),
        ("sd_controlnet", {"control_guidance_start": 0.2, "control_guidance_end": 0.6}),
        ("sd_controlnet", {"guess_mode": True, "guidance_scale": 3.0}),
        ("latte", {"eta": 0.3}),
        ("animatediff", {"num_videos_per_prompt": 2}),
        ("svd", {"decode_chunk_size": 1, "num_videos_per_prompt": 2}),
        ("wan22", {"guidance_scale_2": 2.0}),
    ],
)
def test_arguments_of_pipelines(name: str, change: Kwargs) -> None:
    case, pipe = tiny.CASES[name], host(name)
    change = {"steps": 6, **change}

    def kwargs() -> Kwargs:
        made = case.kwargs(**change)
        return {k: v for k, v in made.items() if v is not None or k == "negative_prompt"}

    if name == "sd" and "timesteps" in change:
        pipe = case.build(scheduler=diffusers.EulerDiscreteScheduler)
    alone, together = tiny.run(pipe, kwargs()), parallel(pipe, 3)
    with no_warnings():
        result = tiny.run(together, kwargs())
    assert torch.equal(result, alone) and together.report.rounds == together.report.steps
    set_options(together, tolerance=math.inf)
    with no_warnings():
        result = tiny.run(together, kwargs())
    assert together.report.rounds == rounds_without_limit(together.report.steps, 3)
    assert distance(result, alone) < 0.5


def test_second_sampling_loop_in_a_call() -> None:
    """FreeInit samples several times, each time with as many steps as it likes."""
    case = tiny.CASES["animatediff"]
    pipe = case.build()
    pipe.enable_free_init(num_iters=2, use_fast_sampling=True)
    alone = tiny.run(pipe, case.kwargs(steps=6))
    for tolerance in (0.0, math.inf):
        together = parallel(pipe, 3, tolerance)
        for _ in range(3):
            with no_warnings():
                result = tiny.run(together, case.kwargs(steps=6))
            report = together.report
            if tolerance == 0:
                assert torch.equal(result, alone) and report.rounds == report.steps
                assert report.evaluations[1] == report.steps - 2
            else:
                assert result.isfinite().all() and report.rounds < report.steps - 2


def test_pipeline_in_a_pipeline() -> None:
    """Kandinsky's combined pipeline: the prior's own loop is conditioning, like an encoder."""
    parts, tokenizer = host("kandinsky").components, tiny.clip_tokenizer()
    pipe = diffusers.KandinskyV22CombinedPipeline(
        **parts,
        prior_prior=tiny.net(
            diffusers.PriorTransformer,
            num_attention_heads=2,
            attention_head_dim=16,
            embedding_dim=32,
            num_embeddings=tokenizer.model_max_length,
            num_layers=1,
        ),
        prior_image_encoder=tiny.clip_vision(),
        prior_text_encoder=tiny.clip_text(tokenizer, projection=True),
        prior_tokenizer=tokenizer,
        prior_scheduler=diffusers.UnCLIPScheduler(
            variance_type="fixed_small_log", prediction_type="sample", num_train_timesteps=1000
        ),
        prior_image_processor=tiny.clip_processor(),
    )
    pipe.set_progress_bar_config(disable=True)

    def kwargs() -> Kwargs:
        sizes = {"height": 32, "width": 32, "prior_num_inference_steps": 3, "output_type": "latent"}
        generator = torch.Generator().manual_seed(1)
        return {"prompt": "a", "num_inference_steps": 9, "generator": generator, **sizes}

    alone = tiny.run(pipe, kwargs())
    for tolerance in (0.0, math.inf):
        together = parallel(pipe, 4, tolerance)
        with tiny.count_forwards(pipe.prior_prior) as prior, no_warnings():
            result = tiny.run(together, kwargs())
        assert prior.own == prior.everywhere == 3
        assert together.report.rounds == (9 if tolerance == 0 else rounds_without_limit(9, 4))
        assert torch.equal(result, alone) == (tolerance == 0)
