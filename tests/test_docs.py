"""The pages of docs/ against the tree: commands, links, names of files, options, code and messages."""

import ast
import importlib.util
import os
import pkgutil
import re
import shlex
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.launch import launch_command_parser

import builder.commands.cli
import maskstream.cli
import shards.inspect.cli
from builder.commands.options import make_parser as make_build_parser
from demo.s3server import S3Server
from demo.scenes import SceneTruth
from shards.export.cli import make_parser as make_export_parser
from shards.format.dataset import open_dataset
from shards.inspect.cli import make_parser as make_inspect_parser
from shards.stream.streams import ShardStream
from tests.support import REPOSITORY
from trainer.config.yaml_config import load_config

DOCS = REPOSITORY / "docs"
PAGES = [REPOSITORY / "README.md", *sorted(DOCS.glob("*.md"))]
# Pages whose indented lines are commands, all of them.
GUIDES = ("getting-started", "open-images-on-aws", "several-gpus", "private-bucket", "coming-from-matterport")
TRAINER = ("train", "evaluate", "predict", "fill", "compare")
PARSE: dict[str, Any] = {
    **{name: import_module(f"trainer.commands.{name}").parse for name in TRAINER},
    "build": make_build_parser().parse_args,
    "export": make_export_parser().parse_args,
    "inspect": make_inspect_parser().parse_args,
}
COMMAND_NAMES = ("maskstream", "build-shards", "inspect-shards", "accelerate", "python")
OTHERS = ("aws", "cd", "export", "gcloud", "git", "make", "pip", "tensorboard")


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def without_fences(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def lines_of(page: Path) -> Iterator[list[str]]:
    """The words of each indented line of a page, continuations joined; without variables set before a command."""
    for block in re.finditer(r"(?:^    .*\n)+", without_fences(text_of(page)) + "\n", re.MULTILINE):
        for line in re.sub(r"\\\n\s*", "", block[0]).splitlines():
            for part in line.split("&&"):
                try:
                    words = shlex.split(part, comments=True)
                except ValueError:  # an apostrophe in what a command prints
                    continue
                while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                    words = words[1:]
                if words:
                    yield words


COMMANDS = [
    pytest.param(words, id=f"{page.stem}-{number}")
    for page in PAGES
    for number, words in enumerate(words for words in lines_of(page) if words[0] in COMMAND_NAMES)
]


@pytest.mark.parametrize("page", GUIDES)
def test_indented_lines_of_a_guide_are_commands(page: str) -> None:
    for words in lines_of(DOCS / f"{page}.md"):
        assert words[0] in COMMAND_NAMES + OTHERS + (".",), shlex.join(words)


@pytest.mark.parametrize("words", COMMANDS)
def test_a_command_is_one_that_its_parser_takes(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    if "..." in words:  # what the pages before have in full
        at = words.index("...")
        words = [*words[:at], "--data.shards", "s3://bucket/prefix", *words[at + 1 :]]
    program, *more = words
    if words[:2] == ["accelerate", "launch"]:
        launched = launch_command_parser().parse_args(words[2:])
        PARSE[Path(launched.training_script).stem](launched.training_script_args)
    elif program == "maskstream":
        PARSE[more[0]](more[1:])
    elif program.endswith("-shards"):
        PARSE[program.removesuffix("-shards")](more)
    elif more[0].startswith("trainer/"):
        PARSE[Path(more[0]).stem](more[1:])
    elif more[0] == "-m":
        assert more[1] == "venv" or importlib.util.find_spec(more[1]) is not None
    else:
        assert words == ["accelerate", "config"] or (REPOSITORY / more[0]).is_file(), more[0]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_and_named_files_are_there(page: Path) -> None:
    text = without_fences(text_of(page))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        place = (page.parent / path).resolve() if path else page
        assert place.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", without_fences(text_of(place)), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", title).lower().replace(" ", "-") for title in titles}, target
    folders = "benchmarks|configs|demo|examples|shards|tests|trainer"
    for name in re.findall(rf"\b(?:{folders})/[\w./-]+\.(?:py|yaml)\b", text):
        assert (REPOSITORY / name).is_file(), name


def test_the_index_has_every_page() -> None:
    linked = set(re.findall(r"\]\(([\w-]+\.md)\)", text_of(DOCS / "README.md")))
    assert linked == {page.name for page in DOCS.glob("*.md")} - {"README.md"}


def test_the_names_next_to_matterports_exist() -> None:
    settings = load_config(None).to_dict()
    cells = re.findall(r"^\| .*? \| (.*?) \| .*? \|$", text_of(DOCS / "coming-from-matterport.md"), re.MULTILINE)
    names = re.findall(r"`([\w.]+)`", " ".join(cells))
    options = [name.split(".", 1) for name in names if name.split(".")[0] in settings]
    assert [key for section, key in options if key not in settings[section]] == []
    objects = [name for name in names if name.startswith(("shards.", "trainer."))]
    for name in objects:
        pkgutil.resolve_name(name)
    assert (len(cells) > 40, len(options) > 30, len(objects) > 10) == (True, True, True)


def test_every_message_is_one_of_the_code() -> None:
    """What the page quotes is part of one string of the code, in which "…" (or a "%s" of logging) is any value."""
    texts = set()
    for path in (path for root in ("shards", "builder", "trainer") for path in (REPOSITORY / root).rglob("*.py")):
        for node in ast.walk(ast.parse(text_of(path))):
            if isinstance(node, ast.JoinedStr):
                texts.add("".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.add(re.sub(r"%(?:\.\d+)?[sdf]", "…", node.value))
    page = text_of(DOCS / "troubleshooting.md")
    messages = re.findall(r"^\| `(.*?)` \|", page, re.MULTILINE)
    assert len(messages) >= 20
    for message in messages:
        pattern = re.compile(".*?".join(map(re.escape, message.split("…"))))
        assert any(pattern.search(text) for text in texts), message


@pytest.fixture
def my_bucket(s3_scenes: SceneTruth, s3: S3Server) -> Iterator[str]:
    """`my-bucket`, as the pages have it."""
    s3.make_bucket("my-bucket")
    yield "my-bucket"
    s3.filesystem().rm("my-bucket", recursive=True)


def at_the_test_server(words: list[str], s3: S3Server) -> list[str]:
    """A command of the pages with the places that the demo server stands in for."""
    public = "https://open-images-dataset.s3.us-east-1.amazonaws.com"
    words = [word.replace(public, f"{s3.endpoint_url}/open-images-dataset") for word in words]
    return [*words, "--annotations", "s3://openimages", "--workers", "1"] if words[0] == "build-shards" else words


def test_data_commands_of_the_aws_page_run(
    my_bucket: str, s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    built = 0
    for words in lines_of(DOCS / "open-images-on-aws.md"):
        if words[0] not in ("build-shards", "inspect-shards") or "Dog" in words:  # the scenes have no dogs
            continue
        command = builder.commands.cli.main if words[0] == "build-shards" else shards.inspect.cli.main
        assert command(at_the_test_server(words, s3)[1:]) == 0, shlex.join(words)
        built += "--dry-run" not in words and words[0] == "build-shards"
    assert built >= 5
    assert (tmp_path / "traffic.html").stat().st_size > 10_000
    assert len(open_dataset("s3://my-bucket/elsewhere").index("train")) == 40
    # As private-bucket.md says, a public dataset can be streamed over plain http as well.
    public = open_dataset(f"{s3.endpoint_url}/my-bucket/traffic")
    assert len(next(iter(ShardStream(public, "train", batch_size=4)))) == 4

    for page in ("private-bucket", "coming-from-matterport"):
        for block in re.findall(r"^```python\n(.*?)^```$", text_of(DOCS / f"{page}.md"), re.MULTILINE | re.DOTALL):
            exec(compile(block, page, "exec"), {"__name__": page})
    for name in ("instances.png", "top-masks.png"):
        assert (tmp_path / name).stat().st_size > 1000


# One step of the smallest size; the recipes' own are for real machines.
SMALL = shlex.split(
    "--train.epochs 1 --train.steps_per_epoch 1 --train.eval_epochs 9 --run.trackers [] --run.pictures 0 "
    "--data.batch_size 1 --data.workers 0 --data.val_split ''"
)


def test_getting_started_from_the_build_to_pictures(
    s3: S3Server, s3_scenes: SceneTruth, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = next(Path(s3_scenes.images, "test").iterdir())
    (tmp_path / "street.jpg").write_bytes(picture.read_bytes())
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RANK", raising=False)
    for words in lines_of(DOCS / "getting-started.md"):
        words = at_the_test_server(words, s3)
        if "runs/first-gpu" in words or words[0] not in ("maskstream", "build-shards", "inspect-shards"):
            continue
        words = words[1:] if words[0] == "maskstream" else [words[0].removesuffix("-shards"), *words[1:]]
        more = {"train": SMALL, "evaluate": ["--data.workers", "0"]}.get(words[0], [])
        assert maskstream.cli.main([*words, *more]) == 0, shlex.join(words)
    assert os.path.getsize("look.html") > 10_000
    assert (tmp_path / "runs/first/evaluation-val/evaluation.json").exists()
    assert any((tmp_path / "predictions").iterdir())
