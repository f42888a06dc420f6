"""The pages: commands that parse, options and names that exist, links that lead somewhere, Python that runs."""

import ast
import csv
import importlib
import re
import shlex
import shutil
from functools import cache
from pathlib import Path

import click
import pytest

from effir_search.cli import cli

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))]
LINKING = [*PAGES, "benchmarks/README.md"]
WIDTH = 120
# Pages with longer lines.
WIDE = {"docs/compress.md", "docs/finetune.md", "docs/formats.md", "docs/study.md"}
SHELL = {"", "sh", "bash", "console"}
END_OF_COMMAND = {"|", ">", ">>", "&&", ";"}
# Programs with options of their own, which are not ours.
OTHER_PROGRAMS = ("python", ".venv/bin/python", "torchrun", "pytest", "pip", "git", "make")


@cache
def code_blocks(page):
    """Language and lines of each fenced block."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [(language, text.splitlines()) for language, text in blocks]


@cache
def prose(page):
    """The lines outside of code blocks, with their numbers."""
    inside, lines = False, []
    for number, line in enumerate((ROOT / page).read_text(encoding="utf-8").splitlines(), 1):
        if line.startswith("```"):
            inside = not inside
        elif not inside:
            lines.append((number, line))
    return lines


def shell_lines(page):
    """Lines of shell blocks, those that end in a backslash joined with the next."""
    for language, lines in code_blocks(page):
        if language in SHELL:
            yield from re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines()


def commands(page):
    """The words after ``effir`` of each command that a page shows."""
    for line in shell_lines(page):
        line = line.strip().removeprefix("$ ")
        if line.startswith("effir "):
            words = shlex.split(line, comments=True)[1:]
            end = next((place for place, word in enumerate(words) if word in END_OF_COMMAND), len(words))
            yield words[:end]


def code_spans(page):
    """What stands between single backticks, also over the end of a line."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", "\n".join(line for _, line in prose(page)))]


def option_names(command):
    return {name for parameter in command.params for name in [*parameter.opts, *parameter.secondary_opts]} | {"--help"}


def slug(heading):
    """The anchor that GitHub gives a heading."""
    words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", words).replace(" ", "-")


def anchors(page):
    return {slug(line.lstrip("#")) for _, line in prose(page) if re.match(r"#+ ", line)}


def python_blocks(page):
    return ["\n".join(lines) for language, lines in code_blocks(page) if language == "python"]


def parse(words):
    """Parse a command's words as the command would, without running it."""
    name, *rest = words
    command = cli.commands[name]
    with command.make_context(name, rest):
        pass


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_parse(page):
    for words in commands(page):
        try:
            parse(words)
        except (click.UsageError, KeyError) as error:
            pytest.fail(f"{page}: effir {shlex.join(words)}: {error}")


def test_there_are_commands_of_every_kind():
    assert {words[0] for page in PAGES for words in commands(page)} == set(cli.commands)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["index", "--corpus", "c", "--encoder", "m"], "output"),
        (["index", "--output", "o", "--colour", "red"], "--colour"),
        (["index", "--output", "o", "--pooling", "median"], "median"),
        (["slim", "--encoder", "m", "--output", "o", "--narrow", "1.5"], "1.5"),
    ],
)
def test_a_command_that_would_not_run_is_noticed(words, complaint):
    with pytest.raises(click.UsageError, match=complaint):
        parse(words)


@pytest.mark.parametrize("page", PAGES)
def test_the_options_that_a_page_names_exist(page):
    every = set().union(*map(option_names, cli.commands.values()), option_names(cli))
    for span in code_spans(page):
        words = span.split()
        if words[0].startswith(OTHER_PROGRAMS):
            continue
        named = {word.split("=")[0].rstrip(",") for word in words if word.startswith("--")}
        of_command = words[0] == "effir" and len(words) > 1 and words[1] in cli.commands
        known = option_names(cli.commands[words[1]]) if of_command else every
        assert named <= known, f"{page}: `{span}`"
        if words[0] == "effir" and len(words) > 1 and not words[1].startswith("-"):
            assert words[1] in {*cli.commands, "COMMAND"}, f"{page}: `{span}`"


@pytest.mark.parametrize("page", LINKING)
def test_the_links_of_a_page_lead_somewhere(page):
    text = "\n".join(line for _, line in prose(page))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), f"{page}: {target}"
        if anchor:
            assert anchor in anchors(file.resolve().relative_to(ROOT)), f"{page}: {target}"


def test_the_readme_leads_to_every_page():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [page for page in PAGES[1:] if f"({page}" not in text] == []


@pytest.mark.parametrize("page", PAGES)
def test_the_names_that_a_page_imports_exist(page):
    for block in python_blocks(page):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("effir_search"):
                module = importlib.import_module(node.module)
                for name in node.names:
                    assert hasattr(module, name.name), f"{page}: from {node.module} import {name.name}"


@pytest.mark.parametrize("page", PAGES)
def test_the_dotted_names_of_a_page_exist(page):
    for name in re.findall(r"effir_search(?:\.[a-z_]+)+", (ROOT / page).read_text(encoding="utf-8")):
        assert resolves(name), f"{page}: {name}"


def resolves(name):
    """Whether a dotted name is a module, or something in one."""
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        parent, _, last = name.rpartition(".")
        return "." in parent and hasattr(importlib.import_module(parent), last)
    return True


def test_the_files_of_the_table_of_packages_exist():
    package = "."
    for _, line in prose("docs/how-it-is-built.md"):
        if found := re.match(r"\| (?:`(\w+)`)? *\| `(\w+\.py)` \|", line):
            package = found[1] or package
            assert (ROOT / "effir_search" / package / found[2]).is_file(), f"{package}/{found[2]}"


def test_the_python_page_runs(tmp_path, monkeypatch, bert_folder, collection):
    shutil.copytree(bert_folder, tmp_path / "model")
    shutil.copytree(collection, tmp_path / "collection")
    monkeypatch.chdir(tmp_path)
    names = {}
    for number, block in enumerate(python_blocks("docs/python.md"), 1):
        exec(compile(block, f"docs/python.md, block {number}", "exec"), names)
    # MLPs 1 and 2 of 4 were dropped, of 48 units each.
    assert names["AutoModel"].from_pretrained("models/small").config.mlp_widths == [48, 0, 0, 48]


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200


@pytest.mark.parametrize("page", [page for page in PAGES if page not in WIDE])
def test_the_lines_of_a_page_are_as_long_as_those_of_the_code(page):
    long = [number for number, line in prose(page) if len(line) > WIDTH and not line.startswith("|")]
    assert long == [], f"{page}: lines {long}"


@pytest.mark.parametrize("page", LINKING)
def test_a_page_has_no_placeholder_and_no_path_of_a_machine(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert not re.search(r"@@|/tmp/|/home/|/root/|/work/", text)


def test_the_figures_of_the_picture_are_those_of_the_pages():
    with (ROOT / "benchmarks" / "quality-and-speed.csv").open(encoding="utf-8", newline="") as file:
        full, *smaller = csv.DictReader(file)
    assert (full["speed"], full["kept"]) == ("1", "100")
    for row in smaller:
        kept = rf"\| {row['kept']}% \[{row['low']}%, {row['high']}%\]"
        assert re.search(kept, (ROOT / row["quality_from"]).read_text(encoding="utf-8")), row["model"]
        assert re.search(rf"\| {row['speed']} \|", (ROOT / row["speed_from"]).read_text(encoding="utf-8")), row["model"]
