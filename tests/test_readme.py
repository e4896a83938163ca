"""What the README shows works as it stands there."""

import json
import re
from pathlib import Path

from fork_server import succeed

README = Path(__file__).parent.parent / "README.md"


def test_the_readmes_own_parts_train_and_sample_through_the_cli(tmp_path: Path) -> None:
    (source,) = re.findall(r"```python\n(# my_parts\.py.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "my_parts.py").write_text(source)
    tiny = ["--preset", "tiny", "--train.steps", "2", "--train.log-every", "1", "--model.context", "32", "--quiet"]
    there = f"os.chdir({str(tmp_path)!r})"
    succeed("train", "run", *tiny, "--parts", "my_parts.py:parts", before=there)
    steps = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert {record["step"] for record in steps} == {1, 2}

    (tmp_path / "my_parts.py").unlink()  # the run has its own copy
    done = succeed("sample", "run", "--prompt", "A", "--new-tokens", "4", "--json", before=there)
    assert len(json.loads(done.out)["routed_fraction"]) == 1


def test_every_command_of_the_readme_exists() -> None:
    from mod_star.cli import COMMANDS

    named = set(re.findall(r"(?:bin/|`)mod-star (\w+)", README.read_text(encoding="utf-8")))
    assert {"train", "sample", "routes"} <= named <= set(COMMANDS)
