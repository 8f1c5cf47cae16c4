"""`jaxengine serve` as a process: it starts, answers, and drains at SIGTERM."""

import json
import pathlib
import signal
import socket
import subprocess
import sys
import time

import httpx
import pytest

ROOT = pathlib.Path(__file__).parent.parent.parent
ENGINE = ["--no-progress", "--max-model-len=512", "--max-num-seqs=8", "--num-pages=100", "--compile-patience=1000"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(client: httpx.Client, process: subprocess.Popen) -> None:
    end = time.monotonic() + 180
    while time.monotonic() < end:
        assert process.poll() is None, "the server ended"
        try:
            if client.get("/health").status_code == 200:
                return
        except httpx.ConnectError:
            time.sleep(0.1)
    raise AssertionError("the server did not come up")


@pytest.mark.slow
def test_sigterm_lets_a_stream_end_and_then_ends_the_server():
    port = free_port()
    command = [sys.executable, "-m", "jaxengine", "serve", "calc", f"--port={port}", "--api-key=k", *ENGINE]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    headers = {"Authorization": "Bearer k"}
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=600) as client:
            wait_for(client, process)
            body = dict(prompt="1+", max_tokens=400, ignore_eos=True, seed=1, stream=True, return_token_ids=True)
            with client.stream("POST", "/v1/completions", json=body) as response:
                lines = response.iter_lines()
                found = [next(lines)]
                process.send_signal(signal.SIGTERM)
                found += [line for line in lines if line]
        assert found[-1] == "data: [DONE]"
        chunks = [json.loads(line.removeprefix("data: ")) for line in found[:-1]]
        assert sum(len(choice["token_ids"]) for chunk in chunks for choice in chunk["choices"]) == 400
        assert process.wait(60) in (0, -signal.SIGTERM)
    finally:
        process.kill()
        process.communicate()


def test_without_the_extra_it_says_what_to_install():
    lines = (
        "import sys",
        "sys.modules['uvicorn'] = None",
        "from jaxengine.command.main import main",
        "sys.exit(main(['serve', 'calc']))",
    )
    code = "; ".join(lines)
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 2 and "pip install 'jaxengine[server]'" in found.stderr


def test_an_open_door_is_refused_before_a_model_is_loaded():
    command = [sys.executable, "-m", "jaxengine", "serve", "no-such-model", "--host=0.0.0.0"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 2 and "--api-key" in found.stderr
