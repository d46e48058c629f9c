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
from dataclasses import dataclass
from pathlib import Path

from urform.publishing.verification import link_packages

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
        command = [sys.executable, "-c", _ZYGOTE, "installed"]
        if bare:
            start = f"import sys; sys.path.append({str(link_packages(home / 'packages'))!r})\n"
            command = [sys.executable, "-I", "-S", "-X", "utf8", "-c", start + _ZYGOTE, "bare"]
        self.home = home
        self.process = subprocess.Popen(
            command, cwd=home, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )

    def run(self, code: str, **env: str) -> Done:
        """Run a script in a child with more environment variables, in a folder of its own."""
        assert self.process.stdin is not None and self.process.stdout is not None
        folder = tempfile.mkdtemp(dir=self.home)
        job = {"code": code, "env": env, "cwd": folder, "output": f"{folder}/output.txt"}
        if not hasattr(self, "ready"):
            self.ready = self.process.stdout.readline()
            assert self.ready == "ready\n", self.ready
        self.process.stdin.write(json.dumps(job) + "\n")
        status = int(self.process.stdout.readline())
        return Done(status, Path(folder, "output.txt").read_text(encoding="utf-8", errors="replace"))

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)
