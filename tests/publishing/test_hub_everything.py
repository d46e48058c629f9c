"""All architectures and heads, pushed and loaded where there is nothing but torch and transformers (slow)."""

import json
import os
import subprocess
import sys
import venv
from pathlib import Path
from types import SimpleNamespace

import pytest

from urform.configuration.heads_urform import HEADS
from urform.publishing.verification import link_packages

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
SERVED = [(auto, name, a) for auto, (name, served) in HEADS.items() for a in served]
OUTPUT = """
import json, sys, torch, transformers
out = {}
for auto, repo in json.loads(sys.argv[1]):
    model = getattr(transformers, auto).from_pretrained(repo, **OPTIONS).eval()
    ids = torch.arange(12).reshape((1, 2, 6) if "MultipleChoice" in auto else (2, 6)) + 3
    inputs = {"input_ids": ids}
    if model.config.is_encoder_decoder and auto in ("AutoModel", "AutoModelForSeq2SeqLM"):
        inputs["decoder_input_ids"] = ids.flip(-1)
    with torch.no_grad():
        out[repo] = [type(model).__module__.partition(".")[0], model(**inputs)[0].double().flatten().tolist()]
    if model.can_generate():
        out[repo].append(model.generate(ids, max_new_tokens=5, do_sample=False).tolist())
print(json.dumps(out))
"""


@pytest.fixture(scope="module")
def fresh_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new virtual environment: torch, transformers and what they require, nothing else."""
    home = tmp_path_factory.mktemp("venv")
    packages = link_packages(home / "packages")
    venv.create(home / "env", with_pip=False, symlinks=True)
    (site,) = (home / "env" / "lib").glob("python*/site-packages")
    (site / "packages.pth").write_text(f"{packages}\n")
    return home / "env" / "bin" / "python"


def test_every_head_of_every_architecture(world: SimpleNamespace, fresh_python: Path, tmp_path: Path):
    jobs = [(auto, f"me/{name}-{architecture}") for auto, name, architecture in SERVED]
    world.push(f"""
from urform.hub_upload import write_bundle, upload_bundle
for _, head, architecture in {SERVED!r}:
    name = f"{{head}}-{{architecture}}"
    make(head, architecture).save_pretrained(name)
    tokenizer().save_pretrained(name)
    upload_bundle(write_bundle(name, f"bundle-{{name}}"), f"me/{{name}}")
""").ok()
    env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "PYTHON"))}
    env |= {"HF_ENDPOINT": world.hub.endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    results = []
    for python, begin in (
        (fresh_python, "OPTIONS = {'trust_remote_code': True}\n"),
        (sys.executable, "import urform\nOPTIONS = {}\n"),
    ):
        command = [str(python), "-c", begin + OUTPUT, json.dumps(jobs)]
        home = {"HF_HOME": str(tmp_path / str(len(results)))}
        done = subprocess.run(command, cwd=tmp_path, env=env | home, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        results.append(json.loads(done.stdout.splitlines()[-1]))
    without, installed = results
    assert without.keys() == installed.keys() == {repo for _, repo in jobs}
    for repo, (home, *numbers) in without.items():
        assert home == "transformers_modules" and installed[repo][0] == "urform"
        assert numbers == installed[repo][1:], repo  # bit by bit, token by token


@pytest.mark.parametrize("architecture", ["encoder", "decoder", "encoder-decoder"])
def test_the_whole_command(world: SimpleNamespace, architecture: str):
    """`urform push` with nothing left out: check, bundle, verify, upload; then the doctor."""
    head = {"encoder": "UrformForMaskedLM", "decoder": "UrformForCausalLM"}.get(
        architecture, "UrformForConditionalGeneration"
    )
    output = world.push(f"""
from typer.testing import CliRunner
from urform.cli.main import app
make({head!r}, {architecture!r}).save_pretrained("ck"); tokenizer().save_pretrained("ck")
open("card.yaml", "w").write("license: mit\\nexample: four five\\n")
options = ["--repo-id", "me/cli-{architecture}", "--private", "--card-data", "card.yaml"]
done = CliRunner().invoke(app, ["push", "ck", *options])
assert done.exit_code == 0, done.output
assert "verified: 3 snippets" in done.stderr and done.stdout.startswith("http"), done.output
done = CliRunner().invoke(app, ["doctor", "bundle", "me/cli-{architecture}"])
assert done.exit_code == 0, done.output
print(done.stdout)
""").ok()
    assert "every file is as it was published" in output
    assert world.hub.repos[f"me/cli-{architecture}"].private
    assert b"license: mit" in world.hub.read(f"me/cli-{architecture}", "README.md")
