"""docs/check_commands: the quick commands in the documentation run, and its table has no stale entries."""

from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path

import pytest


def load():
    """The script as a module."""
    loader = SourceFileLoader("check_commands", str(Path(__file__).parent.parent / "docs" / "check_commands"))
    module = module_from_spec(spec_from_loader(loader.name, loader))
    loader.exec_module(module)
    return module


check_commands = load()
COMMANDS, STALE = check_commands.documented()
QUICK = [command for command in COMMANDS if not command.how]
PAGE = """# Page

```bash
echo one  # a remark
echo two \\
    three

for name in a b; do
    echo $name
done
```

- In a list:

  ```bash
  ls missing
  ```

```text
not a command
```
"""


@pytest.mark.parametrize("page", sorted({command.page for command in QUICK}))
def test_quick_commands_run(page):
    results = check_commands.run([command for command in QUICK if command.page == page], timeout=120)
    assert not [f"{command.text}: {error}" for command, _, error in results if error]


def test_every_entry_of_the_table_matches_a_command():
    assert not STALE


def test_commands_of_a_page():
    texts = [command.text for command in check_commands.commands_of("page.md", PAGE)]
    assert texts == [
        "echo one  # a remark",
        "echo two \\\n    three",
        "for name in a b; do\n    echo $name\ndone",
        "ls missing",
    ]
    with pytest.raises(SystemExit, match="page.md: a bash block is not valid bash"):
        check_commands.commands_of("page.md", "```bash\nfor name in a; do\n```\n")


def test_a_command_that_fails_or_hangs_is_named():
    commands = [check_commands.Command("page.md", text) for text in ("ls config.json", "ls missing", "sleep 60")]
    (_, _, works), (_, _, fails), (_, _, hangs) = check_commands.run(commands, timeout=2, show=lambda line: None)
    assert works == "" and fails.startswith("exit code 2: ") and "missing" in fails
    assert hangs == "not done after 2 seconds"


def test_a_stale_entry_is_an_error(monkeypatch, capsys):
    stale = (*check_commands.ENTRIES, ("no such command", check_commands.SLOW, "a reason"))
    monkeypatch.setattr(check_commands, "ENTRIES", stale)
    assert check_commands.main(["--list"]) == 1
    assert "'no such command'" in capsys.readouterr().err
