"""docs/components.md: every choice against the shipped models, generated and up to date."""

from __future__ import annotations

from pathlib import Path

import pytest

from archspec import catalog, zoo
from archspec.commands import main
from archspec.component import FAMILIES

PAGE = Path(__file__).parents[1] / "docs" / "components.md"


def test_the_page_is_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "components", "--markdown"]) == 0
    message = "stale: run `archspec list components --markdown > docs/components.md`"
    assert capsys.readouterr().out == PAGE.read_text(encoding="utf-8"), message


def test_every_choice_is_there_with_the_models_that_make_it() -> None:
    catalog.load_blocks()
    rows = {(row["choice"], row["kind"]): row["models"].split(", ") for row in zoo.components()}
    for family in ("memory", "bias", "retention", "update", "feature", "gate", "projection"):
        for kind in FAMILIES[family].members:
            assert (FAMILIES[family].noun, kind) in rows
    assert "aaren" in rows["projection", "learned"]
    assert "dot" in rows["feature map", "exponential"]  # inside a memory, from the spec it extends
    assert "gla" in rows["projection", "linear"]  # not written anywhere: the default
    assert "transformer" not in rows["attentional bias", "dot"]
    assert "hgrn2" in rows["gate", "rising"]  # a gate inside a gate


def test_choices_are_no_page(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["list", "choices", "--markdown"])
    assert caught.value.code == 2
    assert "only 'models' and 'components' are pages" in capsys.readouterr().err
