"""A server: POST /images gives a PNG, one request after another, each on all devices.

    pip install fastapi uvicorn
    python workflows/diffusers/server.py --devices cuda:0,cuda:1
    curl -d '{"digit": 3, "seed": 1}' -H 'content-type: application/json' -o 3.png \\
      localhost:8000/images

The model is the demo's; `Painter.paint` is where yours goes. A parallel pipeline gives all devices
to each request, so that it is done sooner where two at once would only share them: requests wait in
a line, as long as --line says, and more are told to come again (503). One thread alone calls the
pipeline. Without a line of one's own, `busy="wait"` has threads that call it wait for their turn.
"""

from __future__ import annotations

import argparse
import asyncio
import concurrent.futures
import io
import threading
from typing import Any

import fastapi
import pydantic
import torch
import uvicorn
from PIL import Image

import parastep
from parastep.demo import image
from parastep.tolerance import read


class Request(pydantic.BaseModel):
    digit: int = pydantic.Field(ge=0, lt=len(image.MODEL.classes))
    seed: int = 0
    steps: int = pydantic.Field(50, ge=1, le=200)


class Painter:
    """The pipeline, the one thread that calls it, and how many may wait for it."""

    def __init__(self, devices: list[str], tolerance: Any, line: int) -> None:
        pipe = image.MODEL.load(devices[0])
        self._pipe = parastep.parallelize(pipe, devices, tolerance=tolerance, busy="raise")
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "painter")
        self._room = threading.BoundedSemaphore(line)

    async def __call__(self, request: Request) -> tuple[bytes, str]:
        """The picture as PNG, and the report in a line."""
        if not self._room.acquire(blocking=False):
            raise fastapi.HTTPException(503, "the line is full", {"Retry-After": "1"})
        work = self._thread.submit(self.paint, request)
        work.add_done_callback(lambda _: self._room.release())
        return await asyncio.wrap_future(work)  # cancelled with its request, if it still waits

    def paint(self, request: Request) -> tuple[bytes, str]:
        given = image.MODEL.arguments([request.digit], request.seed, request.steps)
        latents = self._pipe(**given)[0]
        png = io.BytesIO()
        Image.fromarray(image.to_image(latents)[0]).save(png, "PNG")
        return png.getvalue(), str(self._pipe.report)

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)
        self._pipe.close()


def application(painter: Painter) -> fastapi.FastAPI:
    app = fastapi.FastAPI()

    @app.post("/images")
    async def images(request: Request) -> fastapi.Response:
        png, report = await painter(request)
        return fastapi.Response(png, media_type="image/png", headers={"X-Report": report})

    return app


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    everything = [f"cuda:{k}" for k in range(torch.cuda.device_count())] or ["cpu"] * 4
    parser.add_argument("--devices", type=lambda text: text.split(","), default=everything)
    parser.add_argument("--tolerance", type=read, default="balanced")
    parser.add_argument("--line", type=int, default=16, help="requests in work or waiting")
    parser.add_argument("--port", type=int, default=8000)
    given = parser.parse_args()
    painter = Painter(given.devices, given.tolerance, given.line)
    try:
        uvicorn.run(application(painter), host="127.0.0.1", port=given.port)
    finally:
        painter.close()


if __name__ == "__main__":
    main()
