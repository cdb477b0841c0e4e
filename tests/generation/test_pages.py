"""Pages from files, dumps and an encyclopaedia's interface, and the passages in them."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import pandas as pd
import pytest

from gapprobe.errors import ConfigError
from gapprobe.generation.pages import Pages, open_pages, passages
from gapprobe.tasks.questions import Entity

TOWER = Entity("Eiffel_Tower", ("La dame de fer",))


def texts(pages: Pages, *entities: Entity) -> list[str]:
    return [text or problem for _, text, problem in pages.read(entities)]


def test_a_folder_has_a_file_an_entity(tmp_path) -> None:
    (tmp_path / "eiffel tower.txt").write_text("tall")
    (tmp_path / "La_dame_de_fer.md").write_text("iron")
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\xff")
    pages = open_pages(str(tmp_path), tmp_path / "kept")
    asked = TOWER, Entity("none", ("La dame de fer",)), Entity("none"), Entity("bad"), Entity("La_dame de fer")
    found = texts(pages, *asked)
    assert found[:3] == ["tall", "iron", ""]
    assert "bad.txt cannot be read" in found[3]
    assert found[4] == "iron"  # one that is bad does not stop the others
    assert not (tmp_path / "kept").exists()


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_dump_has_titles_and_texts(tmp_path, suffix) -> None:
    path = tmp_path / f"dump{suffix}"
    rows = pd.DataFrame({"title": ["Eiffel Tower", "Spider", "Eiffel Tower"], "text": ["tall", "legs", "second"]})
    rows.to_json(path, orient="records", lines=True) if suffix == ".jsonl" else rows.to_parquet(path)
    pages = open_pages(str(path), tmp_path)
    assert texts(pages, TOWER, Entity("spider"), Entity("none")) == ["tall", "legs", ""]
    bad = tmp_path / f"bad{suffix}"
    if suffix == ".jsonl":
        bad.write_text('{"title": "x"}\n')
    else:
        rows[["title"]].to_parquet(bad)
    with pytest.raises(ConfigError, match="needs the columns title and text"):
        texts(open_pages(str(bad), tmp_path), TOWER)


def test_other_sources_are_refused(tmp_path) -> None:
    (tmp_path / "page.html").write_text("")
    for wrong in ("page.html", "nowhere", "ftp://x"):
        with pytest.raises(ConfigError, match="must be a folder of"):
            open_pages(str(tmp_path / wrong), tmp_path)


def test_an_encyclopaedias_interface(tmp_path) -> None:
    """A server with MediaWiki's documented replies: the real one is not reached from a test."""
    asked: list[dict[str, list[str]]] = []

    class Wiki(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            query = parse_qs(urlsplit(self.path).query)
            asked.append(query)
            title = query["titles"][0]
            page = {"title": title, "missing": True} if title == "Eiffel Tower" else {"extract": f"About {title}."}
            told = b"{}" if title == "odd" else json.dumps({"query": {"pages": [page]}}).encode()
            self.send_response(500 if title == "broken" else 200)
            self.send_header("content-length", str(len(told)))
            self.end_headers()
            self.wfile.write(told)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Wiki)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        address = f"http://127.0.0.1:{server.server_port}/w/api.php"
        pages = open_pages(address, tmp_path)
        assert texts(pages, TOWER) == ["About La dame de fer."]
        assert [query["titles"] for query in asked] == [["Eiffel Tower"], ["La dame de fer"]]
        assert asked[0]["prop"] == ["extracts"]
        found = texts(pages, Entity("broken"), Entity("odd"), Entity("fine"))
        assert found[0].startswith("page 'broken' cannot be had")
        assert found[1].startswith("page 'odd' cannot be had")
        assert found[2] == "About fine."
    finally:
        server.shutdown()
        server.server_close()
    assert texts(open_pages(address, tmp_path), TOWER) == ["About La dame de fer."]  # kept


def test_passages_are_two_sentences_of_which_the_first_names_the_entity() -> None:
    page = (
        "== History ==\nThe tower is old. The Eiffel Tower is in Paris, France. It was built in 1889. It is iron.\n\n"
        "Eiffel Tower\nA day in St. Louis is long. The eiffel-tower's height is 330 m. Many climb the Eiffel Tower! "
        'Why? "La Dame de Fer" is its other name.\n# Eiffel Tower\nThe Eiffel Towers of Las Vegas and Tokyo, made by '
        "J. Doe and others, are\nno more than copies of it."
    )
    assert passages(page, TOWER, 10) == [
        "The Eiffel Tower is in Paris, France. It was built in 1889.",
        "The eiffel-tower's height is 330 m. Many climb the Eiffel Tower!",
        '"La Dame de Fer" is its other name.',
        "The Eiffel Towers of Las Vegas and Tokyo, made by J. Doe and others, are no more than copies of it.",
    ]
    assert len(passages(page, TOWER, 2)) == 2
    assert passages("", TOWER, 2) == passages("Nothing of it.", TOWER, 2) == []
    assert passages("Eiffel Tower " * 100, TOWER, 2) == []  # no prose
