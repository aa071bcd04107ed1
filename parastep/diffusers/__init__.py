"""diffusers: `pipe = parastep.parallelize(pipe, devices=[...])`, then `pipe(...)` as before."""

from .pipeline import ParallelPipeline, parallelize

__all__ = ["ParallelPipeline", "parallelize"]
