"""Loading by name over HTTP: who runs whose code, what is refused, and the options of `from_pretrained`."""

import json
from types import SimpleNamespace

import pytest
from hub_client import TOKEN, last_line, logits

PUBLISH = """
from urform.hub_upload import write_bundle, upload_bundle
make({name!r}, {architecture!r}).save_pretrained("ck"); tokenizer().save_pretrained("ck")
bundle = write_bundle("ck", "b", {repo!r})
"""


@pytest.fixture(scope="module")
def canary(_world: SimpleNamespace) -> tuple[str, str]:
    """A repository each of whose modules leaves a file behind when it is run; and the file's name."""
    mark = _world.home / "canary.txt"
    code = PUBLISH.format(name="UrformForCausalLM", architecture="decoder", repo="me/canary")
    code += f"""
import pathlib
sing = "open({str(mark)!r}, 'a').write(__name__ + chr(10))"
for path in pathlib.Path("b").glob("*.py"):
    path.write_text(path.read_text() + sing + "\\n")
upload_bundle(bundle, "me/canary")
"""
    _world.push(code).ok()
    return "me/canary", str(mark)


def ran(world: SimpleNamespace) -> list[str]:
    """The modules of the bundle that have been run since the last question."""
    mark = world.home / "canary.txt"
    names = mark.read_text().split() if mark.exists() else []
    mark.unlink(missing_ok=True)
    return [name.rpartition(".")[2] for name in names]


LOAD_ALL = """
import transformers
for auto in ("AutoConfig", "AutoModelForCausalLM", "AutoModel", "AutoTokenizer"):
    loaded = getattr(transformers, auto).from_pretrained("me/canary"{options})
    home = type(loaded).__module__.partition(".")[0]
    assert home == {home!r}, (auto, type(loaded))
"""


@pytest.mark.parametrize("options", ["", ", trust_remote_code=False", ", trust_remote_code=True"])
def test_installed_code_wins(world: SimpleNamespace, canary: tuple[str, str], options: str):
    """Config, models and tokenizer come from the plugin, and not one line of the repository runs."""
    world.plugin.run("import urform\n" + LOAD_ALL.format(options=options, home="urform")).ok()
    assert ran(world) == []


def test_nothing_runs_unless_it_is_trusted(world: SimpleNamespace, canary: tuple[str, str]):
    for auto in ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer", "AutoModel"):
        code = f"import transformers\ntransformers.{auto}.from_pretrained('me/canary', trust_remote_code=False)"
        done = world.bare.run(code)
        assert done.returncode != 0 and "trust_remote_code=True" in done.output, (auto, done.output)
        assert ran(world) == [], auto
    world.bare.run(LOAD_ALL.format(options=", trust_remote_code=True", home="transformers_modules")).ok()
    assert {"configuration_urform", "modeling_urform", "tokenization_urform"} <= set(ran(world))


def test_versions_that_do_not_go_together_are_named(world: SimpleNamespace):
    """A second version of the package against a bundle of another: a warning with both, and only then."""
    world.push(
        PUBLISH.format(name="UrformForMaskedLM", architecture="encoder", repo="me/newer")
        + """
from urform.configuration import version_urform
version_urform.VERSION = "99.1"
model = urform.UrformForMaskedLM.from_pretrained("ck")
model.push_to_hub("me/newer")
version_urform.VERSION = "0.0.9"
model.push_to_hub("me/older")
"""
    ).ok()
    load = """
import json, warnings, urform, transformers
said = []
for name in ("me/newer", "me/older"):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = transformers.AutoModelForMaskedLM.from_pretrained(name)
    assert not hasattr(model.config, "urform_bundle")
    said.append([str(w.message) for w in caught if "urform" in str(w.message)])
print(json.dumps(said))
"""
    newer, older = last_line(world.plugin.run(load).ok())
    assert len(newer) == 1 and "urform 99.1" in newer[0] and "urform 0.1.0 is installed" in newer[0]
    assert older == []
    # The same without urform: its own code is as new as it is, and says nothing.
    out = world.bare.run(logits("AutoModelForMaskedLM", "me/newer", ", trust_remote_code=True")).ok()
    assert "installed" not in out
    report = world.plugin.run("import urform\nprint(urform.check_bundle('me/newer').to_text())").ok()
    assert "published with urform 99.1" in report and "note" in report


def test_options_of_from_pretrained(world: SimpleNamespace):
    world.push("""
from urform.hub_upload import write_bundle, upload_bundle
from huggingface_hub import HfApi
torch.manual_seed(1)
one, two = make(), make()
one.save_pretrained("ck"); one.half().save_pretrained("ck", variant="fp16")
upload_bundle(write_bundle("ck", "b", "me/options"), "me/options")
two.save_pretrained("ck2")
upload_bundle(write_bundle("ck2", "b2", "me/options"), "me/options", revision="second")
HfApi().upload_folder(repo_id="me/options", folder_path="b2", path_in_repo="inner")
""").ok()
    code = """
import json, torch, transformers
def load(**options):
    options = {"trust_remote_code": True, **options}
    return transformers.AutoModelForCausalLM.from_pretrained("me/options", **options)
weight = lambda model: model.lm_head.weight
main, second, inner = load(), load(revision="second"), load(subfolder="inner")
assert torch.equal(weight(second), weight(inner)) and not torch.equal(weight(main), weight(inner))
small = load(variant="fp16")
assert weight(small).dtype == torch.float16 and torch.equal(weight(small), weight(main).half())
assert weight(load(dtype="bfloat16")).dtype == torch.bfloat16
assert torch.equal(weight(load(local_files_only=True)), weight(main))
print(json.dumps("ok"))
"""
    assert last_line(world.bare.run(code).ok()) == "ok"
    code = "import urform\n" + code.replace('"trust_remote_code": True', '"device_map": "auto"')
    assert last_line(world.plugin.run(code).ok()) == "ok"


def test_pickled_weights_are_not_read(world: SimpleNamespace):
    """A repository with nothing but a pickle: by the installed code, and by the repository's own."""
    code = PUBLISH.format(name="UrformForCausalLM", architecture="decoder", repo="me/pickle")
    world.push(
        code
        + f"""
upload_bundle(bundle, "me/pickle")
class Evil:
    def __reduce__(self):
        return (open, ({str(world.home / "evil.txt")!r}, "w"))
from huggingface_hub import HfApi, CommitOperationAdd, CommitOperationDelete
import pickle
state = {{"lm_head.weight": Evil()}}
torch.save(state, "pytorch_model.bin")
HfApi().create_commit("me/pickle", [CommitOperationDelete("model.safetensors"),
    CommitOperationAdd("pytorch_model.bin", "pytorch_model.bin")], commit_message="evil")
"""
    ).ok()
    for options in ("", ", use_safetensors=False"):
        for client, begin, trust in (
            (world.plugin, "import urform\n", ""),
            (world.bare, "", ", trust_remote_code=True"),
        ):
            done = client.run(begin + logits("AutoModelForCausalLM", "me/pickle", trust + options))
            assert done.returncode != 0 and "safetensors" in done.output, done.output
            assert not (world.home / "evil.txt").exists()


def test_tampered_and_truncated_files_are_reported(world: SimpleNamespace):
    code = PUBLISH.format(name="UrformForCausalLM", architecture="decoder", repo="me/tampered")
    done = world.push(
        code
        + """
from huggingface_hub import HfApi
upload_bundle(bundle, "me/tampered")
weights = bytearray(open("b/model.safetensors", "rb").read())
weights[-1] ^= 1
api = HfApi()
put = lambda content, name: api.upload_file(path_or_fileobj=content, path_in_repo=name, repo_id="me/tampered")
put(bytes(weights), "model.safetensors")
put(open("b/layers_urform.py", "rb").read()[:1000], "layers_urform.py")
put(b"import os\\n", "extra.py")
put(b"# mine\\n", "README.md")
api.delete_file("requirements.txt", "me/tampered")
from typer.testing import CliRunner
from urform.cli.main import app
done = CliRunner().invoke(app, ["doctor", "bundle", "me/tampered", "--json"])
print(json.dumps([done.exit_code, json.loads(done.stdout)["faults"]]))
"""
    ).ok()
    code, faults = last_line(done)
    assert code == 1
    assert [f.partition(":")[0] for f in faults] == [
        "layers_urform.py", "model.safetensors", "requirements.txt", "extra.py"
    ]  # fmt: skip
    assert "bytes instead of" in faults[0] and "another sha256" in faults[1]


def test_token_is_not_shown_by_errors(world: SimpleNamespace):
    """Whatever goes wrong with a secret token, no output has it (the clients' files are searched in `open_world`)."""
    world.hub.fail("POST", "/commit/", 500, times=9)
    world.hub.fail("POST", "/repos/create", 500, times=1)
    code = """
import time; time.sleep = lambda seconds: None
import logging; logging.basicConfig(level=logging.DEBUG)
from urform import hub_upload
hub_upload.verify_bundle = lambda *args, **kwargs: None
make().save_pretrained("ck")
for attempt in range(2):
    assert hub_upload.main(["ck", "--repo-id", "me/errors"]) == 1
try:
    make().push_to_hub("me/errors")
except OSError as error:
    print(error)
"""
    output = world.push(code).ok()
    assert "500" in output and TOKEN not in output and "Canary" not in output
    assert json.dumps(sorted(world.hub.paths("me/errors"))) == '[".gitattributes"]'


def test_names_that_leave_the_repository_write_nothing_outside(world: SimpleNamespace):
    """A Hub that lies: a repository with a file whose name climbs out of the cache."""
    world.push(
        PUBLISH.format(name="UrformForCausalLM", architecture="decoder", repo="me/climbing")
        + 'upload_bundle(bundle, "me/climbing")\n'
    ).ok()
    repo = world.hub.repos["me/climbing"]
    files = dict(repo.find("main").files)
    climbing = "/".join([".."] * 9) + str(world.home / "evil.txt")
    files[climbing] = files["../evil.txt"] = files["config.json"]
    repo.commit("main", "evil", files, repo.refs["main"])
    done = world.plugin.run("import urform\nprint(urform.check_bundle('me/climbing').to_text())")
    assert done.returncode != 0 and "evil.txt" in done.output, done.output  # huggingface_hub refuses the name
    assert not list(world.home.rglob("evil.txt")) and not (world.home / "evil.txt").exists()


def test_what_is_not_there_is_said_in_one_line(world: SimpleNamespace, canary: tuple[str, str]):
    code = """
from typer.testing import CliRunner
from urform.cli.main import app
make().save_pretrained("ck")
for arguments in (["doctor", "bundle", "me/none"], ["doctor", "bundle", "me/canary", "--revision", "none"],
                  ["push", "none", "--repo-id", "me/new", "--quiet"]):
    done = CliRunner().invoke(app, arguments)
    print(json.dumps([done.exit_code, done.stderr]))
"""
    lines = [json.loads(line) for line in world.push(code).ok().splitlines() if line.startswith("[")]
    assert [status for status, _ in lines] == [2, 1, 2]
    for (_, message), says in zip(
        lines, ["no such folder: me/none, and no repository", "404", "has no config.json"], strict=True
    ):
        assert message.startswith("urform: ") and message.count("\n") == 1 and says in message, message
    assert "me/new" not in world.hub.repos
