"""The errata of a paper: what its file must hold, and what the page adds."""

import pytest
import yaml

from common import paths
from common.pipeline.errata import errata_text, load_errata

PAPER = "dong_quantifying"
ENTRY = {
    "at": "Theorem 1, (13)", "printed": "4 C", "correct": "2 C", "claims": ["fig08/slope"],
    "consequence": "Half as large.",
}  # fmt: skip
CLAIM = {
    "id": "slope", "statement": "It is 4 C", "expected": 4.0, "measured": 2.01, "interval": [1.99, 2.03],
    "verdict": "paper in error",
}  # fmt: skip
RECORD = {"id": f"{PAPER}/fig08", "claims": [CLAIM]}


@pytest.fixture
def given(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    (tmp_path / "errata").mkdir()
    return lambda text: (tmp_path / "errata" / f"{PAPER}.yaml").write_text(text, encoding="utf-8")


def test_a_page_has_what_is_printed_what_is_correct_and_what_was_measured(given):
    given(yaml.safe_dump([ENTRY, {**ENTRY, "at": "(14)", "claims": [], "derivation": "E z = 0."}]))
    text = errata_text(PAPER, load_errata(PAPER), [RECORD])
    assert "## Theorem 1, (13)" in text and text.index("(13)") < text.index("## (14)")
    assert "- **Printed:** 4 C" in text and "- **Correct:** 2 C" in text and "- Derivation: E z = 0." in text
    assert r"(../figures/README.md#dong_quantifying-fig08)" in text
    assert r"expected 4, measured 2.01 \[1.99, 2.03\]; paper in error" in text
    assert "arxiv.org/abs/2505.02809" in text


def test_a_claim_that_no_record_has_is_named(given):
    given(yaml.safe_dump([{**ENTRY, "claims": ["fig08/level"]}]))
    with pytest.raises(
        ValueError, match=r"errata/dong_quantifying.yaml: Theorem 1.*no record has the claim fig08/level"
    ):
        errata_text(PAPER, load_errata(PAPER), [RECORD])


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("a: 1", "no list of entries"),
        ("[1]", "no list of entries"),
        ("- [", "cannot be read"),
        (yaml.safe_dump([{**ENTRY, "claims": []}]), "lacks claims or derivation"),
        (yaml.safe_dump([{**ENTRY, "correct": ""}]), "lacks correct"),
        (yaml.safe_dump([{**ENTRY, "proof": "x"}]), "no field 'proof'"),
        (yaml.safe_dump([{**ENTRY, "printed": 4}]), "printed is no text"),
    ],
)
def test_a_file_that_is_none_is_one_line(given, text, word):
    given(text)
    with pytest.raises(ValueError, match=word) as error:
        load_errata(PAPER)
    assert "\n" not in str(error.value)


def test_a_paper_without_errata(given):
    assert load_errata(PAPER) == []
