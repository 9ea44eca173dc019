"""The Hub over HTTP: the real client in processes of their own, against ``tests/hub_server.py``; nothing is patched."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from transformers import ViTForImageClassification

from hf_tokenprune import PruneConfig, RandomConfig, ToMeConfig, UniformConfig
from hf_tokenprune.config_files import MAX_FILE_BYTES, MAX_OTHER_BYTES
from hf_tokenprune.demo.digits import MODEL_DIR

from .families import tiny_model
from .hub_server import LoopbackHub, Machine, RemoteError, Repository

EVERYTHING = {"README.md", "config.json", "model.safetensors", "preprocessor_config.json", "prune_config.json"}
CONFIG = ToMeConfig(layers=(1, 3), r=0.3)
LOGITS = """
def logits(model):
    size = model.config.image_size
    pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(pixels).logits.tolist()
"""
ROUND_TRIP = """
from hf_tokenprune import from_pretrained, prune, save_pretrained
model = transformers.AutoModelForImageClassification.from_pretrained("base/digits")
save_pretrained(prune(model, "tome"), "digits-pruned", push_to_hub=True, repo_id="me/digits-pruned")
"""
AND_BACK = """
from hf_tokenprune import from_pretrained
model = from_pretrained("me/digits-pruned", cache_dir=cache_dir)
"""


@pytest.fixture(scope="module")
def hub() -> Iterator[LoopbackHub]:
    with LoopbackHub() as hub:
        hub.add("base/digits", MODEL_DIR)
        yield hub


@pytest.fixture(scope="module")
def author(hub: LoopbackHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """Logged in as "me", whose model is ``model``, a tiny one, pruned by CONFIG."""
    home = tmp_path_factory.mktemp("author")
    tiny_model("vit", ViTForImageClassification).save_pretrained(home / "tiny")
    with Machine(hub, home) as machine:
        yield machine


@pytest.fixture(scope="module")
def reader(hub: LoopbackHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """Not logged in."""
    with Machine(hub, tmp_path_factory.mktemp("reader"), token="") as machine:
        yield machine


def push(author: Machine, how: str, **names: Any) -> Any:
    """``how`` with ``model``, pruned by CONFIG, and ``config``; what ``commit`` it leaves: address, pull request."""
    return author(
        f"""
from hf_tokenprune import *
config = PruneConfig.from_dict({CONFIG.to_dict()})
model = prune(transformers.AutoModelForImageClassification.from_pretrained("tiny"), config)
{LOGITS}
{how}
result = [str(commit), commit.pr_url, logits(model)]
""",
        **names,
    )


def files(repository: Repository, revision: str = "main") -> dict[str, bytes]:
    return repository.branches[revision][-1].files


def card(repository: Repository, revision: str = "main") -> ModelCard:
    return ModelCard(files(repository, revision)["README.md"].decode())


def snippets(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


# -- there and back --------------------------------------------------------------------------------------------------


def test_from_a_stock_model_to_the_hub_and_back(hub: LoopbackHub, tmp_path: Path) -> None:
    """In under ten lines; the other machine's cache is empty. With processes of their own below."""
    with Machine(hub, tmp_path / "one") as machine:
        script = ROUND_TRIP + LOGITS + "before = logits(model)\n" + AND_BACK + "result = before == logits(model)"
        assert machine(script, cache_dir=str(tmp_path / "other")) is True
    assert set(files(hub.repositories["me/digits-pruned"])) == {
        *("README.md", "config.json", "model.safetensors", "prune_config.json"),
    }
    assert len((ROUND_TRIP + AND_BACK).strip().splitlines()) < 10
    downloads = [line for line in hub.log if line.startswith("GET /large/")]
    assert len(downloads) == 1, "the weights came over HTTP"


@pytest.mark.slow
def test_another_machine_has_the_same_model_also_offline(
    hub: LoopbackHub, author: Machine, reader: Machine, tmp_path: Path
) -> None:
    author(ROUND_TRIP)
    expected = author(LOGITS + AND_BACK + "result = logits(model)", cache_dir=None)
    assert reader(LOGITS + AND_BACK + "result = logits(model)", cache_dir=None) == expected
    home = Path(reader("import os; result = os.environ['HF_HOME']")).parent
    before = len(hub.log)
    with Machine(hub, home, offline=True, token="") as offline:
        assert offline(LOGITS + AND_BACK + "result = logits(model)", cache_dir=None) == expected
        with pytest.raises(RemoteError, match="offline"):
            offline("hf_tokenprune.from_pretrained('base/digits', 'tome')")
    assert len(hub.log) == before, "nothing was asked for"


# -- what is pushed --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_push_is_one_commit_of_what_was_saved(hub: LoopbackHub, author: Machine, tmp_path: Path) -> None:
    how = f"""
from pathlib import Path
Path({str(tmp_path / "pruned")!r}).mkdir()
Path({str(tmp_path / "pruned/notes.txt")!r}).write_text("not of the model")
commit = save_pretrained(
    model, {str(tmp_path / "pruned")!r}, push_to_hub=True, private=True, tags=["mine"], max_shard_size="50KB",
    commit_message="words", commit_description="more", token="hf_owner",
)
"""
    address, _, _ = push(author, how)
    repository = hub.repositories["me/pruned"]  # the folder's name
    assert repository.private
    (_, commit) = repository.branches["main"]
    assert (commit.title, commit.description, address.split("/")[-1]) == ("words", "more", commit.sha)
    saved = {path.name: path.read_bytes() for path in (tmp_path / "pruned").iterdir() if path.name != "notes.txt"}
    assert len([name for name in saved if name.endswith(".safetensors")]) > 1
    assert commit.files == {**saved, "README.md": commit.files["README.md"]}
    assert card(repository).data.tags == ["hf_tokenprune", "token-pruning", "tome", "mine"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "what",
    ["save_pretrained(model, 'out', push_to_hub=True, repo_id=repo_id, **to)", "config.push_to_hub(repo_id, **to)"],
    ids=["model", "config"],
)
def test_where_a_push_goes(hub: LoopbackHub, author: Machine, what: str) -> None:
    """A branch is made; a pull request is one, also to a repository of another, whose branches stay as they are."""
    repo_id = f"me/{what.split('(')[0].replace('.', '-')}"
    push(author, f"commit = {what}", repo_id=repo_id, to={"revision": "dev", "tags": ["mine"]})
    repository = hub.repositories[repo_id]
    assert [len(repository.branches[name]) for name in ("main", "dev")] == [1, 2] and len(repository.branches) == 2
    assert "mine" in card(repository, "dev").data.tags and 'revision="dev"' in card(repository, "dev").text
    others = hub.add(f"other/{repo_id[3:]}", {"README.md": b"# Theirs\n"})
    for number, to in enumerate(({}, {"revision": "main"}), 1):
        _, address, _ = push(author, f"commit = {what}", repo_id=others.name, to={"create_pr": True, **to})
        assert address == f"{hub.endpoint}/{others.name}/discussions/{number}"
        assert others.pull_requests == [f"refs/pr/{n}" for n in range(1, number + 1)]
        made = others.branches[f"refs/pr/{number}"]
        assert len(made) == 2 and {"prune_config.json", "README.md"} <= set(made[1].files)
        assert card(others, f"refs/pr/{number}").text.startswith("# Theirs\n")
        assert "revision" not in card(others, f"refs/pr/{number}").text
    push(author, f"commit = {what}", repo_id=others.name, to={"create_pr": True, "token": "hf_stranger"})
    assert len(others.branches["main"]) == 2 and len(others.pull_requests) == 3
    with pytest.raises(RemoteError) as refusal:
        push(author, f"commit = {what}", repo_id=others.name, to={})
    assert "HfHubHTTPError" in refusal.value.kinds and "no rights in the namespace other" in refusal.value.message
    with pytest.raises(RemoteError) as refusal:  # a pull request makes no branch
        push(author, f"commit = {what}", repo_id=others.name, to={"create_pr": True, "revision": "nowhere"})
    assert "RevisionNotFoundError" in refusal.value.kinds


@pytest.mark.slow
def test_a_config_alone_is_the_bytes_of_its_file(hub: LoopbackHub, author: Machine, tmp_path: Path) -> None:
    push(author, "commit = config.push_to_hub('config-alone')")  # in the namespace of who is logged in
    found = files(hub.repositories["me/config-alone"])
    assert set(found) == {"README.md", "prune_config.json"}
    assert found["prune_config.json"] == CONFIG.save_pretrained(tmp_path).read_bytes()


@pytest.mark.slow
def test_a_config_pushed_beside_a_model_does_not_deny_it(hub: LoopbackHub, author: Machine) -> None:
    push(author, "model.push_to_hub('me/beside'); commit = config.push_to_hub('me/beside')")
    card = files(hub.repositories["me/beside"])["README.md"].decode()
    assert "the model of this repository" in card and "There is no model here" not in card


@pytest.mark.slow
def test_stock_push_to_hub_carries_the_key(hub: LoopbackHub, author: Machine, reader: Machine) -> None:
    _, _, expected = push(author, "commit = model.push_to_hub('me/stock')")
    assert json.loads(files(hub.repositories["me/stock"])["config.json"])["prune_config"] == CONFIG.to_dict()
    assert "prune_config.json" not in files(hub.repositories["me/stock"])
    assert reader(LOGITS + "result = logits(hf_tokenprune.from_pretrained('me/stock'))") == expected
    config, dense = reader(
        LOGITS + "model = transformers.AutoModelForImageClassification.from_pretrained('me/stock')\n"
        "result = [model.config.prune_config, logits(model)]"
    )
    assert config == CONFIG.to_dict() and dense != expected


# -- the card --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_cards_snippets_run_and_what_they_say_is_so(hub: LoopbackHub, author: Machine, reader: Machine) -> None:
    _, _, expected = push(author, "commit = save_pretrained(model, 'out', push_to_hub=True, repo_id='me/card')")
    push(author, "commit = config.push_to_hub('me/card-of-config', revision='dev')")
    hub.add("owner/checkpoint", files(hub.repositories["base/digits"]))
    text = card(hub.repositories["me/card"]).text
    (snippet,) = snippets(text)
    assert reader(LOGITS + snippet + "result = logits(model)") == expected
    dense = reader(
        LOGITS + "model = transformers.AutoModelForImageClassification.from_pretrained('me/card')\n"
        "result = [logits(model), hasattr(model.config, 'prune_config')]"
    )
    assert dense[0] != expected and "loads it **dense**" in text, "what a person without the package gets"
    auto = """
hf_tokenprune.enable_auto()
model = transformers.AutoModelForImageClassification.from_pretrained("me/card")
hf_tokenprune.disable_auto()
result = logits(model)
"""
    assert "`hf_tokenprune.enable_auto()` stock `from_pretrained`" in text and reader(LOGITS + auto) == expected
    (snippet,) = snippets(card(hub.repositories["me/card-of-config"], "dev").text)
    assert reader(snippet + "result = model.config.prune_config") == CONFIG.to_dict()


@pytest.mark.slow
def test_a_card_that_is_there_keeps_its_text_and_metadata(hub: LoopbackHub, author: Machine) -> None:
    theirs = "---\nlicense: mit\nlibrary_name: timm\ntags:\n- birds\n---\n# Birds\n\nBy hand: \\1 and {this}.\n"
    repository = hub.add("me/birds", {"README.md": theirs.encode()})
    push(author, "commit = save_pretrained(model, 'out', push_to_hub=True, repo_id='me/birds')")
    first = card(repository)
    assert first.text.startswith("# Birds\n\nBy hand: \\1 and {this}.\n\n<!-- hf_tokenprune: begin")
    assert first.data.to_dict() == {
        **{"license": "mit", "library_name": "timm", "pipeline_tag": "image-classification"},
        "tags": ["birds", "hf_tokenprune", "token-pruning", "tome"],
    }
    repository.commit("main", {"README.md": str(first).replace("Birds", "Owls").encode() + b"\nBelow.\n"})
    push(author, "commit = save_pretrained(prune(unprune(model), 'uniform'), 'out', True, 'me/birds')")
    again = card(repository).text
    assert again.startswith("# Owls\n\nBy hand") and again.endswith("-->\n\nBelow.\n")
    assert again.count("## Token pruning") == 1 and '"method": "uniform"' in again and '"tome"' not in again
    assert card(repository).data.tags == ["birds", "hf_tokenprune", "token-pruning", "uniform"]


@pytest.mark.slow
def test_a_card_in_the_folder_counts_for_more(hub: LoopbackHub, author: Machine, tmp_path: Path) -> None:
    repository = hub.add("me/two-cards", {"README.md": b"# Theirs\n"})
    (tmp_path / "README.md").write_text("# Mine\n")
    push(author, f"commit = save_pretrained(model, {str(tmp_path)!r}, push_to_hub=True, repo_id='me/two-cards')")
    assert card(repository).text.startswith("# Mine\n\n<!--")
    assert (tmp_path / "README.md").read_text() == "# Mine\n"


@pytest.mark.slow
@pytest.mark.parametrize("metadata", ["- a\n- list", "tags: [", "model-index: 3"])
def test_a_card_that_cannot_be_read_is_not_written_over(hub: LoopbackHub, author: Machine, metadata: str) -> None:
    repository = hub.add("me/odd", {"README.md": f"---\n{metadata}\n---\n# Odd\n".encode()})
    with pytest.raises(RemoteError, match="is no model card that could be kept") as error:
        push(author, "commit = config.push_to_hub('me/odd')")
    assert "ConfigError" in error.value.kinds and len(repository.branches["main"]) == 2


# -- what is loaded --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_revision_subfolder_and_token(hub: LoopbackHub, author: Machine, reader: Machine) -> None:
    """Of a checkpoint, and of a config alone; private, so that the token has to reach every request."""
    folder = Path(author("import os; result = os.getcwd()")) / "there"
    _, _, expected = push(author, f"save_pretrained(model, {str(folder)!r}); commit = config.push_to_hub('me/any')")
    inside = {f"inner/{path.name}": path.read_bytes() for path in folder.iterdir()}
    UniformConfig(keep_ratios=0.5).save_pretrained(folder)
    repository = hub.add("me/nested", {"prune_config.json": (folder / "prune_config.json").read_bytes()}, private=True)
    repository.branches["v1"] = [repository.branches["main"][-1]]
    repository.commit("v1", inside)
    about = {"revision": "v1", "subfolder": "inner", "token": "hf_owner"}
    assert (
        reader(LOGITS + "result = logits(hf_tokenprune.from_pretrained('me/nested', **about))", about=about) == expected
    )
    read = "result = hf_tokenprune.PruneConfig.from_pretrained('me/nested', **about).to_dict()"
    assert reader(read, about=about) == CONFIG.to_dict()
    assert reader(read, about={"token": "hf_owner"}) == UniformConfig(keep_ratios=0.5).to_dict()
    dense = "result = logits(hf_tokenprune.from_pretrained('base/digits', 'me/nested', token='hf_owner'))"
    assert reader(LOGITS + dense), "the token of the checkpoint is for the config's repository too"
    with pytest.raises(RemoteError, match=r"the repository 'me/nested' has no revision='v2'"):
        reader(read, about={"revision": "v2", "token": "hf_owner"})


@pytest.mark.slow
def test_a_config_alone_is_for_every_checkpoint_it_fits_and_no_other(
    hub: LoopbackHub, author: Machine, reader: Machine
) -> None:
    for name, config in {
        "vision": RandomConfig(layers=(9,), keep_ratios=0.5),
        "fitting": RandomConfig(layers=(5,), keep_ratios=0.5),
        "decoder": PruneConfig.for_method("divprune"),
    }.items():
        author(f"hf_tokenprune.PruneConfig.from_dict({config.to_dict()}).push_to_hub('me/{name}')")
    fits = {name: card(hub.repositories[f"me/{name}"]).text for name in ("vision", "fitting", "decoder")}
    both = "**vision encoders with at least {} blocks and vision-language models with a decoder of at least {} layers**"
    assert both.format(10, 11) in fits["vision"] and both.format(6, 7) in fits["fitting"]
    assert "**vision-language models with a decoder**" in fits["decoder"]
    load = "result = hf_tokenprune.from_pretrained('base/digits', repo_id).config.prune_config"
    assert reader(load, repo_id="me/fitting")["layers"] == [5]
    hub.log.clear()
    for repo_id, reason in (
        ("me/vision", "block 9 does not exist, this model has 6 blocks"),
        ("me/decoder", "not 'base/digits', which is one of the vision encoders; methods for it: ats"),
    ):
        with pytest.raises(RemoteError) as error:
            reader(load, repo_id=repo_id)
        assert "ConfigError" in error.value.kinds
        assert error.value.message.startswith(f"the config '{repo_id}' fits vision") and reason in error.value.message
    assert not [line for line in hub.log if "safetensors" in line], "refused before the weights are downloaded"


# -- what goes wrong -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("what", ["checkpoint", "config"])
def test_repositories_that_cannot_be_read_say_why(hub: LoopbackHub, reader: Machine, what: str) -> None:
    hub.add("me/private", MODEL_DIR, private=True)
    hub.add("me/gated", MODEL_DIR, gated=True)
    hub.add("me/none", MODEL_DIR)
    load = {
        "checkpoint": "hf_tokenprune.from_pretrained(repo_id, token=token)",
        "config": "hf_tokenprune.PruneConfig.from_pretrained(repo_id, token=token)",
    }[what]
    for repo_id, token, words in (
        ("me/private", None, "'me/private' is neither a local path nor a Hub repository: 401"),
        ("me/private", "hf_stranger", "make sure you are authenticated"),
        ("me/gated", None, "the repository 'me/gated' is gated: ask for access on its page, then log in"),
        ("me/gated", "hf_stranger", "you are not in the authorized list"),
        ("me/absent", "hf_owner", "'me/absent' is neither a local path nor a Hub repository: 404"),
        ("me/none", None, {"checkpoint": "no prune config for 'me/none'", "config": "no prune_config.json in"}[what]),
    ):
        with pytest.raises(RemoteError) as error:
            reader(load, repo_id=repo_id, token=token)
        assert "ConfigError" in error.value.kinds, error.value
        assert words in error.value.message


@pytest.mark.slow
def test_a_download_that_breaks_goes_on_where_it_was(hub: LoopbackHub, author: Machine, reader: Machine) -> None:
    _, _, expected = push(author, "commit = save_pretrained(model, 'out', push_to_hub=True, repo_id='me/broken')")
    hub.lost["model.safetensors"] = 2
    assert reader(LOGITS + "result = logits(hf_tokenprune.from_pretrained('me/broken'))") == expected
    assert hub.lost["model.safetensors"] == 0


@pytest.mark.slow
def test_no_answer_to_a_push(hub: LoopbackHub, author: Machine) -> None:
    repository = hub.add("me/lost", {"README.md": b"# Theirs\n"})
    hub.lost_commits = 1
    with pytest.raises(RemoteError, match="is lost, nothing was committed") as error:
        push(author, "commit = config.push_to_hub('me/lost')")
    assert "ConnectionError" in error.value.kinds
    repository.commit("main", {"README.md": b"# Theirs, and new\n"})
    hub.lost_before["README.md"] = 100  # a card that cannot be read must not be written over
    with pytest.raises(RemoteError, match="is lost, nothing was committed"):
        push(author, "commit = config.push_to_hub('me/lost')")
    hub.lost_before.clear()
    assert len(repository.branches["main"]) == 3
    push(author, "commit = config.push_to_hub('me/lost')")
    assert card(repository).text.startswith("# Theirs, and new\n")


@pytest.mark.heavy
@pytest.mark.slow
def test_without_a_hub_it_is_said_that_the_config_is_not_known(hub: LoopbackHub, tmp_path: Path) -> None:
    """Stock loading goes on from its cache then, and so does ours; a config may be missed, so there is a warning."""
    with LoopbackHub() as gone:
        gone.add("base/digits", MODEL_DIR)
        gone.add("base/known", MODEL_DIR)
        with Machine(gone, tmp_path) as machine:
            machine("transformers.AutoModelForImageClassification.from_pretrained('base/digits')")
            machine("hf_tokenprune.from_pretrained('base/known', 'tome')")  # asked for its file: there is none
            gone.__exit__(None, None, None)
            with pytest.raises(RemoteError, match="no prune config for 'base/digits'"):
                machine("hf_tokenprune.from_pretrained('base/digits')")
            assert [w for w in machine.warnings if "cannot be reached, so it is not known whether 'base/digits'" in w]
            machine("hf_tokenprune.from_pretrained('base/known', 'tome')")
            assert not [w for w in machine.warnings if "cannot be reached" in w]
            with pytest.raises(RemoteError, match="is lost, nothing was committed"):
                machine("hf_tokenprune.ToMeConfig().push_to_hub('me/x')")


@pytest.mark.slow
def test_a_file_that_is_too_large_is_refused_before_it_is_downloaded(hub: LoopbackHub, reader: Machine) -> None:
    huge = b" " * (MAX_FILE_BYTES + 1)
    hub.add("me/huge", {"prune_config.json": huge})
    hub.add("me/huge-adapter", {"adapter_config.json": b" " * (MAX_OTHER_BYTES + 1)})
    hub.log.clear()
    for repo_id in ("me/huge", "me/huge-adapter"):
        with pytest.raises(RemoteError, match=rf"_config.json' of '{repo_id}': \d+ bytes; .* has at most \d+") as error:
            reader("hf_tokenprune.from_pretrained(repo_id)", repo_id=repo_id)
        assert "ConfigError" in error.value.kinds
    assert not [
        line for line in hub.log if line.startswith("GET") and line.endswith(("e_config.json", "r_config.json"))
    ]


@pytest.mark.slow
def test_what_is_cached_costs_no_request_more(hub: LoopbackHub, author: Machine, reader: Machine) -> None:
    push(author, "commit = config.push_to_hub('me/counted')")
    asked = []
    for _ in range(2):
        hub.log.clear()
        assert reader("result = hf_tokenprune.PruneConfig.from_pretrained('me/counted').to_dict()") == CONFIG.to_dict()
        asked.append([line.split()[0] for line in hub.log])
    assert asked == [["HEAD", "HEAD", "GET"], ["HEAD"]]


@pytest.mark.slow
@pytest.mark.parametrize("auto", [False, True], ids=["ours", "enable_auto"])
def test_all_is_of_one_commit(hub: LoopbackHub, author: Machine, tmp_path: Path, auto: bool) -> None:
    """Of the one whose config.json was read, though another is pushed while the model loads."""
    name = f"me/moving-{auto}"
    push(author, f"commit = save_pretrained(model, 'out', push_to_hub=True, repo_id={name!r})")
    folder = Path(author("import os; result = os.getcwd()")) / "out"
    UniformConfig(layers=(1,), keep_ratios=0.5).save_pretrained(folder)
    after = {"prune_config.json": (folder / "prune_config.json").read_bytes()}
    hub.pushed_after["config.json" if not auto else "model.safetensors"] = (name, after)
    load = "transformers.ViTForImageClassification" if auto else "hf_tokenprune"
    with Machine(hub, tmp_path, token="") as machine:
        code = f"result = {load}.from_pretrained({name!r}).config.prune_config"
        assert machine("hf_tokenprune.enable_auto()\n" * auto + code) == CONFIG.to_dict()
    assert len(hub.repositories[name].branches["main"]) == 3, "it was pushed"


# -- the command line ------------------------------------------------------------------------------------------------


def command(machine: Machine, *args: object, errors: bool = False) -> tuple[int, str]:
    """Exit code and output of ``hf-tokenprune``; ``errors``: with what it says on stderr, though nothing failed."""
    code, output = machine(
        """
        from hf_tokenprune.cli import app
        from typer.testing import CliRunner
        done = CliRunner().invoke(app, args)
        result = [done.exit_code, done.stdout if done.exit_code == 0 and not errors else done.output]
        """,
        args=[str(arg) for arg in args],
        errors=errors,
    )
    return code, output


@pytest.mark.slow
def test_push_of_a_checkpoint_a_folder_and_a_config(
    hub: LoopbackHub, author: Machine, reader: Machine, tmp_path: Path
) -> None:
    assert command(author, "push", "base/digits", "me/cli", "-m", "tome", "--private")[0] == 0
    repository = hub.repositories["me/cli"]
    assert repository.private and len(repository.branches["main"]) == 2
    assert set(files(repository)) == EVERYTHING
    assert card(repository).data.base_model == "base/digits"

    code, output = command(author, "apply", "base/digits", tmp_path / "out", "-m", "uniform", "--push", "me/applied")
    assert code == 0 and f"{hub.endpoint}/me/applied/commit/" in output
    assert set(files(hub.repositories["me/applied"])) == EVERYTHING

    (tmp_path / "out" / "notes.txt").write_text("mine")
    (tmp_path / "out" / ".hidden").write_text("no")
    (tmp_path / "out" / "checkpoint-1").mkdir()
    code, output = command(author, "push", tmp_path / "out", "other/x", "--create-pr", "--json")
    assert code == 1 and "no rights" in output, "there is no such repository"
    hub.add("other/x")
    code, output = command(author, "push", tmp_path / "out", "other/x", "--create-pr", "--json")
    assert json.loads(output)["url"] == f"{hub.endpoint}/other/x/discussions/1"
    uploaded = files(hub.repositories["other/x"], "refs/pr/1")
    assert set(uploaded) == EVERYTHING | {"notes.txt"}
    assert uploaded["model.safetensors"] == (tmp_path / "out" / "model.safetensors").read_bytes()

    assert (
        command(author, "push", "base/digits", "me/cli-config", "-m", "tome", "--config-only", "--revision", "a")[0]
        == 0
    )
    assert set(files(hub.repositories["me/cli-config"], "a")) == {"README.md", "prune_config.json"}
    CONFIG.save_pretrained(tmp_path / "config")
    assert command(author, "push", tmp_path / "config", "me/cli-folder", "--config-only")[0] == 0
    assert json.loads(files(hub.repositories["me/cli-folder"])["prune_config.json"]) == CONFIG.to_dict()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("push", "base/digits", "me/no", "-m", "tome", "-s", "layers=[9]", "--config-only"), "has 6 blocks"),
        (("push", "base/digits", "other/no", "-m", "tome", "--config-only"), "no rights in the namespace other"),
        (("push", "base/absent", "me/no", "-m", "tome"), "base/absent"),
    ],
)
def test_a_push_that_cannot_be_is_one_line_and_leaves_nothing(
    hub: LoopbackHub, author: Machine, args: tuple[str, ...], words: str
) -> None:
    code, output = command(author, *args)
    assert code == 1 and words in output and "Traceback" not in output
    assert "me/no" not in hub.repositories


@pytest.mark.slow
def test_who_is_not_logged_in_is_told_before_there_is_work(hub: LoopbackHub, reader: Machine, tmp_path: Path) -> None:
    words = "nobody is logged in to the Hub, so nothing can be pushed: hf auth login"
    for args in (
        ("push", "base/digits", "me/no", "-m", "tome"),
        ("push", "base/digits", "me/no", "-m", "tome", "--config-only"),
        ("apply", "base/digits", tmp_path / "new", "-m", "tome", "--push", "me/no"),
    ):
        code, output = command(reader, *args)
        assert code == 1 and words in output and "Traceback" not in output
    with pytest.raises(RemoteError, match=words):
        reader(
            """
            model = transformers.AutoModelForImageClassification.from_pretrained("base/digits")
            hf_tokenprune.save_pretrained(hf_tokenprune.prune(model, "tome"), folder, True, "me/no")
            """,
            folder=str(tmp_path / "new"),
        )
    assert not (tmp_path / "new").exists()
    with Machine(hub, tmp_path, token="hf_of_yesterday") as machine:
        hub.log.clear()
        code, output = command(machine, "apply", "base/digits", tmp_path / "new", "-m", "tome", "--push", "me/no")
        assert code == 1 and "Invalid user token" in output and "Traceback" not in output
        assert hub.log == ["GET /api/whoami-v2"] and not (tmp_path / "new").exists()


@pytest.mark.slow
def test_a_checkpoint_of_a_trainer_is_pushed_without_its_state(
    hub: LoopbackHub, author: Machine, tmp_path: Path
) -> None:
    pytest.importorskip("accelerate")
    folder = author(
        """
        from hf_tokenprune import *
        model = prune(transformers.AutoModelForImageClassification.from_pretrained("tiny"), "uniform")
        size = model.config.image_size
        data = [{"pixel_values": torch.zeros(3, size, size), "labels": 0}] * 2
        arguments = transformers.TrainingArguments(out, max_steps=1, save_steps=1, report_to=[], use_cpu=True)
        transformers.Trainer(model, arguments, train_dataset=data).train()
        result = out + "/checkpoint-1"
        """,
        out=str(tmp_path),
    )
    there = {path.name for path in Path(folder).iterdir()}
    assert {"optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "trainer_state.json"} <= there
    code, output = command(author, "push", folder, "me/trained", errors=True)
    assert (
        code == 0 and "left out, pickles or no part of the model: optimizer.pt, rng_state.pth, scheduler.pt" in output
    )
    assert set(files(hub.repositories["me/trained"])) == {"README.md", "config.json", "model.safetensors"}


@pytest.mark.slow
def test_the_example_uploads(hub: LoopbackHub, tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn: pip install hf-tokenprune[demo]")
    example = Path(__file__).resolve().parents[1] / "examples" / "share_on_hub.py"
    run = [sys.executable, str(example), "me/by-example", "--no-dry-run", "--private"]
    done = subprocess.run(run, env=hub.environment(tmp_path / "hf"), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    repository = hub.repositories["me/by-example"]
    assert repository.private and set(files(repository)) == EVERYTHING
    assert "salience_merge" in card(repository).data.tags


@pytest.mark.slow
def test_metadata_is_what_the_hub_takes(hub: LoopbackHub, author: Machine) -> None:
    """With the results of a report, which is that of the method's run."""
    push(
        author,
        """
from hf_tokenprune.evaluation.loop import Logits
from hf_tokenprune.evaluation.report import PairedReport
generator, labels = torch.Generator().manual_seed(0), torch.arange(40) % 5
dense, tome, uniform = (Logits(torch.randn(40, 5, generator=generator), labels, 1.0) for _ in range(3))
report = PairedReport.from_logits(dense, {"tome": tome, "uniform": uniform})
commit = save_pretrained(model, "out", push_to_hub=True, repo_id="me/results", reports={"me/digits": report})
""",
    )
    metadata = yaml.safe_load(files(hub.repositories["me/results"])["README.md"].decode().split("---\n")[1])
    (index,) = metadata["model-index"]
    (result,) = index["results"]
    assert index["name"] == "results" and result["dataset"] == {"name": "me/digits", "type": "me/digits"}
    assert [metric["type"] for metric in result["metrics"]] == ["accuracy", "top5_accuracy", "agreement", "kl"]


@pytest.mark.slow
def test_recovered_values_go_to_the_hub_and_back(
    hub: LoopbackHub, author: Machine, reader: Machine, tmp_path: Path
) -> None:
    """With a checkpoint, and with a config alone; another file than the config names is refused."""
    _, _, wanted = push(
        author,
        """
from hf_tokenprune.weights import Recovery
values = {name: p + 0.1 for name, p in model.named_parameters() if name.endswith("bias")}
config = config.with_recovery(Recovery.of(values))
unprune(model)
commit = save_pretrained(prune(model, config), "recovered", push_to_hub=True, repo_id="me/recovered")
commit = config.push_to_hub("me/values")
""",
    )
    alone = hub.repositories["me/values"].at("main")
    assert alone is not None and set(alone.files) == {"README.md", "prune_config.json", "recovered.safetensors"}
    tiny_model("vit", ViTForImageClassification).save_pretrained(tmp_path)
    hub.add("base/tiny", tmp_path)
    load = f"""
from hf_tokenprune import *
{LOGITS}
one = logits(from_pretrained("me/recovered", cache_dir=cache_dir))
other = logits(from_pretrained("base/tiny", "me/values", cache_dir=cache_dir))
enable_auto()
stock = logits(transformers.AutoModelForImageClassification.from_pretrained("me/recovered", cache_dir=cache_dir))
result = [one, other, stock]
"""
    assert reader(load, cache_dir="cache") == [wanted] * 3
    for name in ("me/recovered", "me/values"):
        hub.repositories[name].commit("main", {"recovered.safetensors": b"another"})
    with pytest.raises(RemoteError, match="is not the file that the config beside it names"):
        reader(load, cache_dir="cache")
