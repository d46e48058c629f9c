"""`transformers serve` on loopback, started as docs/tools.md says, with the client of openai."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from tool_models import need, save_pair, tokenizer
from transformers import GenerationConfig

import urform

START = "import urform; from transformers.cli.transformers import app; app()"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    need("fastapi", "uvicorn", "openai")
    folder = tmp_path_factory.mktemp("serve")
    _, ours = save_pair("Llama", folder)
    settings = GenerationConfig.from_pretrained(ours)
    # Single bytes make no text that could be streamed.
    settings.suppress_tokens = [i for i in range(len(tokenizer())) if not tokenizer().decode(i).isascii()]
    settings.save_pretrained(ours)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-c", START, "serve", str(ours), "--host", "127.0.0.1", "--port", str(port)]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([*command, "--device", "cpu"], stdout=log, stderr=log)
    try:
        address = f"http://127.0.0.1:{port}"
        for _ in range(240):
            try:
                urllib.request.urlopen(f"{address}/health", timeout=2).close()
                break
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                assert process.poll() is None, (folder / "log").read_text(encoding="utf-8")
                time.sleep(0.5)
        yield address, ours
    finally:
        process.terminate()
        process.wait(timeout=30)


@pytest.mark.parametrize("stream", [False, True])
def test_chat_says_what_generate_says(served: tuple[str, Path], stream: bool):
    from openai import OpenAI

    address, folder = served
    messages = [{"role": "user", "content": "the cat sat"}]
    client = OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
    answer = client.chat.completions.create(
        model=str(folder), messages=messages, max_tokens=6, temperature=0.0, stream=stream
    )
    if stream:
        text = "".join(part.choices[0].delta.content or "" for part in answer if part.choices)
    else:
        text = answer.choices[0].message.content
    model, tokens = urform.UrformForCausalLM.from_pretrained(folder), tokenizer()
    ids = tokens.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    whole = model.generate(**ids, max_new_tokens=6, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert text and text == tokens.decode(whole, skip_special_tokens=True)
