"""What the pages show works: Python blocks run, commands exist, configurations load.

The Python blocks of a page are one script, run in a process and a folder of their own. A block that cannot
run here is preceded by `<!-- skip: reason -->`; how many may be is written below.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
MAX_SKIPPED = 12
TIMEOUT_S = 110

FENCE = re.compile(r"^(?P<indent> *)(?P<ticks>`{3,})(?P<language>[\w+-]*)[^\n]*$")
SKIP = re.compile(r"<!--\s*skip:\s*(?P<reason>.*?)\s*-->")


class Block(NamedTuple):
    language: str
    text: str
    line: int
    """Of the first line of the text, from 1."""
    skip: str | None


def read_blocks(text: str) -> list[Block]:
    """Fenced blocks of a Markdown page, in order."""
    lines = text.splitlines()
    blocks: list[Block] = []
    index, skip = 0, None
    while index < len(lines):
        comment, fence = SKIP.search(lines[index]), FENCE.match(lines[index])
        if fence:
            end = index + 1
            while end < len(lines) and lines[end].strip() != fence["ticks"]:
                end += 1
            if end == len(lines):
                raise ValueError(f"line {index + 1}: the block is not closed")
            indent = len(fence["indent"])
            body = "\n".join(line[indent:] for line in lines[index + 1 : end])
            blocks.append(Block(fence["language"], body, index + 2, skip))
            index, skip = end, None
        elif comment:
            skip = comment["reason"] or "no reason"
        elif lines[index].strip():
            skip = None
        index += 1
    return blocks


def pages() -> list[Path]:
    docs = (p for p in (ROOT / "docs").rglob("*.md") if not {"_build", "_generated", "modules", "kinds"} & set(p.parts))
    return [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *sorted(docs),
        *sorted(ROOT.glob("plugins/*/README.md")),
        *sorted(ROOT.glob("plugins/*/*/README.md")),
        *sorted(ROOT.glob("nemo_rl_plugins_*/README.md")),
    ]


def blocks_of(page: Path, *languages: str) -> list[Block]:
    return [b for b in read_blocks(page.read_text(encoding="utf-8")) if b.language in languages]


def with_blocks(*languages: str) -> list[object]:
    found = [p for p in pages() if any(b.skip is None for b in blocks_of(p, *languages))]
    return [pytest.param(p, id=str(p.relative_to(ROOT))) for p in found]


def as_script(blocks: list[Block]) -> str:
    """The blocks as one source whose line numbers are those of the page."""
    lines: list[str] = []
    for block in blocks:
        lines += [""] * (block.line - 1 - len(lines)) + block.text.splitlines()
    return "\n".join(lines) + "\n"


# -- the checks can fail -----------------------------------------------------------------------------------

PAGE = """Text.

```python
a = 1
```

<!-- skip: needs a GPU -->
```python
b = 1 / 0
```

- item

  ```bash
  nemo-rl train x.yaml
  ```

```python
assert a == 2
```
"""


def test_blocks_are_read_with_their_lines_and_marks() -> None:
    blocks = read_blocks(PAGE)
    assert [(b.language, b.line, b.skip) for b in blocks] == [
        ("python", 4, None),
        ("python", 9, "needs a GPU"),
        ("bash", 15, None),
        ("python", 19, None),
    ]
    assert blocks[2].text == "nemo-rl train x.yaml"
    with pytest.raises(ValueError, match="line 1"):
        read_blocks("```python\nx = 1\n")


def test_a_failing_block_fails_with_the_line_of_the_page(tmp_path: Path) -> None:
    script = as_script([b for b in read_blocks(PAGE) if b.language == "python" and b.skip is None])
    done = run_script(script, tmp_path)
    assert done.returncode == 1
    assert "line 19" in done.stderr


def test_an_unknown_command_is_seen() -> None:
    assert complaint("nemo-rl fly --away") is not None
    assert complaint("nox -s nothing") is not None
    assert complaint("pip install nemo-rl-nothing") is not None
    assert complaint("pip install nox && nox -s tests") is None


# -- Python ------------------------------------------------------------------------------------------------


def run_script(source: str, folder: Path) -> subprocess.CompletedProcess[str]:
    script = folder / "page.py"
    script.write_text(source, encoding="utf-8")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, str(script)]
    return subprocess.run(
        command, cwd=folder, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=TIMEOUT_S
    )


@pytest.mark.parametrize("page", with_blocks("python"))
def test_python_blocks_run(page: Path, tmp_path: Path) -> None:
    done = run_script(as_script([b for b in blocks_of(page, "python") if b.skip is None]), tmp_path)
    assert done.returncode == 0, f"{page.relative_to(ROOT)} (lines are those of the page):\n{done.stderr[-4000:]}"


def test_few_blocks_are_skipped_and_each_says_why() -> None:
    skipped = [(p.name, b.line, b.skip) for p in pages() for b in read_blocks(p.read_text()) if b.skip is not None]
    assert len(skipped) <= MAX_SKIPPED, skipped
    assert all(len(reason or "") > 5 for _, _, reason in skipped)


# -- commands ----------------------------------------------------------------------------------------------


@cache
def distributions() -> frozenset[str]:
    files = [
        ROOT / "pyproject.toml",
        *ROOT.glob("plugins/*/pyproject.toml"),
        *ROOT.glob("plugins/*/*/pyproject.toml"),
        *ROOT.glob("nemo_rl_plugins_*/pyproject.toml"),
    ]
    return frozenset(tomllib.loads(f.read_text())["project"]["name"] for f in files)


@cache
def sessions() -> frozenset[str]:
    return frozenset(re.findall(r"^@nox\.session.*\ndef (\w+)", (ROOT / "noxfile.py").read_text(), re.MULTILINE))


@cache
def command_help(*path: str) -> str | None:
    """What `nemo-rl <path> --help` prints; None if there is no such command."""
    env = {**os.environ, "COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
    command = [sys.executable, "-m", "nemo_rl_core.cli", *path, "--help"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=60)
    return done.stdout if done.returncode == 0 else None


def nemo_rl_complaint(words: list[str]) -> str | None:
    path: list[str] = []
    for word in words:
        if word.startswith("-") or not re.fullmatch(r"[a-z][a-z-]*", word) or command_help(*path, word) is None:
            break
        # Words after the last command are arguments; a command without sub-commands answers any of them.
        if path and command_help(*path, word) == command_help(*path):
            break
        path.append(word)
    if not path and words and not words[0].startswith("-"):
        return f"no command {words[0]!r}"
    known = command_help(*path) or ""
    options = {word.split("=")[0] for word in words if word.startswith("--") and word != "--help"}
    unknown = sorted(option for option in options if option not in known)
    return f"{' '.join(path)} has no {', '.join(unknown)}" if unknown else None


def complaint(line: str) -> str | None:
    """What is wrong with a shell line that names a command, session or package of ours; None if nothing."""
    for part in re.split(r"&&|\|\||;|\|", line):
        words = shlex.split(part, comments=True)
        if words[:1] == ["nemo-rl"] and (found := nemo_rl_complaint(words[1:])):
            return found
        if words[:2] == ["nox", "-s"] and words[2] not in sessions():
            return f"no session {words[2]!r}"
        if words[:2] == ["pip", "install"]:
            ours = {w.split("[")[0] for w in words[2:] if w.startswith("nemo-rl") or w.startswith("nemo_rl")}
            if ours - distributions():
                return f"no distribution {sorted(ours - distributions())}"
    return None


@pytest.mark.parametrize("page", with_blocks("bash"))
def test_commands_exist(page: Path) -> None:
    lines = [
        (block.line, line)
        for block in blocks_of(page, "bash")
        if block.skip is None
        for line in block.text.replace("\\\n", " ").splitlines()
    ]
    assert [(number, line, found) for number, line in lines if (found := complaint(line))] == []


# -- configurations ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", with_blocks("yaml"))
def test_configurations_load(page: Path) -> None:
    from nemo_rl_core.config import finalize, load_config

    for block in blocks_of(page, "yaml"):
        content = yaml.safe_load(block.text)
        if block.skip is None and isinstance(content, dict) and "algorithm" in content:
            finalize(load_config(content))


@pytest.mark.parametrize("page", with_blocks("toml"))
def test_toml_blocks_parse(page: Path) -> None:
    for block in blocks_of(page, "toml"):
        tomllib.loads(block.text)


# -- front matter ------------------------------------------------------------------------------------------

FRONT_MATTER = {"description", "categories", "tags", "personas", "difficulty", "content_type", "modality"}


def test_every_page_of_the_site_has_its_front_matter() -> None:
    loose = {"README.md", "BUILD_INSTRUCTIONS.md"}
    site = [p for p in pages() if (ROOT / "docs") in p.parents and p.name not in loose]
    assert len(site) > 10
    for page in site:
        _, head, _ = page.read_text(encoding="utf-8").split("---\n", 2)
        assert yaml.safe_load(head).keys() == FRONT_MATTER, page
