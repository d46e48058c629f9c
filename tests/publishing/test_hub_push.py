"""Pushes over HTTP to a Hub on loopback by the real client, and what others then load: with Urform, and without."""

import json
from types import SimpleNamespace

import pytest
from hub_client import NO_WAITING, TOKEN, last_line, logits

# ----------------------------------------------------------------------------------------------------------- pushing


def test_models_and_tokenizers_push_loads_without_urform(world: SimpleNamespace):
    """`push_to_hub` of both, twice: the repository is the one that `hub_upload` publishes."""
    world.push("""
model = make()
model.push_to_hub("me/pushed", max_shard_size="20KB")
tokenizer().push_to_hub("me/pushed")
model.save_pretrained("me-saved", max_shard_size="20KB", push_to_hub=True, repo_id="me/saved")
tokenizer().save_pretrained("me-saved", push_to_hub=True, repo_id="me/saved")
model.save_pretrained("saved")
assert "auto_map" not in json.load(open("saved/config.json")) and not os.path.exists("saved/modeling_urform.py")
model.save_pretrained("ck", max_shard_size="20KB"); tokenizer().save_pretrained("ck")
from urform.hub_upload import write_bundle, upload_bundle
upload_bundle(write_bundle("ck", "bundle", "me/uploaded"), "me/uploaded")
from urform import check_bundle
for name in ("me/pushed", "me/uploaded", "me/saved"):
    report = check_bundle(name)
    assert report.ok, report.to_text()
    assert not report.notes, report.notes
""").ok()
    pushed, uploaded = world.hub.paths("me/pushed"), world.hub.paths("me/uploaded")
    assert pushed == uploaded == world.hub.paths("me/saved")
    assert {"model.safetensors.index.json", "requirements.txt", "README.md", "modeling_urform.py"} <= pushed
    assert len([name for name in pushed if name.endswith(".safetensors")]) > 1
    for name in pushed - {"README.md", "config.json"}:
        assert world.hub.read("me/pushed", name) == world.hub.read("me/uploaded", name), name
        assert world.hub.read("me/pushed", name) == world.hub.read("me/saved", name), name
    config = json.loads(world.hub.read("me/pushed", "config.json"))
    assert config == json.loads(world.hub.read("me/uploaded", "config.json"))
    assert config["auto_map"]["AutoModel"] == "modeling_urform.UrformModel"
    assert world.hub.history("me/uploaded") == ["Upload with urform 0.1.0", "initial commit"]
    assert b"More Information Needed" not in world.hub.read("me/pushed", "README.md")

    with_urform = last_line(world.plugin.run(logits("AutoModelForCausalLM", "me/pushed")).ok())
    code = logits("AutoModelForCausalLM", "me/pushed", ", trust_remote_code=True")
    code += """
base = transformers.AutoModel.from_pretrained("me/pushed", trust_remote_code=True)
tokenizer = transformers.AutoTokenizer.from_pretrained("me/pushed", trust_remote_code=True)
assert type(base).__name__ == "UrformModel" and type(tokenizer).__name__ == "UrformTokenizer", (base, tokenizer)
assert type(tokenizer).__module__.startswith("transformers_modules.")
generated = model.generate(**tokenizer("1 2", return_tensors="pt"), max_new_tokens=4)
print(json.dumps(["transformers_modules", out.double().flatten().tolist()]))
"""
    without = last_line(world.bare.run(code).ok())
    assert with_urform[0] == "urform" and without[0] == "transformers_modules"
    assert without[1] == with_urform[1]  # bit by bit
    # The cache serves both offline.
    again = world.bare.run(
        logits("AutoModelForCausalLM", "me/pushed", ", trust_remote_code=True, local_files_only=True")
    )
    assert last_line(again.ok())[1] == with_urform[1]


def test_large_shards_go_by_lfs_in_parts_and_stale_ones_are_deleted(world: SimpleNamespace):
    world.push("""
from urform.hub_upload import write_bundle, upload_bundle
model = make(vocab_size=30_000, hidden_size=256)  # 31 MB
model.save_pretrained("ck", max_shard_size="11MB")
upload_bundle(write_bundle("ck", "one", "me/large"), "me/large")
model.save_pretrained("whole")
upload_bundle(write_bundle("whole", "two", "me/large"), "me/large")
upload_bundle("two", "me/large")  # nothing has changed: no commit
assert urform.check_bundle("me/large").ok
""").ok()
    assert "model.safetensors" in world.hub.paths("me/large")
    assert not [p for p in world.hub.paths("me/large") if "-of-" in p or "index" in p]
    assert len(world.hub.history("me/large")) == 3
    assert any(path.startswith("/part/") for _, path, _ in world.hub.requests)  # above 25 MB in several parts
    assert len(world.hub.read("me/large", "model.safetensors")) > 25_000_000


def test_private_revision_pull_request(world: SimpleNamespace):
    world.push("""
from urform.hub_upload import write_bundle, upload_bundle
make().save_pretrained("ck")
bundle = write_bundle("ck", "b", "me/private")
upload_bundle(bundle, "me/private", private=True)
open("b/README.md", "a").write("\\nmore\\n")
upload_bundle(bundle, "me/private", private=True, revision="next")
open("b/README.md", "a").write("\\neven more\\n")
print(upload_bundle(bundle, "me/private", create_pr=True))
upload_bundle(bundle, "me/public")
try:
    upload_bundle(bundle, "me/public", private=True)
except ValueError as error:
    assert "is public" in str(error)
else:
    raise SystemExit("a public repository was taken for a private one")
""").ok()
    repo = world.hub.repos["me/private"]
    assert repo.private and not world.hub.repos["me/public"].private
    assert set(repo.refs) == {"main", "next", "refs/pr/1"}
    readmes = [world.hub.read("me/private", "README.md", revision) for revision in ("main", "next", "refs/pr/1")]
    assert [r.count(b"more\n") for r in readmes] == [0, 1, 2]
    load = logits("AutoModelForCausalLM", "me/private", ", revision='next', trust_remote_code=True")
    assert world.bare.run(load).returncode != 0
    assert world.bare.run(load, HF_TOKEN="hf_other").returncode != 0
    world.bare.run(load, HF_TOKEN="hf_readonly").ok()


# ----------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("token", "repo", "says"),
    [
        ("hf_readonly", "me/refused", "403"),
        ("hf_other", "me/refused", "403"),
        ("hf_wrong", "me/refused", "401"),
        ("", "me/refused", "there is no Hugging Face token"),
        (TOKEN, "no-namespace", "NAMESPACE/NAME"),
        (TOKEN, "me/../up", "NAMESPACE/NAME"),
    ],
)
def test_refusals_are_clear_and_publish_nothing(world: SimpleNamespace, token: str, repo: str, says: str):
    code = f"""
from urform import hub_upload
hub_upload.verify_bundle = lambda *args, **kwargs: None  # it has tests of its own and takes seconds
make().save_pretrained("ck")
sys.exit(hub_upload.main(["ck", "--repo-id", {repo!r}]))
"""
    done = world.push(code, token)
    assert done.returncode == 1 and says in done.output, done.output
    assert "Traceback" not in done.output
    assert "me/refused" not in world.hub.repos


def test_server_errors_and_limits_are_waited_out(world: SimpleNamespace):
    hub = world.hub
    hub.fail("POST", "/preupload/", 503)
    hub.fail("PUT", "/upload/", 500, times=2)
    hub.fail("POST", "/info/lfs/objects/batch", 429, Retry_After="1")
    hub.fail("POST", "/commit/", 502)
    hub.fail("POST", "/commit/", 429)
    world.push(
        NO_WAITING
        + """
from urform.hub_upload import write_bundle, upload_bundle
make().save_pretrained("ck")
upload_bundle(write_bundle("ck", "b", "me/patient"), "me/patient", say=print)
"""
    ).ok()
    assert hub.history("me/patient") == ["Upload with urform 0.1.0", "initial commit"]


def test_an_answer_that_got_lost_is_found_out(world: SimpleNamespace):
    world.hub.lose_answer("POST", "/commit/")
    world.push(
        NO_WAITING
        + """
from urform.hub_upload import write_bundle, upload_bundle
make().save_pretrained("ck")
print(upload_bundle(write_bundle("ck", "b", "me/lost"), "me/lost", say=print))
"""
    ).ok()
    assert world.hub.history("me/lost") == ["Upload with urform 0.1.0", "initial commit"]  # one commit, not two


def test_cut_in_mid_upload_leaves_nothing_and_resumes(world: SimpleNamespace):
    hub = world.hub
    code = (
        NO_WAITING
        + """
from urform import hub_upload
hub_upload.verify_bundle = lambda *args, **kwargs: None
make(vocab_size=3000, hidden_size=64).save_pretrained("ck", max_shard_size="400KB")
sys.exit(hub_upload.main(["ck", "--repo-id", "me/cut"]))
"""
    )
    hub.cut("PUT", "/upload/", 100_000, times=100, after=1)
    done = world.push(code)
    assert done.returncode == 1 and "Run the same command again" in done.output, done.output
    assert hub.paths("me/cut") == {".gitattributes"}  # the revision is as it was
    arrived = {path for method, path, status in hub.requests if path.startswith("/upload/") and status == 200}
    assert len(arrived) == 1
    hub.trouble.clear()
    hub.requests.clear()
    world.push(code).ok()
    sent = {path for method, path, status in hub.requests if path.startswith("/upload/") and status == 200}
    assert sent and not arrived & sent  # what had arrived was not sent again
    assert hub.history("me/cut") == ["Upload with urform 0.1.0", "initial commit"]
    world.bare.run(logits("AutoModelForCausalLM", "me/cut", ", trust_remote_code=True")).ok()


def test_of_concurrent_pushes_one_wins_whole(world: SimpleNamespace):
    """Each bundle's files are of one model: a mixture would not agree with its stamp."""
    output = world.push("""
import threading
from urform.hub_upload import write_bundle, upload_bundle
bundles = []
for number in range(4):
    torch.manual_seed(number)
    make(hidden_size=16 + 16 * number).save_pretrained(f"ck{number}")
    bundles.append(write_bundle(f"ck{number}", f"b{number}", "me/race"))
upload_bundle(bundles[0], "me/race")
barrier, outcomes = threading.Barrier(3), []
from huggingface_hub import HfApi
look = HfApi.model_info
def look_together(self, *args, **kwargs):
    found = look(self, *args, **kwargs)
    barrier.wait(timeout=60)  # all have seen the same state before any commits
    return found
HfApi.model_info = look_together
def push(number):
    try:
        upload_bundle(bundles[number], "me/race")
        outcomes.append("published")
    except ValueError as error:
        outcomes.append(str(error))
threads = [threading.Thread(target=push, args=(n,)) for n in (1, 2, 3)]
[t.start() for t in threads]; [t.join() for t in threads]
HfApi.model_info = look
assert urform.check_bundle("me/race").ok
transformers.AutoModelForCausalLM.from_pretrained("me/race")
print(json.dumps(outcomes))
""").ok()
    outcomes = last_line(output)
    published = [o for o in outcomes if o == "published"]
    refused = [o for o in outcomes if "somebody else" in o]
    assert len(published) == 1 and len(refused) == 2, output
    assert len(world.hub.history("me/race")) == 3
