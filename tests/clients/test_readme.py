"""What the README and the examples tell people to run, against a real server."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.clients.conftest import MODEL

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
DEFAULT_URL = "http://127.0.0.1:30000"
SECONDS = 240


def curl_commands(text: str) -> list[str]:
    """The different curl commands of code blocks, which may go on behind a backslash."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    command = re.compile(r"^\s*(?:\$ )?(curl (?:.*\\\n)*.*)$", re.MULTILINE)
    found = [match for block in blocks for match in command.findall(block)]
    return list(dict.fromkeys(re.sub(r"\\\n\s*", "", each) for each in found))


COMMANDS = curl_commands((ROOT / "README.md").read_text())


def test_commands_and_examples_are_found() -> None:
    assert COMMANDS and all(DEFAULT_URL in command for command in COMMANDS)
    assert {path.name for path in EXAMPLES} >= {"openai_chat.py", "multi_turn_chat.py"}
    text = "```\n$ curl a \\\n   -d b\nc\n```\ncurl no\n```sh\n  curl d\n  curl a -d b\n```\n"
    assert curl_commands(text) == ["curl a -d b", "curl d"]


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
@pytest.mark.parametrize("command", COMMANDS)
def test_curl_commands_of_the_readme(server_url: str, command: str) -> None:
    here = command.replace(DEFAULT_URL, server_url)
    done = subprocess.run(["sh", "-c", here], capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr
    reply = json.loads(done.stdout)
    assert reply["model"] == MODEL
    assert "Paris" in reply["choices"][0]["message"]["content"]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples(server_url: str, path: Path) -> None:
    if "sglang" in path.read_text() and importlib.util.find_spec("sglang") is None:
        pytest.skip("needs sglang: pip install --no-deps -r requirements-clients.txt")
    command = [sys.executable, str(path), "--url", server_url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "> What is the capital of France?" in done.stdout
    assert "Paris" in done.stdout
