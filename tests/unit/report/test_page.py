"""The page: its content, and that nothing but its own viewer can run and nothing is fetched."""

import base64
import hashlib
import io
import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT, segmented_subject
from PIL import Image
from reports import HOSTILE, PROVENANCE, WEIGHTS, report_of, scores_of

from scripts.network import SkipDenseSeg
from scripts.report import page as report_page
from scripts.report.page import MOST_VIEWERS, SubjectReport, render, report_subject
from scripts.results.tables import write_csv


def test_a_well_segmented_phantom_gets_warnings_for_its_size_only(brains):
    """It has a fifteenth of a brain's volume."""
    subject = report_subject(segmented_subject(brains[0]))
    assert set(subject.warnings) == {"volume out of range", "few foreground voxels"}


class Elements(HTMLParser):
    """Tags with their attributes, and the text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.text += " "

    def handle_data(self, data):
        self.text += data


def reported(subject_id: str, **changes: Any) -> SubjectReport:
    volumes = {"csf_ml": 170.0, "gm_ml": 380.0, "wm_ml": 246.0, "brain_ml": 796.0}
    values = {
        "files": {"T1": "t1.hdr"},
        "volumes": volumes,
        "prepared": [],
        "prepared_picture": None,
        "warnings": {},
        "has_label": False,
        "pictures": None,
    }
    return SubjectReport(subject=subject_id, **(values | changes))


def test_hostile_names_are_text(brains):
    """In the id, file names, messages and settings."""
    subject = report_subject(segmented_subject(brains[0], HOSTILE, labeled=True))
    scores = {HOSTILE: scores_of(0.7), "2": scores_of(0.8)}
    page = render([subject, reported("2")], PROVENANCE | {HOSTILE: HOSTILE}, scores, {})
    elements = Elements(page)
    assert [attributes for tag, attributes in elements.tags if tag == "script"] == [
        {"type": "application/json", "id": "constants"},
        {},
    ]
    assert not any(name.startswith("on") for _, attributes in elements.tags for name in attributes)
    assert f"Subject {HOSTILE}" in elements.text
    assert f"T1: {Path(f'subject-{HOSTILE}-T1.hdr').name}" in elements.text
    ids = [attributes["id"] for _, attributes in elements.tags if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_nothing_is_fetched_and_only_the_viewer_may_run(brains):
    page = render([report_subject(segmented_subject(brains[0]))], PROVENANCE, {}, {})
    elements = Elements(page)
    sources = [attributes[name] for _, attributes in elements.tags for name in ("src", "href") if name in attributes]
    assert sources
    assert all(source.startswith(("data:image/", "#")) for source in sources)
    for source in sources:
        kind, _, content = source.removeprefix("data:").partition(";base64,")
        if content and kind != "image/svg+xml":
            assert Image.open(io.BytesIO(base64.b64decode(content))).get_format_mimetype() == kind
    (policy,) = [a["content"] for tag, a in elements.tags if tag == "meta" and "http-equiv" in a]
    script = page.rsplit("<script>", 1)[1].split("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy == (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; "
        f"base-uri 'none'; form-action 'none'"
    )
    assert script == (ROOT / "scripts" / "report" / "viewer.js").read_text(encoding="utf-8")


def test_warnings_stand_at_the_top_and_beside_the_subject():
    subjects = [reported("1"), reported("2", warnings={"T2 missing": "T2 shows nothing in 3% of the brain"})]
    page = render(subjects, PROVENANCE, {}, {})
    top, _, rest = page.partition("</header>")
    assert "T2 missing (T2 shows nothing in 3% of the brain)" in top
    assert 'href="#subject-2">subject 2</a>' in top
    own = rest.split('id="subject-2"')[1]
    assert "<strong>T2 missing</strong>: T2 shows nothing in 3% of the brain" in own
    assert "<strong>" not in rest.split('id="subject-1"')[1].split('id="subject-2"')[0]
    assert "No warnings." in render(subjects[:1], PROVENANCE, {}, {})


def test_scores_are_those_of_the_table_and_may_be_infinite_or_missing():
    row = dict.fromkeys(scores_of(0), "0.5") | {"dice_csf": "0.91236", "hd95_gm": "inf", "dice_wm": "nan"}
    text = Elements(render([reported("1")], PROVENANCE, {"1": row}, {})).text
    assert re.search(r"Dice in percent\s+91\.24\s+50\.00\s+none\s+50\.00", text)
    assert re.search(r"HD95 in mm\s+0\.50\s+∞\s+0\.50", text)


def test_page_has_the_provenance():
    text = Elements(render([reported("1")], PROVENANCE, {}, {})).text
    assert all(name in text and value in text for name, value in PROVENANCE.items())
    assert "Research use only" in text


def test_page_has_curves_if_there_is_a_log():
    history = {"train_loss": {1: 0.9, 2: 0.5}}
    assert 'alt="Training"' in render([reported("1")], PROVENANCE, {}, history)
    assert 'alt="Training"' not in render([reported("1")], PROVENANCE, {}, {})


def test_handler_replaces_an_earlier_report_and_prints_its_path(brains, tmp_path, capsys):
    (tmp_path / "report.html").write_text("earlier")
    (tmp_path / "notes.txt").write_text("mine")
    items = [segmented_subject(brains[0], "1", labeled=True), segmented_subject(brains[1], "2", labeled=True)]
    write_csv(tmp_path / "metrics.csv", [{"subject": item["subject"]} | scores_of(0.8) for item in items])
    page = report_of(items, tmp_path, scored=True)
    assert {path.name for path in tmp_path.iterdir()} == {
        *("report.html", "inference-provenance.json"),
        *("notes.txt", "metrics.csv"),
    }
    printed = capsys.readouterr().out.strip()
    kinds = "volume out of range (1, 2); few foreground voxels (1, 2)"
    assert printed.startswith(f"report: {tmp_path / 'report.html'}; warnings: {kinds}")
    assert "\n" not in printed
    text = Elements(page).text
    digest = hashlib.sha256(WEIGHTS.read_bytes()).hexdigest()
    version = json.loads((ROOT / "configs" / "metadata.json").read_text())["version"]
    for stated in (digest, f"version {version}", "the/data", "float32", "subject-2-label.hdr", "Research use only"):
        assert stated in text, stated
    assert text.count("83.00") == 4  # mean Dice of both, in the table of all and in their own


def test_a_path_that_is_not_utf_8_does_not_end_the_run(brains, monkeypatch, tmp_path):
    given = [os.fsdecode(b"d\xe9j\xe0 vu"), "日本"]
    monkeypatch.setattr("sys.orig_argv", ["python", "--dataset_dir", *given])
    text = Elements(report_of([segmented_subject(brains[0], "1")], tmp_path)).text
    assert r"'d\udce9j\udce0 vu' '日本'" in text


def test_credentials_in_urls_are_left_out(brains, monkeypatch, tmp_path):
    urls = ["http://me:secret@host:5000/a", "http://me:s/e@c'ret@host/b", "https://secret@host/c"]
    kept = "s3://bucket/b@c"
    command = ["python", "run", "--tracking_uri", urls[0], f"--other={urls[1]}", "--output_dir", kept]
    monkeypatch.setattr("sys.orig_argv", command)
    page = report_of(
        [segmented_subject(brains[0], "1")], tmp_path, dataset_dir=urls[2], both=urls[:2], **{"else": kept}
    )
    assert not re.search("secret|c'ret|c&#39;ret|//me", page)
    text = Elements(page).text
    assert "--tracking_uri http://host:5000/a --other=http://host/b" in text
    assert "https://host/c" in text
    assert text.count(kept) == 2


def test_other_weights_are_not_reported_as_the_checkpoint(brains, tmp_path):
    """A federated client gets weights from its server, with or without a checkpoint on disk."""
    digest = hashlib.sha256(WEIGHTS.read_bytes()).hexdigest()
    items = [segmented_subject(brains[0], "1")]
    for name, changes in (
        ("others", {"network": SkipDenseSeg()}),
        ("none", {"checkpoints": str(tmp_path / "model.pt")}),
        ("one of two", {"checkpoints": [str(WEIGHTS), str(tmp_path / "model.pt")]}),
    ):
        text = Elements(report_of(items, tmp_path / name, **changes)).text
        assert text.count("weights were given by the calling program") == 1, name
        assert (digest in text) == (name == "one of two"), name
    assert "given by the calling program" not in report_of(items, tmp_path / "same")


def test_number_of_viewers_is_limited(brains, monkeypatch, tmp_path):
    monkeypatch.setattr(report_page, "MOST_VIEWERS", 2)
    page = report_of([segmented_subject(brains[0], str(n)) for n in range(3)], tmp_path)
    assert page.count('class="viewer"') == 2
    assert page.count('class="subject"') == 3
    assert "a report shows at most 2 subjects" in page
    assert MOST_VIEWERS >= 13


def test_subject_of_two_processes_counts_once(brains, monkeypatch, tmp_path):
    other = [report_subject(segmented_subject(brains[1], "2")), report_subject(segmented_subject(brains[0], "1"))]
    monkeypatch.setattr(report_page, "gathered", lambda subjects: [*subjects, *other])
    page = report_of([segmented_subject(brains[0], "1")], tmp_path)
    assert re.findall(r"<h2>Subject (\d)</h2>", page) == ["1", "2"]


def test_another_rank_writes_nothing(brains, monkeypatch, tmp_path):
    monkeypatch.setattr(report_page.idist, "get_rank", lambda: 1)
    with pytest.raises(FileNotFoundError):
        report_of([segmented_subject(brains[0], "1")], tmp_path)
    assert not list(tmp_path.iterdir())
