"""Names and directories of models that are unknown: what was found, and which backend would take it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from safelight.configs.families import foresee, identify
from safelight.configs.server_args import ServerArgs
from safelight.entrypoints.model_path import find_root, suggestion, with_local_vae
from safelight.entrypoints.sessions import Engine
from safelight.runtime import hub
from safelight.runtime.errors import ModelError, UnsupportedModel


def index(folder: Path, name: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": name}), encoding="utf-8")
    return folder / "model_index.json"


@pytest.mark.parametrize(
    ("name", "backend", "said"),
    [
        ("ZImagePipeline", "auto", "ZImagePipeline has a native family"),
        ("ZImagePipeline", "diffusers", "runs through diffusers"),
        ("StableDiffusion3Pipeline", "auto", "runs through diffusers"),
    ],
)
def test_the_index_alone_says_which_backend_takes_a_model(tmp_path: Path, name: str, backend: str, said: str) -> None:
    assert said in foresee(index(tmp_path, name), backend)


@pytest.mark.parametrize(
    ("name", "backend", "kind", "message"),
    [
        ("StableDiffusion3Pipeline", "safelight", UnsupportedModel, "no native family runs StableDiffusion3Pipeline"),
        ("StableDifusion3Pipeline", "auto", ModelError, "no native family.*nor does diffusers.*did you mean 'Stable"),
        (["pipeline", "MyPipeline"], "auto", ModelError, "--trust-remote-code"),
    ],
)
def test_what_none_takes_is_refused_by_its_class(
    tmp_path: Path, name: object, backend: str, kind: Any, message: str
) -> None:
    with pytest.raises(kind, match=message):
        foresee(index(tmp_path, name), backend)


def test_trusted_code_of_a_checkpoint_is_left_to_diffusers(tmp_path: Path) -> None:
    assert "through diffusers" in foresee(index(tmp_path, ["pipeline", "MyPipeline"]), trust_remote_code=True)


def test_a_directory_of_an_unknown_class_names_both_refusals(tmp_path: Path) -> None:
    index(tmp_path, "NobodysPipeline")
    with pytest.raises(ModelError, match=r"no native family runs NobodysPipeline.*nor does diffusers"):
        identify(tmp_path)


def test_a_directory_in_another_format_says_what_it_holds(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="it is empty"):
        identify(tmp_path)
    (tmp_path / "model.gguf").touch()
    with pytest.raises(ModelError, match=r"found model\.gguf\. --model-path takes a whole pipeline"):
        identify(tmp_path)
    (tmp_path / "config.json").write_text('{"architectures": ["Qwen3ForCausalLM"]}', encoding="utf-8")
    with pytest.raises(ModelError, match="it holds a single Qwen3ForCausalLM"):
        identify(tmp_path)
    index(tmp_path / "inner", "WanPipeline")
    with pytest.raises(ModelError, match="did you mean its folder 'inner'"):
        identify(tmp_path)


def test_a_repository_is_looked_at_before_its_weights_are_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, said = index(tmp_path, "ZImagePipeline"), list[str]()

    def download(repo: str, param: str, *, inspect: Any, **_: Any) -> Path:
        inspect(path)
        return path.parent

    monkeypatch.setattr(hub, "download", download)
    assert find_root(ServerArgs(model_path="org/model"), said.append) == tmp_path
    assert said == ["org/model: ZImagePipeline has a native family"]
    index(tmp_path, "NobodysPipeline")
    with pytest.raises(ModelError, match="no native family runs NobodysPipeline"):
        find_root(ServerArgs(model_path="org/model"), said.append)


@pytest.mark.parametrize("text", ["Z-Image-Turbo", "z-image-turbo", "Tongyi/Z-Image-Turbo", "Tongyi-MAI/ZImage-Turbo"])
def test_nearly_the_name_of_a_known_model_is_answered_with_its_id(text: str) -> None:
    assert suggestion(text) == "; did you mean 'Tongyi-MAI/Z-Image-Turbo'?"


def test_other_names_are_answered_without_a_guess() -> None:
    assert suggestion("Tongyi-MAI/Z-Image-Turbo") == suggestion("./somewhere") == suggestion("some/unknown") == ""
    with pytest.raises(ModelError, match="did you mean 'Tongyi-MAI/Z-Image-Turbo'"):
        find_root(ServerArgs(model_path="Z-Image-Turbo"), print)


def test_another_vae_is_found_for_every_way_to_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    given = ServerArgs(vae_path=str(tmp_path))
    assert with_local_vae(given).vae_path == str(tmp_path)
    assert with_local_vae(ServerArgs()) == ServerArgs()
    with pytest.raises(ModelError, match="no-such-vae") as caught:
        Engine(vae_path="nobody/no-such-vae", device="cpu")
    assert caught.value.param == "vae_path"
