"""Prompts to checked jobs, and files to their final names."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
from PIL import Image

from safelight.configs.families import ModelSpec, identify
from safelight.configs.generate_args import GenerateArgs
from safelight.configs.sampling_params import SamplingParams
from safelight.entrypoints import saving
from safelight.entrypoints.cli import app
from safelight.entrypoints.flags import parsed
from safelight.entrypoints.jobs import check_jobs, read_jobs, unknown_words
from safelight.entrypoints.pictures import check_list, from_likes
from safelight.entrypoints.saving import file_name, prepare_folder, save
from safelight.runtime.errors import ConfigError, InvalidRequest, JobFailed
from safelight.runtime.messages import Artifact, MediaFormat

MODEL = {
    "model_index.json": {"_class_name": "WanPipeline"},
    "transformer/config.json": {
        "num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2, "in_channels": 16, "ffn_dim": 32,
        "text_dim": 16,
    },
    "vae/config.json": {"dim_mult": [1, 2, 4, 4], "base_dim": 8},
    "text_encoder/config.json": {"d_model": 16, "num_layers": 1},
    "scheduler/scheduler_config.json": {"_class_name": "UniPCMultistepScheduler"},
}  # fmt: skip


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    root = tmp_path_factory.mktemp("model")
    for name, content in MODEL.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(json.dumps(content))
    return identify(root)


def prompt_file(folder: Path, text: str) -> GenerateArgs:
    path = folder / "prompts.txt"
    path.write_text(text, encoding="utf-8")
    return GenerateArgs(prompt_path=str(path))


def test_a_prompt_file_has_one_job_a_line(tmp_path: Path) -> None:
    files = prompt_file(tmp_path, 'a dog\n\n  {"prompt": "a cat", "num-frames": 5, "seed": 3}\n# a hash\n')
    jobs = [params for _, params in read_jobs(SamplingParams(height=64, seed=1), files)]
    assert jobs == [
        SamplingParams(prompt="a dog", height=64, seed=1),
        SamplingParams(prompt="a cat", height=64, seed=3, num_frames=5),
        SamplingParams(prompt="# a hash", height=64, seed=1),
    ]


@pytest.mark.parametrize(
    ("line", "error", "message"),
    [
        ('{"prompt": "a", "hieght": 1}', ConfigError, "line 2: unknown parameter 'hieght'; did you mean 'height'"),
        ('{"prompt": "a", "height": "1"}', InvalidRequest, "line 2: --height: an integer expected"),
        ('{"prompt": "a", "height": 33}', InvalidRequest, "line 2: height must be a multiple of 16"),
        ('{"prompt": "a", "num_frames": 5}', ConfigError, "line 2: --output-format: png holds one picture"),
        ('{"height": 64}', InvalidRequest, "line 2: the JSON object has no prompt"),
        ("{oops", ConfigError, "line 2: a JSON object of parameters expected"),
    ],
)
def test_errors_name_the_line(spec: ModelSpec, tmp_path: Path, line: str, error: type[Exception], message: str) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text(f"a dog\n{line}\n", encoding="utf-8")
    files = GenerateArgs(prompt_path=str(path), output_format="png")
    with pytest.raises(error, match=message):
        check_jobs(spec, read_jobs(SamplingParams(), files), files)


def test_an_empty_prompt_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has none"):
        read_jobs(SamplingParams(), prompt_file(tmp_path, "\n \n"))


def test_checked_jobs_are_complete_and_have_a_seed(spec: ModelSpec) -> None:
    files = GenerateArgs(return_frames=True, output_quality=80)
    (job,) = check_jobs(spec, [("", SamplingParams(prompt="a"))], files)
    unset = {name for name in SamplingParams.__dataclass_fields__ if getattr(job.params, name) is None}
    assert unset == {"true_cfg_scale", "cfg_normalization", "cfg_truncation"}, "which this family does not have"
    assert job.media.format is MediaFormat.PNG
    assert job.media.with_frames
    assert job.chunk_bytes >= 128 * 128 * 3
    (other,) = check_jobs(spec, [("", SamplingParams(prompt="a"))], files)
    assert other.params.seed != job.params.seed


def test_words_outside_a_models_vocabulary_are_named(tmp_path: Path) -> None:
    assert unknown_words(tmp_path, "anything") == []
    (tmp_path / "vocabulary.json").write_text(json.dumps({"words": ["a", "red", "apple"]}))
    assert unknown_words(tmp_path, "A red, APPLE. Quasar!") == ["quasar"]


@pytest.mark.parametrize(
    ("values", "outputs", "expected"),
    [
        ({}, 1, "a-red-äpple-7.jpg"),
        ({}, 2, "a-red-äpple-7-1.jpg"),
        ({"output_file_name": "x.jpeg"}, 1, "x.jpeg"),
        ({"output_file_name": "x.jpg"}, 2, "x-1.jpg"),
        ({"output_file_name": "v1.5"}, 1, "v1.5.jpg"),
    ],
)
def test_file_names(values: dict[str, str], outputs: int, expected: str) -> None:
    params = SamplingParams(prompt="A red  äpple!", seed=7, num_outputs_per_prompt=outputs)
    assert file_name(GenerateArgs(**values), params, "jpeg", 1) == expected  # type: ignore[arg-type]


def test_a_prompt_without_letters_has_a_name_too() -> None:
    assert file_name(GenerateArgs(), SamplingParams(prompt="../../!", seed=1), "png", 0) == "untitled-1.png"


def artifact(folder: Path, frames: bool = False) -> Artifact:
    folder.mkdir(exist_ok=True)
    (folder / "made.png").write_bytes(b"picture")
    if frames:
        (folder / "made.npy").write_bytes(b"frames")
    return Artifact(0, str(folder / "made.png"), "image/png", 7, "", str(folder / "made.npy") if frames else None)


@pytest.mark.parametrize("kind", ["same file system", "another one", "no hard links"])
def test_saving_moves_and_never_overwrites(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    target.mkdir()
    if kind == "another one":
        if not os.access("/dev/shm", os.W_OK) or os.stat("/dev/shm").st_dev == tmp_path.stat().st_dev:
            pytest.skip("no second file system here")
        source = Path("/dev/shm") / f"safelight-test-{os.getpid()}"
    if kind == "no hard links":

        def refuse(*_: object) -> None:
            raise OSError(errno.EPERM, "no links here")

        monkeypatch.setattr(os, "link", refuse)
    saved = [save(artifact(source, frames=True), target, "a.png") for _ in range(2)]
    assert saved == [(target / "a.png", target / "a.npy"), (target / "a-2.png", target / "a-2.npy")]
    assert sorted(path.name for path in target.iterdir()) == ["a-2.npy", "a-2.png", "a.npy", "a.png"]
    assert {path.read_bytes() for path in target.glob("*.png")} == {b"picture"}
    assert (target / "a.png").stat().st_mode & 0o400
    assert list(source.iterdir()) == []
    source.rmdir()


def test_a_failed_save_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "target"
    target.mkdir()
    made = artifact(tmp_path / "source")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(saving, "_claim", full)
    with pytest.raises(JobFailed, match="cannot be saved"):
        save(made, target, "a.png")
    assert list(target.iterdir()) == []


def test_an_output_folder_that_cannot_be_is_found_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="--output-path"):
        prepare_folder(tmp_path / "file" / "folder")
    prepare_folder(tmp_path / "new" / "deep")
    assert (tmp_path / "new" / "deep").is_dir()


def test_a_job_has_the_pictures_of_its_flags_config_or_line_in_order(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("image-path: [a.png, b.png]\n")
    given = [(["--image-path", "x.png", "--image-path", "y.png"], ("x.png", "y.png")), (["--config", str(config)],
             ("a.png", "b.png")), ([], ())]  # fmt: skip
    for flags, expected in given:
        ((_, values), *_) = parsed(app, "generate", ["--prompt", "p", *flags])
        assert SamplingParams(**values).image_path == expected
    files = prompt_file(tmp_path, '{"prompt": "p", "image-path": ["1.png", "2.png"]}\n{"prompt": "p"}\n')
    jobs = read_jobs(SamplingParams(image_path=("0.png",)), files)
    assert [params.image_path for _, params in jobs] == [("1.png", "2.png"), ("0.png",)]
    for wrong in ([3], {"a": 1}, 3):
        with pytest.raises(InvalidRequest, match="a list of strings expected"):
            SamplingParams(image_path=wrong)  # type: ignore[arg-type]


def test_python_callers_give_paths_bytes_and_pictures(tmp_path: Path) -> None:
    image = Image.new("RGBA", (4, 3), (10, 20, 30, 255))
    path = tmp_path / "it.png"
    image.save(path)
    pictures = from_likes([path, str(path), path.read_bytes(), image])
    assert len(pictures) == 4
    assert len({picture.ref.sha256 for picture in pictures}) == 1
    for wrong, message in ((b"GIF89a", "PNG, JPEG"), (tmp_path / "no", "cannot be read"), (3, "paths, bytes")):
        with pytest.raises(InvalidRequest, match=message) as caught:
            from_likes([wrong])  # type: ignore[list-item]
        assert caught.value.param == "images"
    with pytest.raises(InvalidRequest, match="a list of pictures expected"):
        check_list(image)
