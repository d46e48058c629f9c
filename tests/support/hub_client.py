"""Fresh processes for the tests of the Hub that do not pay for importing torch and transformers every time.

`Client` starts one Python, with HF_ENDPOINT and an empty HF_HOME set before anything is imported; for each script it
forks a child, which is as fresh as that moment. With `bare=True` it is a Python that has torch, transformers and what
these two require, and nothing else: no Urform, no Triton, no site-packages.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from hub_server import Hub

from urform.publishing.verification import link_packages

TOKEN = "hf_" + "Canary" * 6

_ZYGOTE = """
import json, os, sys, traceback
bare = sys.argv[1] == "bare"
if not bare:
    import urform
import torch, transformers
torch.set_num_threads(1)
import transformers.modeling_utils, transformers.generation, transformers.models.auto.modeling_auto
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, GenerationMixin, TokenizersBackend
import transformers.modeling_layers, transformers.masking_utils, transformers.cache_utils
if not bare:
    urform.UrformModel, urform.UrformTokenizer
    import urform.hub_upload
    from transformers import Seq2SeqTrainer
    import urform.training.trainer
print("ready", flush=True)
for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if not child:
        status = 1
        try:
            output = os.open(job["output"], os.O_WRONLY | os.O_CREAT)
            os.dup2(output, 1)
            os.dup2(output, 2)
            os.environ.update(job["env"])
            os.chdir(job["cwd"])
            exec(compile(job["code"], "<script>", "exec"), {"__name__": "__main__"})
            status = 0
        except SystemExit as error:
            status = error.code if isinstance(error.code, int) else (0 if error.code is None else 1)
            print(error.code if isinstance(error.code, str) else "")
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""

# What most scripts begin with.
MAKE = """
import json, os, sys, torch, urform, transformers
torch.manual_seed(0)
TINY = {"vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
def make(name="UrformForCausalLM", architecture="decoder", **fields):
    return getattr(urform, name)(urform.UrformConfig(architecture=architecture, **{**TINY, **fields})).eval()
def tokenizer():
    return urform.UrformTokenizer.train(["1 2 3 four five"] * 5, vocab_size=300)
"""

# For scripts: the waits between huggingface_hub's tries take no time.
NO_WAITING = "import time\ntime.sleep = lambda seconds: None\n"


@dataclass
class Done:
    """A script that has ended: its exit code and all that it wrote."""

    returncode: int
    output: str

    def ok(self) -> str:
        """Return the output; AssertionError with it if the script failed."""
        assert self.returncode == 0, self.output
        return self.output


class Client:
    """See the module's text; `endpoint` is a Hub's address."""

    def __init__(self, endpoint: str, home: Path, bare: bool = False) -> None:
        env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "PYTHON"))}
        env |= {
            "HF_ENDPOINT": endpoint, "HF_HOME": str(home / "hf"), "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false",
        }  # fmt: skip
        home.mkdir(parents=True)
        self.home, self.bare, self.env = home, bare, env
        self.process: subprocess.Popen[str] | None = None

    def _start(self) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", _ZYGOTE, "installed"]
        if self.bare:
            start = f"import sys; sys.path.append({str(link_packages(self.home / 'packages'))!r})\n"
            command = [sys.executable, "-I", "-S", "-X", "utf8", "-c", start + _ZYGOTE, "bare"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen(command, cwd=self.home, env=self.env, text=True, bufsize=1, **pipes)
        assert self.process.stdout is not None and self.process.stdout.readline() == "ready\n"
        return self.process

    def run(self, code: str, **env: str) -> Done:
        """Run a script in a child with more environment variables, in a folder of its own."""
        process = self.process or self._start()
        assert process.stdin is not None and process.stdout is not None
        folder = tempfile.mkdtemp(dir=self.home)
        job = {"code": code, "env": env, "cwd": folder, "output": f"{folder}/output.txt"}
        process.stdin.write(json.dumps(job) + "\n")
        status = int(process.stdout.readline())
        return Done(status, Path(folder, "output.txt").read_text(encoding="utf-8", errors="replace"))

    def close(self) -> None:
        """End the process."""
        if self.process is not None:
            assert self.process.stdin is not None
            self.process.stdin.close()
            self.process.wait(timeout=60)


@contextmanager
def open_world(home: Path) -> Iterator[SimpleNamespace]:
    """A Hub with a user who may write, one who may read and a stranger; a process with Urform and one without.

    At the end, nothing that was published, printed or kept by a client may have the token in it.
    """
    with Hub() as hub:
        hub.tokens |= {TOKEN: ("me", "write"), "hf_readonly": ("me", "read"), "hf_other": ("other", "write")}
        plugin, bare = Client(hub.endpoint, home / "plugin"), Client(hub.endpoint, home / "bare", bare=True)

        def push(code: str, token: str = TOKEN) -> Done:
            return plugin.run(MAKE + code, HF_TOKEN=token)

        yield SimpleNamespace(hub=hub, plugin=plugin, bare=bare, push=push, home=home)
        plugin.close()
        bare.close()
        assert not hub.errors, hub.errors
        assert not [oid for oid, content in hub.objects.items() if TOKEN.encode() in content]
        for path in home.rglob("*"):
            if path.is_file() and not path.is_symlink():
                assert TOKEN.encode() not in path.read_bytes(), path


def logits(auto: str, repo: str, options: str = "") -> str:
    """A script that prints, as JSON, where a model's class comes from and its outputs for fixed ids."""
    return f"""
import torch, json, transformers
model = transformers.{auto}.from_pretrained({repo!r}{options}).eval()
ids = torch.arange(12).reshape(2, 6) + 3
with torch.no_grad():
    out = model(input_ids=ids)[0]
print(json.dumps([type(model).__module__.partition(".")[0], out.double().flatten().tolist()]))
"""


def last_line(text: str):
    """The JSON in the last line of an output."""
    return json.loads(text.strip().splitlines()[-1])
