"""The examples of eSurge's documentation about its API server and monitoring, run as they are written there,
but for their imports, their model and their ports, which are any free ones.

The server runs in a process of its own, as its users have it, and ends by a signal.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.tiny_model import make_tiny_checkpoint

pytest.importorskip("fastapi", reason="the extra `server` is not installed")
pytest.importorskip("engine.server", reason="the server is not there")
openai = pytest.importorskip("openai", reason="the extra `test` is not installed")

SCRIPT = """
import sys

from transformers import AutoTokenizer

import engine as ed
from engine import checkpoints

model_id = sys.argv[1]
tokenizer = AutoTokenizer.from_pretrained(model_id)
tokenizer.pad_token_id = tokenizer.eos_token_id
model = checkpoints.load(model_id, dtype="float32")

# Initialize engine (as shown above)
engine = ed.eSurge(
    model=model, tokenizer=tokenizer, max_model_len=512, max_num_seqs=8, page_size=64, compile_runner=False
)

# Start monitoring (optional)
engine.start_monitoring(prometheus_port=0)

# Launch API server (API keys optional)
server = ed.eSurgeApiServer(
    engine,
    require_api_key=True,                 # Optional: enforce keys at runtime
    api_keys={"demo-key": {"label": "UI"}},  # Pre-provisioned keys
)

# Additional keys can be issued programmatically
print("Generated key:", server.generate_api_key(label="notebook"), flush=True)
print("Monitor's key:", server.generate_api_key(label="prometheus", role="monitor"), flush=True)

server.fire(host="0.0.0.0", port=0, on_ready=lambda url: print("Ready:", url, flush=True))
"""


@dataclass(frozen=True)
class Running:
    url: str
    generated_key: str
    monitor_key: str
    process: subprocess.Popen[str]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("served")
    shape = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = make_tiny_checkpoint(folder / "model", tie_word_embeddings=False, **shape)
    script = folder / "serve.py"
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), model]
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        told = {}
        while len(told) < 3 and (line := process.stdout.readline()):
            name, _, value = line.partition(": ")
            told[name] = value.strip()
        assert "Ready" in told, "the script ended before it was ready"
        url = told["Ready"].replace("0.0.0.0", "127.0.0.1")
        yield Running(url, told["Generated key"], told["Monitor's key"], process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) in (0, -signal.SIGTERM)
    finally:
        process.kill()
        process.communicate()


def test_using_the_api(server: Running, capsys: pytest.CaptureFixture[str]):
    client = openai.OpenAI(
        base_url=f"{server.url}/v1",
        api_key="demo-key",  # Matches the key configured on the server
    )

    response = client.chat.completions.create(
        model="default",
        messages=[{"role": "user", "content": "Hello, how are you?"}],
        temperature=0.7,
        max_tokens=100,
        stream=True,  # Streaming is supported
        seed=3,
    )

    finish_reason = None
    for chunk in response:
        print(chunk.choices[0].delta.content or "", end="")
        finish_reason = chunk.choices[0].finish_reason
    assert finish_reason in ("stop", "length")
    # How many tokens a chunk carries is a matter of time, and without a seed a random model may stop at its
    # first token: what holds is that the parts make up the answer.
    whole = client.chat.completions.create(
        model="default",
        messages=[{"role": "user", "content": "Hello, how are you?"}],
        temperature=0.7,
        max_tokens=100,
        seed=3,
    )
    assert capsys.readouterr().out == whole.choices[0].message.content != ""


def test_keys_by_each_header_and_none_at_all(server: Running):
    for headers in (
        {"Authorization": "Bearer demo-key"},
        {"X-API-Key": "demo-key"},
        {"Authorization": f"Bearer {server.generated_key}"},
    ):
        assert _get(f"{server.url}/v1/models", headers) == 200
    assert _get(f"{server.url}/v1/models", {}) == 401
    assert _get(f"{server.url}/v1/models", {"X-API-Key": "another"}) == 401
    assert _get(f"{server.url}/health", {}) == 200


def test_function_calling(server: Running):
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=server.generated_key)
    schema = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    answer = client.chat.completions.create(
        model="default",
        messages=[{"role": "user", "content": "What's the weather?"}],
        functions=[{"name": "weather", "parameters": schema}],  # OpenAI function schema
        function_call="auto",
        max_tokens=8,
    )
    assert answer.choices[0].message.role == "assistant"
    assert answer.usage.completion_tokens <= 8


def test_metrics_tell_each_keys_usage(server: Running):
    request = urllib.request.Request(f"{server.url}/metrics", headers={"X-API-Key": server.monitor_key})
    with urllib.request.urlopen(request) as answer:
        text = answer.read().decode()
    assert 'tidemill_api_key_prompt_tokens_total{key="' in text
    assert 'label="UI"' in text
    assert "demo-key" not in text


def test_console_monitoring(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    import engine as ed
    from engine import checkpoints
    from engine.monitoring import console

    model = checkpoints.load(make_tiny_checkpoint(tmp_path / "model", num_hidden_layers=1))
    engine = ed.eSurge(
        model=model, max_model_len=128, max_num_seqs=4, max_num_batched_tokens=16, compile_runner=False
    )
    assert console.LINE_SECONDS > 0

    # Start Prometheus exporter and console monitor
    monitoring = engine.start_monitoring(enable_console=True, prometheus_port=0)
    try:
        engine.generate("the answer", sampling_params=ed.SamplingParams(max_tokens=8, ignore_eos=True))
        with urllib.request.urlopen(monitoring.urls["prometheus"]) as answer:
            text = answer.read().decode()
    finally:
        engine.stop_monitoring()
    assert 'tidemill_tokens_generated_total{engine="model"} 8.0' in text
    assert "tok" in capsys.readouterr().err


def _get(url: str, headers: dict[str, str]) -> int:
    request = urllib.request.Request(url, headers=headers)
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code
