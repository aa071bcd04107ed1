"""One picture, made by all ranks of a cluster together: the same script on every one of them.

    torchrun --nproc-per-node 4 generate.py --model stabilityai/stable-diffusion-xl-base-1.0

README.md beside it has the commands for several nodes, Slurm and MPI. Every process loads the
pipeline, calls it and gets the picture; process 0 leads. Nothing in the script is about ranks but
the device, and which processes are to be one.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

import diffusers
import torch

import parastep
from parastep.tolerance import read


def local_rank() -> int:
    """This process among those of its node, as torchrun, Slurm, Open MPI and MPICH tell it."""
    names = ("LOCAL_RANK", "SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID")
    return int(next((os.environ[name] for name in names if name in os.environ), "0"))


def load(model: str, device: str) -> Any:
    dtype = torch.float16 if device.startswith("cuda") else torch.float32
    pipe = diffusers.DiffusionPipeline.from_pretrained(model, torch_dtype=dtype)
    return pipe.to(device)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", required=True, help="a name on the hub, or a folder")
    parser.add_argument("--prompt", default="a lighthouse at dusk")
    parser.add_argument("--steps", type=int, default=50)
    about_tolerance = "a number, or a word: exact, high, balanced, fast"
    parser.add_argument("--tolerance", type=read, default="balanced", help=about_tolerance)
    parser.add_argument("--split", type=int, help="processes that share each forward of a rank")
    parser.add_argument("--context", type=int, help="processes that diffusers splits it over")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda for one GPU a rank")
    parser.add_argument("--out", default="picture.png")
    args = parser.parse_args()
    device = f"cuda:{local_rank()}" if args.device == "cuda" else args.device
    if device.startswith("cuda"):
        torch.cuda.set_device(device)  # where torch.distributed takes this process to be
    pipe = load(args.model, device)
    if args.context is not None:
        mesh = parastep.node_mesh(args.context)
        config = diffusers.ContextParallelConfig(ulysses_degree=args.context, mesh=mesh)
        pipe.transformer.enable_parallelism(config=config)
    pipe = parastep.parallelize(pipe, split=args.split, tolerance=args.tolerance)
    generator = torch.Generator().manual_seed(0)
    image = pipe(args.prompt, num_inference_steps=args.steps, generator=generator).images[0]
    if os.environ.get("RANK", os.environ.get("PMI_RANK", "0")) == "0":
        image.save(args.out)
        print(pipe.report)


if __name__ == "__main__":
    main()
