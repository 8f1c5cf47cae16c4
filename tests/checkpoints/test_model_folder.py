"""Where a model is found, what is fetched, and what its configuration may say."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.utils import filter_repo_objects

from checkpoints import model_folder
from checkpoints.model_folder import (
    TOKENIZER_FILES,
    copy_files,
    find_folder,
    read_config,
    read_generation_config,
    shipped,
    shipped_names,
)


@pytest.fixture
def hub_calls(monkeypatch, tmp_path) -> list[tuple[str, dict]]:
    """Calls to the hub, which answers each with one folder."""
    calls = []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **options: calls.append((name, options)) or str(tmp_path)
    )
    return calls


def run_python(program: str, cwd: Path, **environment: str) -> str:
    """What the program prints, run in `cwd` with its packages taken from there or from PYTHONPATH."""
    command, environment = [sys.executable, "-c", program], os.environ | environment
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_a_local_folder_comes_first(tmp_path, monkeypatch, hub_calls):
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert find_folder("org/name") == find_folder(tmp_path / "org" / "name") == tmp_path / "org" / "name"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_folder("~/org") == tmp_path / "org"
    assert hub_calls == []


def test_a_local_folder_stays_the_same_when_the_working_directory_changes(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    assert find_folder("mine").is_absolute()


def test_a_hub_id_is_downloaded_without_pickles_and_code(tmp_path, hub_calls):
    assert find_folder("org/name-1.5") == tmp_path
    ((name, options),) = hub_calls
    assert name == "org/name-1.5" and options.pop("revision") is None
    wanted = [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer.model",
        "merges.txt",
        "chat_template.jinja",
        "additional_chat_templates/tools.jinja",
        "generation_config.json",
    ]
    unwanted = [
        "pytorch_model.bin",
        "modeling_x.py",
        "original/consolidated.00.pth",
        "consolidated.safetensors",
        "training_args.bin",
        "onnx/model.onnx",
        "model.gguf",
        "float32/model.safetensors",
        "README.md",
    ]
    assert list(filter_repo_objects(wanted + unwanted, **options)) == wanted


@pytest.mark.parametrize(
    "model",
    [
        "no-such-model",
        "../calc",
        "a/b/c",
        "/no/such/folder",
        "./mine",
        "org/..",
        "org\\name",
        "org/na me",
        "\0",
        "x" * 5000,
    ],
)
def test_the_hub_is_not_asked_for_what_is_no_hub_id(model, hub_calls, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")  # so that there is no ../calc
    with pytest.raises(FileNotFoundError, match='local folder .* models that ship .* hub .*"organisation/name"'):
        find_folder(model)
    assert hub_calls == []


@pytest.mark.parametrize("model", ["", None, 7])
def test_what_is_no_name_at_all_is_refused(model):
    with pytest.raises(ValueError, match=f"^model .*{model!r}"):
        find_folder(model)
    with pytest.raises(ValueError, match=f"^tokenizer .*{model!r}"):
        find_folder(model, "tokenizer")


def test_a_path_is_never_taken_for_a_name(tmp_path, hub_calls):
    with pytest.raises(FileNotFoundError, match="org/name"):
        find_folder(Path("org/name"))
    (tmp_path / "file").write_text("")
    with pytest.raises(FileNotFoundError, match="file"):
        find_folder(tmp_path / "file")
    assert hub_calls == []


def test_an_unreachable_hub_is_reported_with_what_was_tried(tmp_path):
    program = (
        "from checkpoints.model_folder import find_folder\n"
        "try: find_folder('org/name')\n"
        "except FileNotFoundError as error: print(error)"
    )
    text = run_python(program, Path(model_folder.__file__).parents[1], HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert re.match("model 'org/name' .*local folder .*hub .not reached", text)


def test_a_missing_repository_is_reported_with_what_was_tried(monkeypatch):
    def refuse(name, **_):
        response: Any = SimpleNamespace(headers={}, request=None)
        raise huggingface_hub.errors.RepositoryNotFoundError(f"404 for {name}", response=response)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(FileNotFoundError, match=r"hub \(no such repository.*log in .*404 for org/name"):
        find_folder("org/name")


def test_an_id_that_the_hub_finds_invalid_is_reported_with_what_was_tried():
    with pytest.raises(FileNotFoundError, match="org/two--dashes.*no such repository"):
        find_folder("org/two--dashes")


def test_a_revision_is_the_hubs(tmp_path, hub_calls):
    assert find_folder("org/name", revision="v2.0") == tmp_path
    assert hub_calls[0][1]["revision"] == "v2.0"


@pytest.mark.parametrize("revision", ["", 7, b"main"])
def test_what_is_no_revision_is_refused(revision, hub_calls):
    with pytest.raises(
        ValueError, match=re.escape(f"revision must be a branch, tag or commit of a hub id, got {revision!r}")
    ):
        find_folder("org/name", revision=revision)
    assert hub_calls == []


def test_a_folder_has_no_revisions(tmp_path, hub_calls):
    with pytest.raises(ValueError, match=f"revision='main' .* {str(tmp_path)!r} is a local folder"):
        find_folder(tmp_path, revision="main")
    with pytest.raises(ValueError, match="revision='main' .* 'calc' is a model that ships"):
        find_folder("calc", revision="main")
    assert hub_calls == []


def test_a_revision_that_the_hub_has_not_is_named(monkeypatch):
    def refuse(name, **_):
        response: Any = SimpleNamespace(headers={}, request=None)
        raise huggingface_hub.errors.RevisionNotFoundError(f"404 for {name}", response=response)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(FileNotFoundError, match="'org/name' .*hub .has no revision 'v9': 404"):
        find_folder("org/name", revision="v9")


def cached_model(cache: Path, commit: str, branch: str) -> Path:
    """What the hub's cache holds of org/name at one commit."""
    repository = cache / "hub" / "models--org--name"
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / branch).write_text(commit)
    return snapshot


def test_a_revision_is_found_in_the_local_cache(tmp_path):
    old, new = (cached_model(tmp_path, letter * 40, branch) for letter, branch in (("a", "v1"), ("b", "main")))
    program = (
        "from checkpoints.model_folder import find_folder\n"
        "for revision in (None, 'v1', 'a' * 40): print(find_folder('org/name', revision=revision))\n"
        "try: find_folder('org/name', revision='v2')\n"
        "except FileNotFoundError as error: print(error)"
    )
    text = run_python(program, Path(model_folder.__file__).parents[1], HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    *found, refused = text.splitlines()
    assert found == [str(new), str(old), str(old)]
    assert "not complete in its cache at revision 'v2'" in refused


def test_the_files_of_a_tokenizer_are_copied_and_no_other(tmp_path):
    kept = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "additional_chat_templates/tools.jinja"]
    left = ["config.json", "model.safetensors", "tokenizer.py", "README.md"]
    for name in kept + left:
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_text(name)
    (tmp_path / "in" / "tokenizer.json").unlink()
    (tmp_path / "blob").write_text("tokenizer.json")
    (tmp_path / "in" / "tokenizer.json").symlink_to(tmp_path / "blob")  # as in the hub's cache
    copy_files(tmp_path / "in", tmp_path / "out", TOKENIZER_FILES)
    found = {str(path.relative_to(tmp_path / "out")): path for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert {name: path.read_text() for name, path in found.items()} == {name: name for name in kept}
    assert not found["tokenizer.json"].is_symlink()


def test_shipped_names_cannot_leave_the_package():
    for name in ("../checkpoints", "a/b", "a\\b", "..", ".", "", "/etc", "calc\n"):
        with pytest.raises(ValueError, match=re.escape(repr(name))):
            shipped(name)
    assert shipped("no-such-model") is None


def test_each_shipped_name_resolves_to_its_folder():
    for name in shipped_names():
        assert find_folder(name) == shipped(name) and read_config(find_folder(name))


def test_an_installed_copy_finds_what_ships_in_it_and_needs_no_accelerator_library(tmp_path):
    package = tmp_path / "checkpoints"
    shutil.copytree(Path(model_folder.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    (package / "toy").mkdir()
    (package / "toy" / "config.json").write_text("{}")
    (tmp_path / "elsewhere").mkdir()
    program = (
        "import sys\n"
        "from checkpoints import key_table, model_folder\n"
        "print(model_folder.find_folder('toy'), 'toy' in model_folder.shipped_names())\n"
        "print({'jax', 'torch', 'jaxengine'} & set(sys.modules))"
    )
    search_path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    text = run_python(program, tmp_path / "elsewhere", PYTHONPATH=search_path)
    assert text == f"{package / 'toy'} True\nset()"


def test_configurations_are_read_as_they_stand(tmp_path):
    (tmp_path / "config.json").write_text('{"architectures": ["Qwen3ForCausalLM"], "rope_theta": 1e6}')
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    assert read_config(tmp_path) == {"architectures": ["Qwen3ForCausalLM"], "rope_theta": 1e6}
    assert read_generation_config(tmp_path) == {}
    (tmp_path / "generation_config.json").write_text('{"top_k": 20}')
    assert read_generation_config(str(tmp_path)) == {"top_k": 20}


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"a": 1, "a": 2}', "[" * 100_000, "\ufeff{}", "{'a': 1}"])
@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "generation_config.json"])
def test_invalid_json_is_an_error_with_the_files_name(tmp_path, name, text):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=f"{tmp_path / name} (is not valid JSON|must hold a JSON object)"):
        read_config(tmp_path)
        read_generation_config(tmp_path)


def test_a_missing_config_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json"):
        read_config(tmp_path)


def test_an_adapter_is_told_from_a_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=f"{tmp_path} holds an adapter and no model: merge it"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert read_config(tmp_path) == {}  # merged


def test_a_huge_json_file_is_refused_before_it_is_read(tmp_path):
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(2**40)  # sparse
    with pytest.raises(ValueError, match=f"config.json .*{2**40}"):
        read_config(tmp_path)
