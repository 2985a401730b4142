import json
from pathlib import Path

import pytest

from hf_flashcp.bench.page import measure, outputs
from hf_flashcp.errors import ConfigurationError
from tests.test_cli import run


PAGE = """# Page

## One

```bash
echo first \\
    line
python -c "print('second')"  # a remark
```

Words about 1.2.

```text
old
```

```bash
not run, because it has no output
```

### Two, in three steps

```bash
echo three | tail -n 1
```

```text
three
```
"""


def test_what_commands_print_takes_the_place_of_what_they_printed(capsys, tmp_path):
    path = tmp_path / "page.md"
    path.write_text(PAGE)
    code, out, err = run(capsys, f"bench page {path} --json")
    assert code == 0 and err == ""
    assert path.read_text() == PAGE.replace("old\n", "first line\n\nsecond\n")
    one, two = json.loads(out)
    assert (one["section"], one["diff"]) == ("One", ["@@ -1 +1,3 @@", "-old", "+first line", "+", "+second"])
    assert (two["section"], two["diff"]) == ("Two, in three steps", [])
    code, out, _ = run(capsys, f"bench page {path} --sections three")
    assert code == 0 and out == "Two, in three steps: 0 s, as before\n"


@pytest.mark.parametrize(
    "page, sections, message",
    [
        (PAGE, ["four"], "No section of .* is called like four"),
        ("## Alone\n\n```text\nout\n```\n", [], "under 'Alone' has no bash block"),
        ("## Bad\n\n```bash\necho lost\nls /nowhere\n```\n\n```text\nkept\n```\n", [], "'Bad' failed .ls /nowhere."),
    ],
)
def test_errors_leave_the_page_alone(tmp_path, page, sections, message):
    path = tmp_path / "page.md"
    path.write_text(page)
    with pytest.raises(ConfigurationError, match=message):
        measure(path, sections)
    assert path.read_text() == page


def test_a_page_that_is_not_there(tmp_path):
    with pytest.raises(ConfigurationError, match="run this in a checkout"):
        measure(tmp_path / "none.md", [])


def test_every_output_of_the_page_of_benchmarks_has_its_commands():
    found = outputs(Path("docs/benchmarks.md").read_text(encoding="utf-8"))
    benches = {line.split()[4] for output in found for line in output.script.splitlines() if " bench " in line}
    assert benches == {
        *("table2", "plan", "nodes", "packing", "predicted", "published"),
        *("attention", "step", "kernels", "calibrate", "agreement", "memory"),
    }
