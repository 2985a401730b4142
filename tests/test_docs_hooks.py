"""The scripts in docs/hooks that write pages of the documentation: benchmarks, memory and models."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest

from hf_flashcp.doctor.all_models import diagnose_all, text


def load(name):
    """A script of docs/hooks as a module."""
    spec = importlib.util.spec_from_file_location(name, Path("docs/hooks", f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


benchmarks_page, models_page, blocks_table = load("benchmarks_page"), load("models_page"), load("blocks_table")
memory_page = load("memory_page")


def test_the_table_of_blocks_is_that_of_the_script():
    assert f"\n\n{blocks_table.table()}\n\n" in Path("docs/gpu.md").read_text(encoding="utf-8")


def test_the_page_of_memory_is_up_to_date(tmp_path):
    text = Path("docs/memory.md").read_text(encoding="utf-8")
    for table in (memory_page.table(), memory_page.million()):
        assert f"\n\n{table}\n\n" in text
    copy = tmp_path / "memory.md"
    copy.write_text(text, encoding="utf-8")
    assert [found["diff"] for found in benchmarks_page.measure(copy, [])] == [[]]
    assert memory_page.PICTURE.is_file()


def test_the_recipe_of_a_million_tokens_says_what_it_needs():
    sizing, setup = memory_page.planned("8B", [2**20])
    found = sizing.memory(replace(setup, **memory_page.of_recipe()))
    needs = f"{found.total / 2**30:.0f} GiB per GPU, and {8 * found.host / 2**30:.0f} GiB of host memory"
    assert needs in Path("recipes/million.yaml").read_text(encoding="utf-8")


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


def test_output_of_the_commands_replaces_the_old_output(capsys, tmp_path):
    path = tmp_path / "page.md"
    path.write_text(PAGE)
    one, two = benchmarks_page.measure(path, [])
    assert path.read_text() == PAGE.replace("old\n", "first line\n\nsecond\n")
    assert (one["section"], one["diff"]) == ("One", ["@@ -1 +1,3 @@", "-old", "+first line", "+", "+second"])
    assert (two["section"], two["diff"]) == ("Two, in three steps", [])
    assert not benchmarks_page.main([str(path), "--sections", "three"])
    assert capsys.readouterr().out == "Two, in three steps: 0 s, unchanged\n"


@pytest.mark.parametrize(
    "page, sections, message",
    [
        (PAGE, ["four"], "no section with output whose heading contains four"),
        ("## Alone\n\n```text\nout\n```\n", [], "in section 'Alone' has no bash block"),
        ("## Bad\n\n```bash\necho lost\nls /nowhere\n```\n\n```text\nkept\n```\n", [], "'Bad' failed .ls /nowhere."),
    ],
)
def test_errors_leave_the_page_alone(tmp_path, page, sections, message):
    path = tmp_path / "page.md"
    path.write_text(page)
    with pytest.raises(benchmarks_page.PageError, match=message):
        benchmarks_page.measure(path, sections)
    assert path.read_text() == page


def test_a_page_that_does_not_exist(tmp_path, capsys):
    assert benchmarks_page.main([str(tmp_path / "none.md")]) == 2
    assert "Run this in the root of a checkout" in capsys.readouterr().err


def test_every_output_of_the_page_of_benchmarks_has_its_commands():
    found = benchmarks_page.outputs(Path("docs/benchmarks.md").read_text(encoding="utf-8"))
    benches = {line.split()[4] for output in found for line in output.script.splitlines() if " bench " in line}
    assert benches == {
        *("table2", "plan", "nodes", "packing", "predicted", "published"),
        *("layout", "attention", "step", "rows", "calibrate", "memory"),
    }


def test_all_models_as_a_table_and_as_a_page(pool):
    diagnoses = diagnose_all(pool, ["bloom", "deepseek_v3", "gemma2", "jamba", "qwen3_next"])
    results = ["refused", "supported", "supported", "whole-document plans only", "supported"]
    assert [d.result for d in diagnoses] == results
    rows = text(diagnoses).splitlines()[1:]
    assert [row.split()[0] for row in rows] == ["bloom", "deepseek_v3", "gemma2", "jamba", "qwen3_next"]
    assert "attention interface" in rows[0] and rows[2].endswith("sliding window in some layers; softcap")
    page = models_page.page(diagnoses)
    assert "| supported | 3 |" in page and "| refused | 1 |" in page and "## Whole-document plans only" in page
    assert "| sliding window in some layers; softcap | `gemma2` |" in page
    assert "| values narrower or wider than keys | `deepseek_v3` |" in page
    assert "| Mamba-1; router loss | `jamba` |" in page
    assert "| gated delta rule; router loss | `qwen3_next` |" in page
