"""The server of workflows/diffusers, as a process, with requests that come at once."""

from __future__ import annotations

import concurrent.futures
import io
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
Image = pytest.importorskip("PIL.Image")

from parastep.demo import image  # noqa: E402

SCRIPT = pathlib.Path(__file__).parents[3] / "workflows" / "diffusers" / "server.py"
STEPS, LINE = 12, 3

torch.set_num_threads(1)  # as in the server, for its bits


@pytest.fixture(params=["rehearse", "balanced"])
def address(request):
    """Where a server listens, on a port that was free."""
    options = ("--port", "0", "--line", str(LINE), "--tolerance", request.param)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), *options, "--devices", "cpu,cpu,cpu"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as server:
        lines = []
        for line in server.stderr:
            lines.append(line)
            found = re.search(r"running on (http://127\.0\.0\.1:\d+)", line)
            if found:
                break
        else:
            pytest.fail("".join(lines))
        yield found[1], request.param
        server.send_signal(signal.SIGINT)
        server.communicate(timeout=60)
    assert server.returncode in (0, -signal.SIGINT)


def post(address, **request):
    """(status, headers, body)"""
    body = json.dumps(request).encode()
    headers = {"content-type": "application/json"}
    asked = urllib.request.Request(f"{address}/images", body, headers)
    try:
        with urllib.request.urlopen(asked, timeout=120) as answer:
            return answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read()


def expected(digit, seed):
    pipe = image.MODEL.load()
    latents = pipe(**image.MODEL.arguments([digit], seed, STEPS))[0]
    return image.to_image(latents)[0]


def test_requests_at_once(address):
    """Each gets its own picture, from all ranks; more than fit into the line are told so."""
    where, tolerance = address
    asked = [(digit, digit) for digit in range(LINE)]
    with concurrent.futures.ThreadPoolExecutor(LINE) as pool:
        answers = list(pool.map(lambda a: post(where, digit=a[0], seed=a[1], steps=STEPS), asked))
    for (digit, seed), (status, headers, body) in zip(asked, answers):
        assert status == 200 and "on 3 ranks" in headers["X-Report"], body
        assert "serial" not in headers["X-Report"] and "in use" not in headers["X-Report"]
        found = torch.from_numpy(np.array(Image.open(io.BytesIO(body)))).float()
        right = torch.from_numpy(expected(digit, seed)).float()
        off = float((found - right).abs().max())
        assert off == 0 if tolerance == "rehearse" else off < 64
    with concurrent.futures.ThreadPoolExecutor(4 * LINE) as pool:
        many = list(pool.map(lambda k: post(where, digit=1, steps=100), range(4 * LINE)))
    codes = [status for status, _, _ in many]
    assert codes.count(200) >= LINE and set(codes) == {200, 503}
    assert all(headers["Retry-After"] for status, headers, _ in many if status == 503)
    assert post(where, digit=11)[0] == 422
    assert post(where, digit=2, steps=STEPS)[0] == 200
