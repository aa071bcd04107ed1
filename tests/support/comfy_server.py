"""A real ComfyUI server for the tests: headless, on the CPU, with our pack and the tests' own."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pathlib
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PATH = os.environ.get("COMFYUI_PATH")  # of a checkout
NO_HOST = "no ComfyUI checkout: set COMFYUI_PATH, and install its requirements"

Graph = dict[str, dict[str, Any]]

_EMPTY_PAGE = "<!doctype html><title>none</title>"


class PromptError(Exception):
    """A prompt that ended with an error, or was refused; `.told` is what the server said."""

    def __init__(self, told: Any) -> None:
        super().__init__(json.dumps(told)[:2000])
        self.told = told


@dataclass
class Run:
    """A prompt that has ended: its outputs by node, and what came over the websocket meanwhile."""

    outputs: dict[str, Any]
    events: list[tuple[str, Any]] = field(default_factory=list)  # ("preview", bytes) for images

    def of(self, kind: str) -> list[Any]:
        return [data for name, data in self.events if name == kind]


class Server:
    def __init__(
        self,
        base: pathlib.Path,
        arguments: tuple[str, ...] = (),
        ahead: tuple[pathlib.Path, ...] = (),
    ) -> None:
        """`ahead` are folders that its Python looks into before all others."""
        assert PATH is not None
        self.base, self.client = base, uuid.uuid4().hex
        self.url = f"127.0.0.1:{_free_port()}"
        packs = {"parastep": ROOT / "nodes", "tiny_pack": HERE / "tiny_pack"}
        (base / "custom_nodes").mkdir(parents=True, exist_ok=True)
        for name, folder in packs.items():
            (base / "custom_nodes" / name).symlink_to(folder)
        (base / "page").mkdir(exist_ok=True)
        (base / "page" / "index.html").write_text(_EMPTY_PAGE)
        page = () if "--front-end-root" in arguments else ("--front-end-root", str(base / "page"))
        self.log = base / "server.log"
        command = [sys.executable, "main.py", "--cpu", "--use-pytorch-cross-attention"]
        command += ["--base-directory", str(base)]
        command += ["--disable-all-custom-nodes", "--whitelist-custom-nodes", *packs]
        command += [
            "--disable-api-nodes",
            "--preview-method",
            "latent2rgb",
            "--database-url",
            "sqlite:///:memory:",
        ]
        command += ["--listen", "127.0.0.1", "--port", self.url.split(":")[1], *page, *arguments]
        paths = [*map(str, ahead), str(HERE / "stand_in"), str(ROOT)]
        paths.append(os.environ.get("PYTHONPATH", ""))
        one = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "MPLBACKEND": "Agg"}
        environment = {**os.environ, **one, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, cwd=PATH, env=environment, stdout=log, stderr=subprocess.STDOUT
            )

    def wait(self, seconds: float = 300.0) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if self.process.poll() is not None:
                break
            with contextlib.suppress(OSError):
                self.get("/system_stats")
                return
            time.sleep(0.2)
        raise RuntimeError(f"ComfyUI did not start:\n{self.log.read_text()[-4000:]}")

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(f"http://{self.url}{path}", timeout=30) as answer:
            return json.loads(answer.read())

    def fetch(self, path: str) -> bytes:
        with urllib.request.urlopen(f"http://{self.url}{path}", timeout=30) as answer:
            return answer.read()

    def post(self, path: str, data: Any) -> Any:
        body = json.dumps(data).encode()
        request = urllib.request.Request(f"http://{self.url}{path}", body)
        request.add_header("Content-Type", "application/json")
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return json.loads(answer.read() or b"null")
        except urllib.error.HTTPError as error:
            raise PromptError(json.loads(error.read() or b"null")) from None

    def submit(self, graph: Graph) -> str:
        return self.post("/prompt", {"prompt": graph, "client_id": self.client})["prompt_id"]

    def result(self, prompt: str, seconds: float = 120.0) -> Run:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            found = self.get(f"/history/{prompt}").get(prompt)
            if found is not None and found["status"]["completed"]:
                return Run(found["outputs"])
            if found is not None and found["status"]["status_str"] == "error":
                raise PromptError(found["status"]["messages"])
            time.sleep(0.02)
        raise TimeoutError(f"prompt {prompt}: nothing after {seconds} s")

    def run(self, graph: Graph) -> Run:
        return self.result(self.submit(graph))

    def watch(self, graph: Graph) -> Run:
        """`run` with what the websocket tells of it, in order."""
        with self.listening() as events:
            run = self.run(graph)
            until = time.monotonic() + 5
            while time.monotonic() < until and not _has_ended(events):
                time.sleep(0.01)
        run.events = events
        return run

    @contextlib.contextmanager
    def listening(self) -> Iterator[list[tuple[str, Any]]]:
        """What the websocket says to our client, from now on."""
        events: list[tuple[str, Any]] = []
        loop, opened = asyncio.new_event_loop(), threading.Event()

        async def listen() -> None:
            import aiohttp

            address = f"http://{self.url}/ws?clientId={self.client}"
            limit = 64 * 2**20
            async with (
                aiohttp.ClientSession() as session,
                session.ws_connect(address, max_msg_size=limit) as socket,
            ):
                opened.set()
                async for message in socket:
                    if message.type == aiohttp.WSMsgType.TEXT:
                        told = json.loads(message.data)
                        events.append((told["type"], told["data"]))
                    elif message.type == aiohttp.WSMsgType.BINARY:
                        events.append(("preview", message.data))

        def body() -> None:
            asyncio.set_event_loop(loop)
            with contextlib.suppress(asyncio.CancelledError):
                loop.run_until_complete(task)

        task = loop.create_task(listen())
        thread = threading.Thread(target=body, daemon=True)
        thread.start()
        try:
            if not opened.wait(60):
                raise RuntimeError("the websocket does not open")
            yield events
        finally:
            loop.call_soon_threadsafe(task.cancel)
            thread.join(10)
            loop.close()


def _has_ended(events: list[tuple[str, Any]]) -> bool:
    return any(name == "executing" and data.get("node") is None for name, data in events)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
