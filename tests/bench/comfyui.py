"""ComfyUI's samplers on the trained demo models: rounds and distance; what the node costs.

    COMFYUI_PATH=... python tests/bench/comfyui.py [--models image video sound] [--seeds 1]
        [--steps 20 30 50] [--ranks 1 2 4 8] [--tolerance 0.04] [--max-stride 1] [--jobs 2]

One table a model, a line for each sampler and number of steps, with the untouched sampler's model
calls. A cell has the rounds, and the relative L2 distance of the final latents to those of the
untouched sampler, if there is any, the mean over seeds. Guidance is the demo's own. Runs in the
host's own code, on the CPU, a model in a process; what one rank costs, and the time of a graph on
the real server, is measured alone, before.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

from _table import verdict

from parastep.tolerance import NAMES

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "support"))

SAMPLERS = ("euler", "dpmpp_2m", "dpmpp_2m_sde", "heun", "uni_pc", "euler_ancestral")
MODELS = {  # the kind of the tests' loader, and the schedule that its users would choose
    "image": ("demo", "karras"),
    "video": ("demo_video", "sgm_uniform"),
    "sound": ("demo_sound", "simple"),
}


def load() -> None:
    import torch

    torch.set_num_threads(1)
    import inprocess

    from parastep import demo

    # Before there are stand-ins for missing packages, of which transformers would take notice.
    for name in demo.NAMES:
        demo.load(name).load()
    inprocess.load_host()
    logging.disable(logging.WARNING)


def cell(model: Any, own: Any, runs: list[dict[str, Any]], options: dict[str, Any]) -> str:
    """Rounds and distance of these runs of a patched model; `own` are the untouched results."""
    import inprocess

    from parastep.comfy.node import of_model, patch

    ours = patch(model, ["cpu"] * options["ranks"], **options["patch"])
    rounds, distances = [], []
    for stock, given in zip(own, runs):
        found = inprocess.sample(ours, **given)
        report = of_model(ours).report
        rounds.append(report.rounds)
        distances.append(float((found - stock).norm() / stock.norm()))
    told = f"{statistics.mean(rounds):.3g}"
    return f"{told}, {statistics.mean(distances):.2g}" if any(distances) else told


def table(name: str, given: argparse.Namespace) -> str:
    """In a process of its own."""
    load()
    import inprocess
    from tiny_pack import models

    from parastep import demo

    kind, scheduler = MODELS[name]
    model, trained = models.build(kind), demo.load(name)
    heads = [f"{ranks} ranks" if ranks > 1 else "1 device" for ranks in given.ranks]
    lines = [f"| {name}, {scheduler} | " + " | ".join(heads) + " |"]
    lines.append("|---" * (1 + len(heads)) + "|")
    for sampler in SAMPLERS:
        for steps in given.steps:
            runs = [
                {
                    "kind": kind,
                    "sampler": sampler,
                    "scheduler": scheduler,
                    "steps": steps,
                    "seed": seed,
                    "cfg": trained.guidance,
                    "positive": models.conditioning(kind, seed % 10),
                    "negative": models.conditioning(kind, -1),
                }
                for seed in range(given.seeds)
            ]
            calls: list[int] = []
            own = [counted(model, run, calls) for run in runs]
            patch = {"tolerance": given.tolerance, "max_stride": given.max_stride}
            cells = [cell(model, own, runs, {"ranks": r, "patch": patch}) for r in given.ranks]
            lines.append(f"| {sampler}, {steps}: {calls[0]} | " + " | ".join(cells) + " |")
            print(lines[-1], file=sys.stderr, flush=True)
    return f"ComfyUI {inprocess.version()}, tolerance {given.tolerance}\n" + "\n".join(lines)


def counted(model: Any, run: dict[str, Any], calls: list[int]) -> Any:
    """The untouched sampler's result; `calls` gets the model calls that it takes."""
    import inprocess

    made = model.clone()
    count = 0

    def count_one(given: dict[str, Any]) -> Any:
        nonlocal count
        count += 1
        return given["denoised"]

    made.set_model_sampler_post_cfg_function(count_one)
    result = inprocess.sample(made, **run)
    calls.append(count)
    return result


def cost_of_one_rank(repeats: int) -> str:
    """What the node adds with one rank where every step is evaluated, a denoiser that waits 20 ms:
    wall time over that without, and CPU time, which another's work on the machine disturbs less.
    """
    load()
    import inprocess
    from tiny_pack import models

    from parastep.comfy.node import patch

    steps, wait = 20, 20.0
    model = models.build("eps", slow_ms=wait)
    stock = "without"
    ways = {
        stock: model,
        "max_stride 1": patch(model, ["cpu"], max_stride=1),
        "strided": patch(model, ["cpu"], tolerance=1e-9),
    }
    spent: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for repeat in range(-1, repeats):
        for name in list(ways)[:: 1 - 2 * (repeat % 2)]:
            began = time.perf_counter(), time.thread_time()
            inprocess.sample(ways[name], "eps", steps=steps)
            ended = time.perf_counter(), time.thread_time()
            if repeat >= 0:  # the first round is a warm-up
                spent[name].append((ended[0] - began[0], ended[1] - began[1]))
    own = statistics.median(1e3 * cpu / steps for _, cpu in spent[stock])
    lines = [
        f"one rank, {steps} steps of {wait:g} ms and {own:.2f} ms of CPU, {repeats} repetitions"
    ]
    for name in list(ways)[1:]:
        pairs = list(zip(spent[name], spent[stock]))
        ratios = [with_node[0] / without[0] for with_node, without in pairs]
        error = 1.25 * statistics.stdev(ratios) / len(ratios) ** 0.5  # of a median
        cpu = statistics.median(1e3 * (w[1] - o[1]) / steps for w, o in pairs)
        lines.append(
            f"{name}: wall {statistics.median(ratios):.4f} +- {error:.4f} of that without, "
            f"CPU {cpu:.3f} ms more a step ({100 * cpu / wait:.2f} %)"
        )
    return "\n".join(lines)


Ways = dict[str, dict[str, Any] | None]  # inputs of the node, None without one


def timed(
    ways: Ways, repeats: int, of: Callable[[list[float]], float] = statistics.median, **given: Any
) -> tuple[dict[str, float], dict[str, int]]:
    """Seconds of a prompt on the real server, one of `repeats` figures, and its rounds; `given` are
    of `comfy_graphs.basic`.
    """
    import comfy_graphs as graphs
    import comfy_server

    seconds: dict[str, list[float]] = {name: [] for name in ways}
    rounds = dict.fromkeys(ways, given["steps"])
    with tempfile.TemporaryDirectory() as folder:
        server = comfy_server.Server(pathlib.Path(folder))
        try:
            server.wait()
            for repeat in range(-1, repeats):  # each with a seed of its own; the first is a warm-up
                order = list(ways)[repeat % len(ways) :] + list(ways)[: repeat % len(ways)]
                # Another each time: the host collects garbage every 10 s, and a way has its
                # replicas loaded where the one before it had them too.
                for name in order[:: 1 - 2 * (repeat % 2)]:
                    node = ways[name]
                    graph = graphs.basic("flow", seed=repeat + 2, scheduler="simple", **given)
                    if node is not None:  # a report draws a picture: only where none is timed
                        graph = graphs.insert(graph, node, report=repeat < 0)
                    began = time.perf_counter()
                    outputs = server.run(graph).outputs
                    if repeat >= 0:
                        seconds[name].append(time.perf_counter() - began)
                    elif node is not None:
                        rounds[name] = int(outputs["words"]["text"][0].split()[3])
        finally:
            server.stop()
    return {name: of(each) for name, each in seconds.items()}, rounds


def told(took: dict[str, float], rounds: dict[str, int]) -> str:
    return ", ".join(f"{name} {took[name]:.2f} s ({rounds[name]} rounds)" for name in took)


def wall_of_graphs(repeats: int) -> str:
    """A denoiser that waits as long for a batch as for one item."""
    steps, wait = 30, 100.0
    ways: Ways = {"without": None}
    for count in (1, 2, 4):
        name = f"{count} rank{'s' * (count > 1)}"
        ways[name] = {"quality": "balanced", "devices": "cpu " * count}
    text = told(*timed(ways, repeats, steps=steps, slow_ms=wait))
    return f"a graph, euler, {steps} steps of {wait:g} ms, {repeats} times: {text}"


def wall_of_pairs(repeats: int) -> str:
    """A denoiser that waits for each item of its batch: guidance makes two of them at cfg 7. Of
    each the quickest counts, as other work on the machine only ever lengthens a run.
    """
    steps, wait = 20, 100.0
    places = {
        "1 device": "cpu",
        "a pair": "cpu+cpu:1",
        "2 ranks": "cpu, cpu:1",
        "2 pairs": "cpu+cpu:1, cpu:2+cpu:3",
    }
    ways: Ways = {name: {"quality": "balanced", "devices": text} for name, text in places.items()}
    lines = [f"a graph, euler, {steps} steps of {wait:g} ms an item, {repeats} times"]
    for cfg in (7.0, 1.0):
        took, rounds = timed(
            {"without": None, **ways}, repeats, min, steps=steps, item_ms=wait, cfg=cfg
        )
        lines.append(f"cfg {cfg:g}: {told(took, rounds)}")
        for whole, split, target in (
            ("1 device", "a pair", 1.6 if cfg > 1 else 1.0),
            ("2 ranks", "2 pairs", 1.0),
            ("2 ranks", "a pair", 1.0),
        ):
            ratio = took[whole] / took[split]
            words = verdict(ratio, target, least=True)
            lines.append(f"  {split} : {whole}: {ratio:.2f}, target {target:g}: {words}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, nargs="+", default=[20, 30, 50])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--tolerance", type=float, default=NAMES["balanced"])
    parser.add_argument("--max-stride", type=int, help="1: every step is evaluated by some rank")
    parser.add_argument("--jobs", type=int, default=2, help="models at a time")
    parser.add_argument("--repeats", type=int, default=9, help="of the times; 0: none")
    given = parser.parse_args()

    import comfy_server

    if comfy_server.PATH is None:
        print("left out: COMFYUI_PATH names no checkout of ComfyUI")
        return
    with multiprocessing.get_context("spawn").Pool(given.jobs, maxtasksperchild=1) as pool:
        if given.repeats:
            print(pool.apply(cost_of_one_rank, (given.repeats,)), flush=True)
            print(wall_of_graphs(given.repeats), flush=True)
            print(wall_of_pairs(given.repeats), flush=True)
        for text in pool.starmap(table, [(name, given) for name in given.models], chunksize=1):
            print("\n" + text, flush=True)


if __name__ == "__main__":
    main()
